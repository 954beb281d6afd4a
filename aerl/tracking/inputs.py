"""What a run reads, by content: the part of its identity that its configuration only names.

A name may come to mean something else: a run that is trained again, a file of weights that is replaced, data that
change, an attack whose code is edited. So a run records a digest of each, and does not resume with another. A finished
run checks them without torch or NumPy.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aerl.errors import UserError
from aerl.runtime import ddp
from aerl.runtime.files import sha256

if TYPE_CHECKING:
    from torch.nn import Module

    from aerl.config.schema import Config

log = logging.getLogger("aerl")

FORMAT = 2  # of the prepared data; raise it when the same settings would give other files
MISSING = "missing"  # the digest of what no longer exists
DATA_KEY = "the files of the dataset"  # other files may give the same data, whose own digest decides
# What analyses read of other runs, where it is not their weights
_FROM_OUTCOMES = ("compare", "conditions", "worst_case", "entropy", "confusion", "norms", "pictures", "planted")
_READ = {f"analysis.{name}.runs": "outcomes.npz" for name in _FROM_OUTCOMES}
_READ |= {f"analysis.{name}.runs": f"tables/{name}.csv" for name in ("distance", "masking")}
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def read(config: "Config", data: str, model: "Module") -> dict[str, str]:
    """The digests of everything that a run reads; `data` is that of its prepared data."""
    from aerl.training.checkpoint import digest

    weights = {"weights": digest(model.state_dict())} if config.checkpoint == "own" else {}
    dataset = {f"dataset={config.dataset.name}": data, DATA_KEY: _data_files(config)}
    return files(config) | code(config) | weights | dataset


def check(folder: Path, recorded: Mapping[str, str], now: Mapping[str, str]) -> None:
    """UserError if an input of the run in `folder` has changed."""
    for key, digest in now.items():
        if key != DATA_KEY and digest not in (MISSING, recorded.get(key, digest)):
            raise UserError(
                f"run folder {folder}: {key} has changed: it was {recorded[key][:12]}, and is {digest[:12]} now; "
                "use name=NAME to keep both, overwrite=true to start again"
            )


def are_same(folder: Path, config: "Config", summary: Mapping[str, Any]) -> bool:
    """Whether the inputs of a finished run are unchanged; False if only the loaded data or weights can show it.

    Raises UserError if an input has changed. One that no longer exists is a warning.
    """
    recorded = summary.get("inputs") or {}
    found = ddp.broadcast_from_main(lambda: now(recorded, config))
    check(folder, recorded, found)
    for key in sorted(key for key, digest in found.items() if digest == MISSING):
        log.warning("%s no longer exists; these numbers were measured with it", key)
    return config.checkpoint != "own" and found[DATA_KEY] in (MISSING, recorded.get(DATA_KEY, found[DATA_KEY]))


def now(recorded: Mapping[str, str], config: "Config") -> dict[str, str]:
    """The present digests of those inputs that can be read without torch."""
    found = files(config) | {DATA_KEY: _data_files(config)}
    path = config.dataset.path
    if recorded.get(DATA_KEY) != found[DATA_KEY] and path is not None and not Path(path).expanduser().exists():
        found[DATA_KEY] = MISSING
    for key in recorded:
        kind, _, name = key.partition(" ")
        if kind == "code":
            paths = [Path(folder or ".", name) for folder in sys.path]
            found[key] = next((sha256(path) for path in paths if path.is_file()), MISSING)
        elif kind == "package":
            found[key] = MISSING
            with contextlib.suppress(PackageNotFoundError):
                found[key] = version(name)
    return found


def files(config: "Config") -> dict[str, str]:
    """The digest of every run and file that the configuration names, by key. Of a run that is its weights, or what an
    analysis reads of it instead."""
    from aerl.config.names import leaves

    parts = config.model_dump(include={"checkpoint", "attack", "metric", "analysis", "trainer"})
    parts["model"] = {"net": config.model.net}
    named = [(key, value) for key, value in leaves(parts, lists=True) if isinstance(value, str)]
    digests = {f"{key}={value}": _digest(key, value) for key, value in named if not key.endswith("_target_")}
    return {key: digest for key, digest in digests.items() if digest is not None}


def _digest(key: str, value: str) -> str | None:
    from aerl.runtime.paths import local

    names_a_run = key == "checkpoint" or key.endswith((".runs", ".sources"))
    if value == "own" or not (names_a_run or value.startswith("hf://") or "/" in value or Path(value).suffix):
        return None
    try:
        path = local(value, key)
    except UserError:
        return MISSING
    if path.is_dir():
        names = [_READ[key]] if key in _READ else ["checkpoints/best.pt", "model.safetensors"]
        path = next((path / name for name in names if (path / name).is_file()), path)
    if path.is_file():
        return sha256(path)
    return MISSING if names_a_run else None


def code(config: "Config") -> dict[str, str]:
    """The code of targets that are neither aerl's nor torch's, all of which are imported.

    Of an installed package the version; else the SHA-256 of each loaded file in the folder in which Python found it.
    """
    from aerl.config.names import leaves

    dump = config.model_dump(exclude={"trainer": {"optimizer"}})
    found: dict[str, str] = {}
    folders: set[str] = set()
    for name in {str(value).rpartition(".")[0] for key, value in leaves(dump) if key.endswith("_target_")}:
        top, place = name.partition(".")[0], _place(name)
        if place is None or top in ("aerl", "torch"):
            continue
        if place[0].startswith(_INSTALLED):
            found |= {f"package {package}": version(package) for package in packages_distributions().get(top, [])}
        else:
            folders.add(place[0])
    places = [_place(name) for name in list(sys.modules) if name.partition(".")[0] not in ("aerl", "__main__")]
    found |= {f"code {place[1]}": sha256(Path(*place)) for place in places if place and place[0] in folders}
    return dict(sorted(found.items()))


def _place(name: str) -> tuple[str, str] | None:
    """Of a loaded module, the folder in which Python found it, and its file below that; None if it has no file."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    for below in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"):
        if file.endswith(f"/{below}"):
            return file.removesuffix(below).rstrip("/") or "/", below
    return None


def _data_files(config: "Config") -> str:
    recipe = config.dataset.model_dump(include={"size", "channels", "val_fraction", "split_seed"})
    try:
        return fingerprint(config.dataset.source, recipe)
    except OSError:
        return MISSING


def fingerprint(source: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that change with the settings of a dataset, and with any file that they name.

    `source` is its `_target_` and arguments, `recipe` its preparation (size, channels, val_fraction, split_seed).
    Raises OSError for a file that cannot be read.
    """
    named = {key: Path(value).expanduser() for key, value in source.items() if isinstance(value, str)}
    paths = {key: path for key, path in named.items() if (key == "path" or os.sep in source[key]) and path.exists()}
    stamps = {key: _stamps(path) for key, path in paths.items()}
    places = {key: str(path.resolve()) for key, path in paths.items()}
    content = [FORMAT, {**source, **places}, stamps, dict(recipe), _source_code(source.get("_target_", ""))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _stamps(place: Path) -> list[list[Any]]:
    if not place.is_dir():
        return [[place.name, *stamp(place)]]
    seen = (Path(entry.path) for entry in walk(place) if not is_hidden(entry.name))
    return [[str(file.relative_to(place)), *(stamp(file) if file.exists() else [])] for file in seen]


def _source_code(target: str) -> str | None:
    """The SHA-256 of the module of a source that is not aerl's own; None if it cannot be found."""
    module, origin = target.rpartition(".")[0], None
    with contextlib.suppress(ImportError, ValueError):  # the source's own error reports it
        if module and not module.startswith("aerl.") and (spec := importlib.util.find_spec(module)):
            origin = spec.origin
    return sha256(Path(origin)) if origin and Path(origin).is_file() else None


def stamp(file: Path) -> list[int]:
    """Size, times and inode: they differ as soon as anybody has written to the file.

    A program can set the size and the time of the last write back, but not the time of the last change.
    """
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def is_hidden(name: str) -> bool:
    """Names that other programs hide (.ipynb_checkpoints, __MACOSX): the rule of the `datasets` library."""
    return name.startswith((".", "__"))


def walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator["os.DirEntry[str]"]:
    """All files below a folder, in the order of their names. Hidden folders are listed but not entered.

    Links are followed, except those back to a folder on the way. Raises OSError for a folder that cannot be read.
    """
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        if entry.is_dir() and not is_hidden(entry.name) and os.path.realpath(entry) not in above:
            yield from walk(Path(entry.path), above)
        else:
            yield entry
