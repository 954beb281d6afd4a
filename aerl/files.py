"""Files that are whole or absent, and disks that refuse told in one line."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from aerl.types import UserError, first_line

_REMEDIES = {
    errno.ENOSPC: "; free some space and repeat the command",
    errno.EDQUOT: "; free some of the quota and repeat the command",
    errno.EFBIG: "; raise the limit on file sizes and repeat the command",
    errno.EACCES: "; choose a folder that you may write to",
    errno.EROFS: "; choose a folder that can be written to",
}
_STALE_SECONDS = 3600.0


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell a failure of the disk in one line, also when a library has wrapped it in an error of its own."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        reason = cause.strerror or str(cause) or type(cause).__name__
        raise UserError(f"cannot write {path}: {reason}{_REMEDIES.get(cause.errno or 0, '')}") from error


def atomic_write(path: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Replace the file at `path`: after a crash at any moment there is the old content or the new, whole.

    `content` is bytes, text (stored as UTF-8) or a function that writes to the binary file it is given.
    Raises UserError where the disk refuses (full, read-only, no such folder); no temporary file remains.
    """
    path = Path(path)
    # The process id keeps two processes that fill the same cache from writing into each other's file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _settle(path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table atomically, its first line the names of the columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    atomic_write(path, text.getvalue())


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz atomically."""
    import numpy as np

    atomic_write(path, lambda file: np.savez(file, **arrays))


def load_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an .npz by name; none where there is no such file. UserError for a file that is damaged."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _settle(path: Path) -> None:
    """Make the renaming durable, and clear away what killed processes left of earlier attempts."""
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder, and none must be swept
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        for sibling in path.parent.iterdir():
            ours = sibling.name.startswith(f".{path.name}.") and sibling.name.endswith(".tmp")
            if ours and time.time() - sibling.stat().st_mtime > _STALE_SECONDS:
                sibling.unlink()
