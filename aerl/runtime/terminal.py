"""How every command of aerl meets its terminal: streams that cannot fail it, errors in one line, exit codes.

This module imports nothing but the standard library: it is there before anything else can fail.
"""

import argparse
import errno
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

_LONGEST_WORD, _LONGEST_LINE = 600, 3000  # characters; a path may have some hundreds


class Parser(argparse.ArgumentParser):
    """Argparse with its errors in one line; exit code 2."""

    def error(self, message: str) -> NoReturn:
        print_error(f"{message} (see --help)")
        sys.exit(2)


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorates the main function of `python -m aerl...`: whatever it raises becomes one line and exit code 1.

    The decorated function takes the words of the command line, None for the process's own, and returns the
    exit code: what `main` returns, 1 after an exception, 130 after Ctrl-C, and 1 where the disk has refused
    what it has printed. HYDRA_FULL_ERROR=1 shows tracebacks, as it does for launch.py.
    """

    @functools.wraps(main)
    def run(words: Sequence[str] | None = None) -> int:
        if words is None:
            protect_streams()
        try:
            code = main(words)
        except KeyboardInterrupt:
            print_error("interrupted")
            return 130
        except Exception as error:
            if full_error():
                traceback.print_exception(error)
            else:
                print_error(as_line(error))
            return 1
        return code or lost_output()

    return run


def full_error() -> bool:
    """Whether tracebacks are wanted. launch.py notes the user's own wish, since it sets Hydra's variable itself."""
    return os.environ.get("AERL_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR")) == "1"


def as_line(error: BaseException) -> str:
    """What a command says of an exception; of one that nobody has put into words also where it was raised."""
    from aerl.types import UserError, first_line

    if isinstance(error, UserError):
        return str(error)
    if out_of_memory := memory_line(error):
        return out_of_memory
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({os.path.basename(place[0].filename)}:{place[0].lineno})" if place else ""  # noqa: PTH119
    return f"{type(error).__name__}: {first_line(error)}{where}; HYDRA_FULL_ERROR=1 shows all of it"


def memory_line(error: BaseException) -> str | None:
    """One line where the main memory, or a limit on it, is what was in the way; None for any other error."""
    from aerl.types import first_line

    cause: BaseException | None = error
    while cause is not None:
        refused = isinstance(cause, OSError) and cause.errno == errno.ENOMEM
        match = _NO_MEMORY.search(str(cause))
        if isinstance(cause, MemoryError) or refused or match:
            lines = str(cause).splitlines() if match else []
            reason = next((line.strip() for line in lines if _NO_MEMORY.search(line)), first_line(cause))
            return f"the machine's memory, or a limit on it (ulimit -v), is used up: {reason}"
        cause = cause.__cause__ or cause.__context__
    return None


_NO_MEMORY = re.compile(
    r"cannot allocate memory|failed to map segment|can't allocate memory|can't start new thread|"
    r"not enough memory|std::bad_alloc",
    re.IGNORECASE,
)


def print_error(text: str) -> None:
    """`error: ...` on standard error: one line of a bounded length, without control characters."""
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """`text` in one line that a terminal can show; what is too long is cut in its middle."""
    words = (_shortened(word, _LONGEST_WORD) for word in text.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in " ".join(words))
    return _shortened(line, _LONGEST_LINE)


def override_word(key: str, value: object) -> str:
    """`key=value` for launch.py, quoted for Hydra and for the shell where one of them needs that."""
    text = str(value)
    if re.fullmatch(r"[\w./@+:-]+", text, re.ASCII):
        return f"{key}={text}"
    text = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (match[2] and "\\'"), text)  # for Hydra
    return '"' + re.sub(r'(["$`\\])', r"\\\1", f"{key}='{text}'") + '"'


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 4 :]}"


# ------------------------------------------------------------------------------------------------ streams


class _Stream(io.FileIO):
    """A standard stream that may go away (a closed pipe, a full disk) without ending what writes to it."""

    refused: int | None = None  # errno of the first failure

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.refused = self.refused or error.errno
            return memoryview(data).nbytes


_streams: list[_Stream] = []


def protect_streams() -> None:
    """Make standard output and error streams that never raise, whatever becomes of their other end.

    A closed one becomes /dev/null: the next file opened would else get its number, and what libraries print.
    What the terminal's encoding lacks is printed as a question mark, or on standard error as an escape.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, number, errors in (("stdout", 1, "replace"), ("stderr", 2, "backslashreplace")):
        old = getattr(sys, name)
        raw = _Stream(number, "wb", closefd=False)
        _streams.append(raw)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=getattr(old, "encoding", None) or "utf-8",
            errors=errors,
            line_buffering=getattr(old, "line_buffering", True),
            write_through=getattr(old, "write_through", False),
        )
        setattr(sys, name, stream)


def lost_output() -> int:
    """1 where something printed did not get to where it should, for another reason than a reader who has left."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for raw, name in zip(_streams, ("standard output", "standard error"), strict=False):
        if raw.refused not in (None, errno.EPIPE, errno.EIO):
            print_error(f"cannot write {name}: {os.strerror(raw.refused or 0)}")
            return 1
    return 0
