"""Files that are whole or absent, sealed against damage, and disks that refuse, in one line."""

import contextlib
import csv
import errno
import fcntl
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
_STALE_SECONDS = 3600.0
_TEXT_BYTES = 8_000_000
_LOCK_SECONDS = 60.0  # a process that is being killed, and holds the lock meanwhile, is waited for so long
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_DEPTH = 100


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
    _settle(path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, path: Path) -> Path:
    """`path`, if it lies in `folder` with all links followed: what others made reads nothing but their own.

    The folder itself may be reached through links, and a snapshot in the Hugging Face cache consists of links
    to the blobs beside it. Raises UserError otherwise, also for a link that leads in circles.
    """
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        target = path.resolve()
        target.lstat() if path.is_symlink() else None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: is a link that leads nowhere ({first_line(error)})") from error
    if not any(target.is_relative_to(place) for place in homes):
        raise UserError(f"{path}: is a link out of {folder}, to {target}; put a copy in its place if you trust it")
    return path


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError for whatever cannot be read: missing, too large, too deep, damaged."""
    with _reading(path):
        value = json.loads(_text(path))
        level = [value]
        for _ in range(_DEPTH):
            branches = [
                node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))
            ]
            level = [child for branch in branches for child in branch]
        if level:
            raise RecursionError
        return value


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, no aliases, which can make a few lines mean gigabytes.

    Raises UserError for whatever cannot be read: missing, too large, too deep, damaged.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
    with _reading(path):
        text, depth = _text(path), 0
        for event in yaml.parse(text, loader):  # the C loader would crash on what is nested too deep
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH:
                raise RecursionError
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases (*), which are not read; write the values out")
        return yaml.load(text, loader)


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("is not a file")
    with path.open("rb") as file:
        content = file.read(_TEXT_BYTES + 1)
    if len(content) > _TEXT_BYTES:
        raise ValueError(f"is larger than {_TEXT_BYTES:,} bytes")
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
    """Write an .npz atomically, with a seal over its content that `load_arrays` checks."""
    import numpy as np

    content = io.BytesIO()
    kept = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(content, **kept)  # type: ignore[arg-type]
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = _seal(kept)
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
    if (sealed or comment) and comment != _seal(arrays):
        raise UserError(f"{path}: is not as aerl wrote it: it was changed, or is damaged")
    return arrays


def _seal(arrays: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return b"sha256:" + digest.hexdigest().encode()


def _is(path: Path, file: int) -> bool:
    """Whether the open `file` is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(folder: Path, check: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Keep other processes out of a folder, which is made; one that holds it already is waited for.

    `check` is called while waiting, and may raise. Raises UserError with the holder's name after 60 s. The lock is the
    kernel's: it ends with its process, however that ends. A file system without locks keeps nobody out: that is logged.
    """
    path = folder / ".lock"
    deadline, waiting = time.monotonic() + _LOCK_SECONDS, False
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, file):
                break
            os.close(file)  # its holder has removed it meanwhile
            continue
        except BlockingIOError:
            holder = os.read(file, 1000).decode(errors="replace") or "another process"
            os.close(file)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                raise UserError(f"cannot lock {path}: {error.strerror}") from error
            log.warning("%s: its file system has no locks; start no second process on it", folder)
            break
        if time.monotonic() > deadline:
            raise UserError(f"run folder {folder}: {holder} is at work in it; wait for it, or stop it")
        if not waiting:
            log.info("waiting up to %.0f s: %s is at work in %s", _LOCK_SECONDS, holder, folder)
            waiting = True
        check()
        time.sleep(0.2)
    try:
        with contextlib.suppress(OSError):  # a full disk: the name is for the reader alone
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            folder.rmdir()  # if nothing else was written
        os.close(file)


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
