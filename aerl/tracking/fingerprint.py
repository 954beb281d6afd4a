"""What identifies prepared data: its settings, the files they name and the code that reads them.

Neither torch nor numpy is imported: a finished run checks in a moment that its data is still the same.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FORMAT = 2  # of the prepared folder; raise it when the same settings would give other files


def fingerprint(identity: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that change with the settings, and with any change of a file that they name.

    `identity` is the source (its `_target_` and keyword arguments, in JSON's types), `recipe` its further
    preparation (size, channels, val_fraction, split_seed). Raises OSError for a file that cannot be read.
    """
    named = {key: value for key, value in identity.items() if isinstance(value, str)}
    files = {key: _files(Path(value).expanduser()) for key, value in named.items() if _is_path(key, value)}
    places = {key: str(Path(named[key]).expanduser().resolve()) for key in files}
    content = [FORMAT, {**identity, **places}, files, dict(recipe), _code(named.get("_target_", ""))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _is_path(key: str, value: str) -> bool:
    return (key == "path" or os.sep in value) and Path(value).expanduser().exists()


def _files(place: Path) -> list[list[Any]]:
    if not place.is_dir():
        return [[place.name, *stamp(place)]]
    seen = (Path(entry.path) for entry in walk(place) if not is_hidden(entry.name))
    return [[str(file.relative_to(place)), *(stamp(file) if file.exists() else [])] for file in seen]


def _code(target: str) -> str | None:
    """The SHA-256 of the module of a source that is not aerl's own."""
    module = target.rpartition(".")[0]
    if not module or module.startswith("aerl."):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a class in a module, or nothing: the source's own error says so
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def stamp(file: Path) -> list[int]:
    """What the file system notes about a file's content: it differs as soon as anybody has written to it.

    A program can set the size and the time of the last write back, but not the time of the last change.
    """
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def is_hidden(name: str) -> bool:
    """Names that other programs hide (.ipynb_checkpoints, __MACOSX): the rule of the `datasets` library."""
    return name.startswith((".", "__"))


def walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator["os.DirEntry[str]"]:
    """All files below a folder, and what cannot or must not be entered, in the order of the names.

    Links are followed, except those back to a folder on the way or one of `above`; hidden folders are not
    entered. Raises OSError for a folder that cannot be read.
    """
    above = (*above, folder)
    with os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        loop = entry.is_symlink() and os.path.realpath(entry) in map(os.path.realpath, above)
        if entry.is_dir() and not is_hidden(entry.name) and not loop:
            yield from walk(Path(entry.path), above)
        else:
            yield entry
