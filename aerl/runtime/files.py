"""Files that are complete or absent, with digests of their content; disk errors in one line."""

import contextlib
import csv
import fcntl
import glob
import hashlib
import io
import json
import logging
import math
import os
import secrets
import socket
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from aerl.errors import UserError, first_line

log = logging.getLogger("aerl")

CHANGED = "was changed or damaged since aerl wrote it"

_STALE_SECONDS = 3600.0  # after which a temporary file is that of a killed process
_MAX_BYTES, _MAX_DEPTH = 8_000_000, 100  # of a JSON or YAML file
_LOCK_SECONDS = 60.0


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report a failure of the disk as a UserError, also if a library has wrapped it in an error of its own."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or first_line(cause)}") from error


def atomic_write(path: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Replace the file at `path`: after a crash at any moment it has the complete old content or the new.

    `content` is bytes, text (stored as UTF-8) or a function that writes to a binary file. Raises UserError for a
    failure of the disk; no temporary file remains.
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
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                stale.unlink()


def plain(value: Any) -> Any:
    """`value` for JSON: arrays become lists, paths text, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and torch, without importing them
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; see `plain`."""
    atomic_write(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, path: Path) -> Path:
    """`path`, if it is in `folder` after all links are followed, so that a foreign folder cannot point elsewhere.

    `folder` itself may be a link; a snapshot in the Hugging Face cache links to the blobs next to it. Raises UserError
    otherwise, also for a broken link.
    """
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        target = path.resolve(strict=path.is_symlink())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: is a link that leads nowhere ({first_line(error)})") from error
    if not any(target.is_relative_to(place) for place in homes):
        raise UserError(f"{path}: is a link to {target}, outside {folder}; replace it by a copy if you trust it")
    return path


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError if it cannot be read: missing, too large, nested too deeply, damaged."""
    with _reading(path) as text:
        return json.loads(text)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file without aliases and objects; UserError as for `read_json`."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if it was built
    with _reading(path) as text:
        depth = 0
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:  # the C loader would crash
                raise RecursionError
            if isinstance(event, yaml.AliasEvent):  # with which a few lines can mean gigabytes
                raise ValueError("aliases (*) are not supported; write the values out")
        return yaml.load(text, loader)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[str]:
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= _MAX_BYTES):
            raise ValueError(f"is not a file of at most {_MAX_BYTES:,} bytes")
        yield path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from error
    except RecursionError:
        raise UserError(f"cannot read {path}: is nested too deeply") from None
    except Exception as error:  # a damaged date or number makes the YAML reader raise any exception of Python's
        reason = getattr(error, "problem", None) or first_line(error)  # YAML's first line is only "while parsing"
        raise UserError(f"cannot read {path}: {reason}") from error


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table atomically, with the names of the columns in its first line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    atomic_write(path, text.getvalue())


def save_arrays(path: Path, arrays: Mapping[str, Any], *, compressed: bool = False) -> None:
    """Write an .npz atomically, with a digest of its content that `load_arrays` checks."""
    import numpy as np

    content = io.BytesIO()
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    (np.savez_compressed if compressed else np.savez)(content, **arrays)
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = _digest(arrays)
    atomic_write(path, content.getvalue())


def load_arrays(path: Path, *, sealed: bool = True) -> dict[str, Any]:
    """The arrays of an .npz by name; {} if there is no such file.

    Raises UserError if the file is damaged or was changed; without `sealed`, it need not have a digest.
    """
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
            arrays, comment = {name: file[name] for name in file.files}, archive.comment
    except FileNotFoundError:
        return {}
    except Exception as error:  # zipfile and NumPy raise many kinds for a damaged file
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    if (sealed or comment) and comment != _digest(arrays):
        raise UserError(f"{path}: {CHANGED}")
    return arrays


def _digest(arrays: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return b"sha256:" + digest.hexdigest().encode()


@contextlib.contextmanager
def locked(folder: Path, check: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Keep other processes out of a folder, which is created; wait for one that holds it.

    `check` is called while waiting, and may raise. Raises UserError with the holder's name after 60 s. The kernel
    releases the lock however its process ends.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        began, holder = time.monotonic(), try_lock(file, folder)
        if holder:
            log.info("waiting for %s: in use by %s", folder, holder)
        while holder:
            if time.monotonic() - began > _LOCK_SECONDS:
                raise UserError(f"run folder {folder}: in use by {holder}; wait for it or stop it")
            check()
            time.sleep(0.2)
            holder = try_lock(file, folder)
        yield
    finally:
        os.close(file)


def try_lock(file: int, folder: Path) -> str:
    """Lock the open `file` in `folder`, or return the name of the process that holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        return os.pread(file, 1000, 0).decode(errors="replace") or "another process"
    except OSError as error:  # a full disk, or a network file system without locks
        log.warning("%s: the lock may not work (%s); start no second process", folder, error.strerror)
    return ""
