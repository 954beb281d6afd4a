"""What a run reads, by content: the part of its identity that its configuration only names.

A name may come to mean something else: a run that is trained again, a file of weights that is replaced, data that
change, an attack whose code is edited. So a run records a digest of each, and does not go on with another.
"""

import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aerl.config.schema import Config
from aerl.hub import local
from aerl.runtime.files import sha256
from aerl.tracking.fingerprint import fingerprint
from aerl.types import UserError

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


DATA_KEY = "the files of the dataset"  # a change of them alone is no change: they may give the same data


def files(config: Config) -> dict[str, str]:
    """The digest of every run and file that the configuration names, by its key.

    Of a run its weights count, in a comparison its outcomes. One that is not there has the digest "missing".
    """
    parts: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "attack": config.attack,
        "metric": config.metric,
        "analysis": config.analysis,
    }
    parts |= {"model.net": config.model.net, "trainer": config.trainer and config.trainer.model_dump()}
    found = {}
    for key, value in _texts(parts):
        if (digest := _digest(key, value)) is not None:
            found[f"{key}={value}"] = digest
    return found


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts in nested containers by their dotted keys, those that name code apart."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name != "_target_":
                yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, key)
    elif isinstance(node, str):
        yield key, node


def _digest(key: str, value: str) -> str | None:
    names_a_run = key == "checkpoint" or key.rpartition(".")[2] in ("runs", "sources")
    if value == "own" or not (names_a_run or value.startswith("hf://") or "/" in value or Path(value).suffix):
        return None
    try:
        path = local(value, key)
    except UserError:
        return "missing"
    if path.is_dir():
        inside = ["checkpoints/best.pt", "model.safetensors"]
        inside = ["outcomes.npz"] if key == "analysis.compare.runs" else inside
        path = next((path / name for name in inside if (path / name).is_file()), path)
    if path.is_file():
        return sha256(path)
    return "missing" if names_a_run else None


def code(config: Config) -> dict[str, str]:
    """What the code of the attacks, models and other targets is that are neither aerl's nor torch's; all are imported.

    Of an installed package its version; else the SHA-256 of each loaded file, by its path below the folder in which
    Python found it, of the modules that the configuration names and of what was imported from beside them.
    """
    names = {name.rpartition(".")[0] for name in _targets(config.model_dump(exclude={"trainer": {"optimizer"}}))}
    found: dict[str, str] = {}
    folders: set[str] = set()
    for name in names:
        top, place = name.partition(".")[0], _place(name)
        if place is None or top in ("aerl", "torch"):
            continue
        if place[0].startswith(_INSTALLED):
            packages = importlib.metadata.packages_distributions().get(top, [])
            found |= {f"package {package}": importlib.metadata.version(package) for package in packages}
        else:
            folders.add(place[0])
    for name in list(sys.modules):
        if folders and name.partition(".")[0] not in ("aerl", "__main__") and (place := _place(name)):
            folder, file = place
            if folder in folders:
                found[f"code {file}"] = sha256(Path(folder, file))
    return dict(sorted(found.items()))


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name == "_target_":
                yield str(value)
            else:
                yield from _targets(value)


def _place(name: str) -> tuple[str, str] | None:
    """Of a loaded module the folder in which Python found it, and its file below that; None if it has no file."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file or not file.endswith(".py"):
        return None
    below = name.replace(".", "/") + ("/__init__.py" if file.endswith("__init__.py") else ".py")
    return (file.removesuffix(below).rstrip("/") or "/", below) if file.endswith(below) else None


def changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """In words, the first input that is another one now; None where all are the same."""
    for key, digest in now.items():
        if key != DATA_KEY and recorded.get(key, digest) != digest and digest != "missing":
            return f"{key} has changed: it was {recorded[key][:12]}, and is {digest[:12]} now"
    return None


def now(recorded: Mapping[str, str], config: Config) -> dict[str, str]:
    """The inputs that can be looked at without torch, as they are now; what is gone is "missing"."""
    found = files(config)
    found[DATA_KEY] = data_key(config)
    if recorded.get(DATA_KEY) != found[DATA_KEY] and _gone(config.dataset.path):
        found[DATA_KEY] = "missing"
    for key in recorded:
        kind, _, name = key.partition(" ")
        if kind == "code":
            places = (Path(folder or ".", name) for folder in sys.path)
            path = next((place for place in places if place.is_file()), None)
            found[key] = sha256(path) if path else "missing"
        elif kind == "package":
            try:
                found[key] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[key] = "missing"
    return found


def _gone(path: str | None) -> bool:
    return path is not None and not Path(path).expanduser().exists()


def data_key(config: Config) -> str:
    """By what the prepared data are found. Other files may give the same data: their own digest decides."""
    dataset = config.dataset
    recipe = dataset.model_dump(include={"size", "channels", "val_fraction", "split_seed"})
    try:
        return fingerprint(dataset.source, recipe)
    except OSError:
        return "missing"
