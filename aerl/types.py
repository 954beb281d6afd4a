"""What every part of aerl shares: the error a user reads, and the annotated numbers of the schema.

An annotation such as `eps: NonNegative` in a signature documents the parameter and checks it: `aerl.config` reads the
signature of whatever a YAML file's `_target_` names. This module imports neither torch nor Hydra.
"""

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field


class UserError(Exception):
    """A mistake or a fault outside aerl, in one line: the key, its value and what would be right."""

    printed = False  # whether the user has read it already


def first_line(error: BaseException) -> str:
    """The first line of another library's exception."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_foreign(target: Any) -> bool:
    """Whether a function, a class or an object (a module, an attack) is defined outside aerl."""
    while isinstance(target, functools.partial):
        target = target.func
    return str(getattr(target, "__module__", "")).partition(".")[0] != "aerl"


@contextmanager
def foreign_code(key: str, *targets: Any, remedy: str = "HYDRA_FULL_ERROR=1 shows where") -> Iterator[None]:
    """Around calls of other people's code: whatever it raises becomes a UserError, `key: TYPE: text (remedy)`.

    `targets` are the objects that are called; if all of them are aerl's own, exceptions pass unchanged, so that
    a bug of aerl's is a traceback. Code that handles one kind of exception itself (out of memory) must stand inside.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(error) is not SystemExit:
            raise  # signals.Stopped
        if targets and not any(map(is_foreign, targets)):
            raise
        raise UserError(f"{key}: {type(error).__name__}: {first_line(error)} ({remedy})") from error


@contextmanager
def named(key: str) -> Iterator[None]:
    """A UserError of the code inside about a setting of its own gets the `key` by which the user knows it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(key):
            raise
        raise UserError(f"{key}.{error}" if "=" in str(error).partition(" ")[0] else f"{key}: {error}") from error


def shortened(text: str, longest: int) -> str:
    """`text` in at most `longest` bytes of UTF-8; a longer one ends in a hash of it."""
    if len(text.encode()) <= longest:
        return text
    head = text.encode()[: longest - 20].decode(errors="ignore")
    return f"{head}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


_QUOTIENT = re.compile(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*/\s*([\d.]+(?:e[-+]?\d+)?)\s*", re.IGNORECASE)


def quotient(value: Any) -> Any:
    """'8/255' as the number it means, also in lists and dictionaries; anything else as it is."""
    if isinstance(value, dict):
        return {key: quotient(item) for key, item in value.items()}
    if isinstance(value, list):
        return [quotient(item) for item in value]
    if not isinstance(value, str) or not (match := _QUOTIENT.fullmatch(value)):
        return value
    numerator, denominator = map(float, match.groups())
    if denominator == 0:
        raise ValueError("divides by zero")
    return numerator / denominator


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which Python counts as an integer
        raise ValueError("must be a number, not true or false")
    return quotient(value)


def finite(value: Any) -> Any:
    """`value`; ValueError if it, or a number in its lists and dictionaries, is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        finite(item)
    return value


Number = Annotated[float, BeforeValidator(_number), AfterValidator(finite)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Probability = Annotated[Number, Field(ge=0, le=1)]
_LARGEST = 2**63 - 1  # of torch's integers
Count = Annotated[int, BeforeValidator(_number), Field(ge=1, le=_LARGEST)]
Index = Annotated[int, BeforeValidator(_number), Field(ge=0, le=_LARGEST)]
Norm = Literal["L2", "Linf"]


def eps_text(eps: float) -> str:
    """An eps as people write it: 0.5 as it is, 0.0313725 as 8/255."""
    levels, short = eps * 255, f"{eps:.4g}"
    return f"{levels:.0f}/255" if float(short) != eps and math.isclose(levels, round(levels)) else short
