"""The terminal of every command: errors in one line, exit codes, streams that never raise. Standard library only."""

import argparse
import errno
import functools
import hashlib
import io
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

_LONGEST = 3000  # characters of a line
_NO_MEMORY = r"(can't|cannot) (allocate memory|start new thread)|failed to map segment|not enough memory|bad_alloc"


class Parser(argparse.ArgumentParser):
    """Argparse with errors in one line; exit code 2."""

    def error(self, message: str) -> NoReturn:
        print_error(f"{message} (see --help)")
        sys.exit(2)


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorates the main function of `python -m aerl...`, which takes the words of its command line (None: sys.argv's).

    Returns the exit code: 1 after an exception, which is printed in one line, and for lost output; 130 after Ctrl-C.
    """

    @functools.wraps(main)
    def run(words: Sequence[str] | None = None) -> int:
        from aerl.errors import UserError, first_line

        if words is None:
            protect_streams()
        try:
            return main(words) or lost_output()
        except KeyboardInterrupt:
            print_error("interrupted")
            return 130
        except Exception as error:
            if full_error():
                traceback.print_exception(error)
            elif isinstance(error, UserError):
                print_error(str(error))
            else:
                print_error(memory_line(error) or f"{type(error).__name__}: {first_line(error)} (HYDRA_FULL_ERROR=1)")
            return 1

    return run


def full_error() -> bool:
    """Whether the user wants tracebacks."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def memory_line(error: BaseException | None) -> str | None:
    """One line for an error caused by a lack of main memory; None for any other error."""
    while error is not None:
        if isinstance(error, MemoryError) or re.search(_NO_MEMORY, str(error), re.IGNORECASE):
            return f"out of main memory (or the limit of ulimit -v): {str(error)[:300] or type(error).__name__}"
        error = error.__cause__ or error.__context__
    return None


def print_error(text: str) -> None:
    """`error: ...` on standard error, in one line."""
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """`text` in one printable line; if it is too long, its middle is left out."""
    words = " ".join(text.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]}...{line[-_LONGEST // 4 :]}"


def eps_text(eps: float) -> str:
    """An eps as people write it: 0.5, but 8/255 for 0.0313725."""
    levels, short = eps * 255, f"{eps:.4g}"
    return f"{levels:.0f}/255" if float(short) != eps and math.isclose(levels, round(levels)) else short


def override_word(key: str, value: str) -> str:
    """`key=value` for launch.py, quoted for the shell and for Hydra."""
    return f"\"{key}='{value}'\""


class _Stream(io.FileIO):
    """A standard stream that may disappear (a closed terminal or pipe) without ending the run that writes to it."""

    disk_full = False

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.disk_full |= error.errno == errno.ENOSPC
            return memoryview(data).nbytes


def protect_streams() -> None:
    """Make standard output and error never raise: a run outlives its terminal, in any encoding."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed: the next file would get its number
        os.set_inheritable(number, True)
    os.close(number)
    for name, number, errors in (("stdout", 1, "replace"), ("stderr", 2, "backslashreplace")):
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        buffer = io.BufferedWriter(_Stream(number, "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=True))


def lost_output() -> int:
    """1 if standard output goes to a disk that is full."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return int(getattr(raw, "disk_full", False))


def shortened(text: str, longest: int) -> str:
    """`text` in at most `longest` bytes of UTF-8; a longer one ends in a hash of it."""
    if len(text.encode()) <= longest:
        return text
    head = text.encode()[: longest - 20].decode(errors="ignore")
    return f"{head}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
