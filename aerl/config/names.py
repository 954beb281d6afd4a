"""What identifies a run: its hash, its folder, and its difference from another run."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aerl.errors import short
from aerl.runtime.terminal import shortened
from aerl.tracking.results import read_config

if TYPE_CHECKING:
    from aerl.config.schema import Config  # pydantic's import is slow, and --help does without it

# Keys that change where a run is stored or how it is reported, never its numbers.
NOT_IDENTITY = ("runs_dir", "data_dir", "name", "overwrite", "prepare_data_only", "logger")
# Overrides that the rest of the path shows.
_IN_THE_PATH = ("dataset", "model", "trainer", "seed", "multirun_sweeps")


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_IDENTITY}


def config_hash(config: "Config") -> str:
    """Equal for two configurations if and only if they mean the same run."""
    text = json.dumps(_identity(config.model_dump()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(config: "Config", folder: Path) -> str:
    """The first two keys in which the configuration of a run folder differs from this one, as text."""
    differing = list(differences(config, folder).items())
    shown = [f"{key} is {short(there)} there, {short(here)} here" for key, (there, here) in differing[:2]]
    return "; ".join([*shown, f"{len(differing) - 2} more"] if len(differing) > 2 else shown)


def differences(config: "Config", folder: Path) -> dict[str, tuple[Any, Any]]:
    """The keys in which the configuration of a run folder differs from this one, with both values: there, here."""
    there, here = (dict(leaves(_identity(settings))) for settings in (read_config(folder), config.model_dump()))
    keys = (key for key in here | there if here.get(key) != there.get(key))
    return {key: (there.get(key), here.get(key)) for key in keys}


def leaves(node: Any, key: str = "", *, lists: bool = False) -> Iterator[tuple[str, Any]]:
    """The values in nested dictionaries by their dotted keys; with `lists` each item of a list by the list's key."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name), lists=lists)
    elif lists and isinstance(node, list):
        for value in node:
            yield from leaves(value, key, lists=lists)
    else:
        yield key, node


def run_folder(root: Path, config: "Config", overrides: Collection[str]) -> Path:
    """The folder of a run: `root`/dataset/model/trainer/other overrides/seed, or its `name`."""
    if config.name:
        return root / config.name
    words, last = distinguishing_overrides(overrides), f"seed{config.seed}"
    return _existing(*(root / _place(config) / name(words) / last for name in (_file_name, _early_name)))


def group_name(config: "Config", overrides: Collection[str]) -> str:
    """What a run has in common with its repetitions: its path without its seed and those of the runs it names."""
    words = distinguishing_overrides([re.sub(r"\bseed\d+\b", "seed", word) for word in overrides])
    return f"{_place(config)}/{_file_name(words)}"


def _place(config: "Config") -> str:
    return f"{config.dataset.name}/{config.model.name}/{config.trainer_name}"


def distinguishing_overrides(overrides: Collection[str]) -> list[str]:
    """The overrides in which a run differs from others of the same dataset, model, trainer and seed."""
    words = sorted(override.lstrip("+~") for override in overrides)
    return [word for word in words if word.partition("=")[0] not in _IN_THE_PATH and _is_identity(word)]


def sweep_folder(root: Path, overrides: Collection[str]) -> Path:
    """The folder of a multirun."""
    words = list(filter(_is_identity, sorted(overrides)))
    return _existing(*(root / "multirun" / name(words) for name in (_file_name, _early_name)))


def _existing(folder: Path, early: Path) -> Path:
    """The folder, or the one of an early version."""
    return early if early.is_dir() and not folder.is_dir() else folder


def _is_identity(override: str) -> bool:
    return re.split(r"[=.]", override.lstrip("+~"))[0] not in NOT_IDENTITY


def _file_name(words: Iterable[str]) -> str:
    """key-value+key-value: a path that Hydra reads as it is, in any override."""
    parts = (re.sub(r"[\[\]{}'\"]", "", word.replace("=", "-", 1)) for word in words)
    parts = (re.sub(r"[^\w.-]+", "_", part).strip("_") for part in parts)
    return shortened("+".join(parts), 120) or "default"  # file systems end at 255


def _early_name(words: Iterable[str]) -> str:
    """As up to November 2026: with commas and equals signs."""
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(words)).strip("_,")
    return shortened(name, 120) or "default"  # file systems end at 255
