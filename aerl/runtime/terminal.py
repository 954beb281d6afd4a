"""The terminal of every command: streams that never raise, errors in one line, exit codes. Standard library only."""

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
    """Decorates the main function of `python -m aerl...`; it takes the words of a command line, by default sys.argv's.

    Returns its exit code: 1 also after an exception, which is one line, and where the output is lost; 130 after Ctrl-C.
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
                print_error(_line(error))
            return 1
        return code or lost_output()

    return run


def full_error() -> bool:
    """Whether the user wants tracebacks."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _line(error: Exception) -> str:
    from aerl.types import UserError, first_line

    if isinstance(error, UserError):
        return str(error)
    return memory_line(error) or f"{type(error).__name__}: {first_line(error)}; HYDRA_FULL_ERROR=1 shows all of it"


def memory_line(error: BaseException | None) -> str | None:
    """One line where the main memory, or a limit on it, was in the way; None for any other error."""
    pattern = r"(can't|cannot) (allocate memory|start new thread)|failed to map segment|not enough memory|bad_alloc"
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or re.search(pattern, text, re.IGNORECASE):
            reason = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
            return f"the machine's memory, or a limit on it (ulimit -v), is used up: {reason[:300]}"
        error = error.__cause__ or error.__context__
    return None


def print_error(text: str) -> None:
    """`error: ...` on standard error: one line of a bounded length, without control characters."""
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """`text` in one line that a terminal can show; what is too long is cut in its middle."""
    line = " ".join(_shortened(word, _LONGEST_WORD) for word in text.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return _shortened(line, _LONGEST_LINE)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 4 :]}"


def override_word(key: str, value: object) -> str:
    """`key=value` for launch.py, quoted for Hydra and for the shell where one of them needs that."""
    text = str(value)
    if re.fullmatch(r"[\w./@+:-]+", text, re.ASCII):
        return f"{key}={text}"
    text = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + (match[2] and "\\'"), text)  # for Hydra
    return '"' + re.sub(r'(["$`\\])', r"\\\1", f"{key}='{text}'") + '"'


class _Stream(io.FileIO):
    """A standard stream that may go away (a closed pipe, a full disk) without ending what writes to it."""

    refused: int | None = None  # errno of the first failure

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.refused = self.refused or error.errno
            return memoryview(data).nbytes


def protect_streams() -> None:
    """Make standard output and error streams that never raise, whatever becomes of their other end.

    A closed one becomes /dev/null: the next file opened would otherwise get its number, and what libraries print.
    What the terminal's encoding lacks is printed as a question mark, or on standard error as an escape.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, number, errors in (("stdout", 1, "replace"), ("stderr", 2, "backslashreplace")):
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        buffer = io.BufferedWriter(_Stream(number, "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=True))


def lost_output() -> int:
    """1 where something printed did not get to where it should, for another reason than a reader who has left."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        refused = getattr(getattr(getattr(stream, "buffer", None), "raw", None), "refused", None)
        if refused not in (None, errno.EPIPE, errno.EIO):
            print_error(f"cannot write {name}: {os.strerror(refused)}")
            return 1
    return 0
