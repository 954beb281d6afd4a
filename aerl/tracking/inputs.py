"""What a run reads, by content: the part of its identity that its configuration only names.

A name may come to mean something else: a run that is trained again, a file of weights that is replaced, data that
change, an attack whose code is edited. So a run records a digest of each, and does not go on with another.
"""

import importlib.metadata
import logging
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aerl.config.names import leaves
from aerl.config.schema import Config
from aerl.hub import local
from aerl.runtime import ddp
from aerl.runtime.files import sha256
from aerl.tracking.fingerprint import fingerprint
from aerl.types import UserError

if TYPE_CHECKING:
    from torch.nn import Module

log = logging.getLogger("aerl")

DATA_KEY = "the files of the dataset"  # a change of them alone is no change: they may give the same data
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def read(config: Config, data: str, model: "Module") -> dict[str, str]:
    """The digests of all that a run reads; `data` is that of its prepared data."""
    from aerl.training.checkpoint import digest

    weights = {"weights": digest(model.state_dict())} if config.checkpoint == "own" else {}
    named = files(config) | code(config) | weights
    return named | {f"dataset={config.dataset.name}": data, DATA_KEY: data_key(config)}


def check(folder: Path, recorded: Mapping[str, str], now: Mapping[str, str]) -> None:
    """UserError where an input of the run in `folder` is another one now."""
    if difference := changed(recorded, now):
        raise UserError(f"run folder {folder}: {difference}; name=NAME keeps both, overwrite=true begins again")


def are_same(folder: Path, config: Config, summary: Mapping[str, Any]) -> bool:
    """Whether a finished run has read what is there now; False where only the data or the weights can say it.

    Raises UserError where an input has changed. What is gone is a warning: the numbers are still those of what it was.
    """
    recorded = summary.get("inputs") or {}
    found = ddp.broadcast_from_main(lambda: now(recorded, config))
    check(folder, recorded, found)
    for key in sorted(key for key, digest in found.items() if digest == "missing"):
        log.warning("%s is not there any more: these numbers are of what it was", key)
    return config.checkpoint != "own" and found[DATA_KEY] in ("missing", recorded.get(DATA_KEY, found[DATA_KEY]))


def files(config: Config) -> dict[str, str]:
    """The digest of every run and file that the configuration names, by its key; "missing" for one that is gone.

    Of a run its weights count, in a comparison its outcomes.
    """
    parts = config.model_dump(
        include={"checkpoint": True, "attack": True, "metric": True, "analysis": True, "trainer": True}
    )
    parts["model"] = {"net": config.model.net}
    named = [(key, value) for key, value in leaves(parts, lists=True) if isinstance(value, str)]
    digests = {f"{key}={value}": _digest(key, value) for key, value in named if not key.endswith("_target_")}
    return {key: digest for key, digest in digests.items() if digest is not None}


def _digest(key: str, value: str) -> str | None:
    names_a_run = key == "checkpoint" or key.endswith((".runs", ".sources"))
    if value == "own" or not (names_a_run or value.startswith("hf://") or "/" in value or Path(value).suffix):
        return None
    try:
        path = local(value, key)
    except UserError:
        return "missing"
    if path.is_dir():
        names = ["outcomes.npz"] if key == "analysis.compare.runs" else ["checkpoints/best.pt", "model.safetensors"]
        path = next((path / name for name in names if (path / name).is_file()), path)
    if path.is_file():
        return sha256(path)
    return "missing" if names_a_run else None


def code(config: Config) -> dict[str, str]:
    """The code of the attacks, models and other targets that is neither aerl's nor torch's; all are imported.

    Of an installed package its version; else the SHA-256 of each loaded file, by its path below the folder in which
    Python found it, of the modules that the configuration names and of what was imported from beside them.
    """
    dump = config.model_dump(exclude={"trainer": {"optimizer"}})
    modules = {str(value).rpartition(".")[0] for key, value in leaves(dump) if key.endswith("_target_")}
    found: dict[str, str] = {}
    folders: set[str] = set()
    for name in modules:
        top, place = name.partition(".")[0], _place(name)
        if place is None or top in ("aerl", "torch"):
            continue
        if place[0].startswith(_INSTALLED):
            packages = importlib.metadata.packages_distributions().get(top, [])
            found |= {f"package {package}": importlib.metadata.version(package) for package in packages}
        else:
            folders.add(place[0])
    beside = [_place(name) for name in list(sys.modules) if name.partition(".")[0] not in ("aerl", "__main__")]
    found |= {f"code {place[1]}": sha256(Path(*place)) for place in beside if place and place[0] in folders}
    return dict(sorted(found.items()))


def _place(name: str) -> tuple[str, str] | None:
    """Of a loaded module the folder in which Python found it, and its file below that; None if it has no file."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    for below in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"):
        if file.endswith(f"/{below}"):
            return file.removesuffix(below).rstrip("/") or "/", below
    return None


def changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """One line about the first input that is another one now; None where all are the same."""
    for key, digest in now.items():
        if key != DATA_KEY and recorded.get(key, digest) != digest and digest != "missing":
            return f"{key} has changed: it was {recorded[key][:12]}, and is {digest[:12]} now"
    return None


def now(recorded: Mapping[str, str], config: Config) -> dict[str, str]:
    """The inputs that can be looked at without torch, as they are now; what is gone is "missing"."""
    found = files(config) | {DATA_KEY: data_key(config)}
    path = config.dataset.path
    if recorded.get(DATA_KEY) != found[DATA_KEY] and path is not None and not Path(path).expanduser().exists():
        found[DATA_KEY] = "missing"
    for key in recorded:
        kind, _, name = key.partition(" ")
        if kind == "code":
            paths = [Path(folder or ".", name) for folder in sys.path]
            found[key] = next((sha256(path) for path in paths if path.is_file()), "missing")
        elif kind == "package":
            try:
                found[key] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[key] = "missing"
    return found


def data_key(config: Config) -> str:
    """By what the prepared data are found. Other files may give the same data: their own digest decides."""
    recipe = config.dataset.model_dump(include={"size", "channels", "val_fraction", "split_seed"})
    try:
        return fingerprint(config.dataset.source, recipe)
    except OSError:
        return "missing"
