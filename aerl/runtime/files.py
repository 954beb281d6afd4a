"""Files that are complete or absent, sealed by digests; a disk that refuses is one line."""

import contextlib
import csv
import errno
import fcntl
import glob
import hashlib
import io
import json
import logging
import os
import secrets
import socket
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from aerl.types import UserError, first_line

log = logging.getLogger("aerl")

_REMEDIES = {
    errno.ENOSPC: "; free some space and repeat the command",
    errno.EDQUOT: "; free some of the quota and repeat the command",
    errno.EFBIG: "; raise the limit on file sizes and repeat the command",
    errno.EACCES: "; choose a folder that you may write to",
    errno.EROFS: "; choose a folder that can be written to",
}
_STALE_SECONDS = 3600.0  # after which a temporary file is that of a killed process
_MAX_BYTES = 8_000_000  # of a JSON or YAML file
_MAX_DEPTH = 100
_LOCK_SECONDS = 60.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report a failure of the disk as a UserError, also where a library has wrapped it in an error of its own."""
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
    """Replace the file at `path`: after a crash at any moment there is the complete old content or the new.

    `content` is bytes, text (stored as UTF-8) or a function that writes to the binary file it is given.
    Raises UserError where the disk refuses; no temporary file remains.
    """
    path = Path(path)
    # Random, because two containers that share a disk may have the same process ids.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
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
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                stale.unlink()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, path: Path) -> Path:
    """`path`, if it lies in `folder` with all links followed, so that a foreign folder cannot point elsewhere.

    The folder itself may be reached through links; a snapshot in the Hugging Face cache consists of links to the blobs
    beside it. Raises UserError otherwise, also for a link that leads nowhere.
    """
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        target = path.resolve(strict=path.is_symlink())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: is a link that leads nowhere ({first_line(error)})") from error
    if not any(target.is_relative_to(place) for place in homes):
        raise UserError(f"{path}: is a link out of {folder}, to {target}; put a copy in its place if you trust it")
    return path


def read_json(path: Path) -> Any:
    """What a JSON file holds. UserError for whatever cannot be read: missing, too large, nested too deep, damaged."""
    with _reading(path):
        value = json.loads(_text(path))
        if _depth(value) > _MAX_DEPTH:
            raise RecursionError
        return value


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, children), default=0)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, no aliases, which can make a few lines mean gigabytes.

    Raises UserError for whatever cannot be read: missing, too large, nested too deep, damaged.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
    with _reading(path):
        text, depth = _text(path), 0
        for event in yaml.parse(text, loader):  # the C loader would crash on what is nested too deep
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise RecursionError
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases (*), which are not read; write the values out")
        return yaml.load(text, loader)


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("is not a file")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"is larger than {_MAX_BYTES:,} bytes")
    return content.decode()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from error
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deep") from None
    except Exception as error:  # the YAML reader raises whatever a damaged date or number makes Python raise
        reason = getattr(error, "problem", None) or first_line(error)  # YAML's first line is only "while parsing"
        raise UserError(f"cannot read {path}: {reason}") from error


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table atomically, its first line the names of the columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    atomic_write(path, text.getvalue())


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz atomically, with a digest of its content that `load_arrays` checks."""
    import numpy as np

    content = io.BytesIO()
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(content, **arrays)
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = _digest(arrays)
    atomic_write(path, content.getvalue())


def load_arrays(path: Path, *, sealed: bool = True) -> dict[str, Any]:
    """The arrays of an .npz by name; none where there is no such file.

    Raises UserError where the file is damaged or, if it must be `sealed`, is not as `save_arrays` wrote it.
    """
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
            arrays, comment = {name: file[name] for name in file.files}, archive.comment
    except FileNotFoundError:
        return {}
    except Exception as error:  # what a damaged file makes zipfile and NumPy raise depends on where it is damaged
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    if (sealed or comment) and comment != _digest(arrays):
        raise UserError(f"{path}: is not as aerl wrote it: it was changed, or is damaged")
    return arrays


def _digest(arrays: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return b"sha256:" + digest.hexdigest().encode()


@contextlib.contextmanager
def locked(folder: Path, check: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Keep other processes out of a folder, which is created; one that holds it is waited for.

    `check` is called while waiting, and may raise. Raises UserError with the holder's name after 60 s. The kernel frees
    the lock however its process ends. A file system without locks keeps nobody out: that is logged.
    """
    path = folder / ".lock"
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _acquire(file, folder, check)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):  # else its holder has removed it
                with contextlib.suppress(OSError):  # a full disk: the name is for the reader alone
                    os.truncate(file, 0)
                    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        path.unlink()
                        folder.rmdir()  # if nothing else was written
                return
        finally:
            os.close(file)


def _acquire(file: int, folder: Path, check: Callable[[], object]) -> None:
    deadline, waiting = time.monotonic() + _LOCK_SECONDS, False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"cannot lock {folder / '.lock'}: {error.strerror}") from error
            return log.warning("%s: its file system has no locks; start no second process on it", folder)
        if time.monotonic() > deadline:
            raise UserError(f"run folder {folder}: {holder} is at work in it; wait for it, or stop it")
        if not waiting:
            log.info("waiting up to %.0f s: %s is at work in %s", _LOCK_SECONDS, holder, folder)
            waiting = True
        check()
        time.sleep(0.2)
