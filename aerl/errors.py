"""The error that a user reads, and how errors of other people's code become one."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """A mistake or fault outside aerl, in one line: the key, its value and what would be right."""

    printed = False


def first_line(error: BaseException) -> str:
    """The first line of another library's exception."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def short(value: Any) -> str:
    """A value as it is shown in an error."""
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_foreign(target: Any) -> bool:
    """Whether a function, class or object is defined outside aerl."""
    while isinstance(target, functools.partial):
        target = target.func
    return str(getattr(target, "__module__", "")).partition(".")[0] != "aerl"


@contextmanager
def foreign_code(key: str, *targets: Any, remedy: str = "HYDRA_FULL_ERROR=1 shows where") -> Iterator[None]:
    """Turn what other people's code raises into a UserError `key: TYPE: text (remedy)`.

    `targets` are the objects called: if all of them are aerl's, exceptions pass, so that a bug of aerl shows a
    traceback. Code that handles an exception itself (out of memory) must be inside.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        stopped = isinstance(error, SystemExit) and type(error) is not SystemExit  # aerl.runtime.signals.Stopped
        if stopped or isinstance(error, UserError) or (targets and not any(map(is_foreign, targets))):
            raise
        raise UserError(f"{key}: {type(error).__name__}: {first_line(error)} ({remedy})") from error


@contextmanager
def named(key: str) -> Iterator[None]:
    """Prefix a UserError about a setting with the `key` that holds it: steps=0 becomes attack.pgd.steps=0."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(key):
            raise
        raise UserError(f"{key}.{error}" if "=" in str(error).partition(" ")[0] else f"{key}: {error}") from error
