"""What identifies a run: its hash, its folder, and its difference from another run."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aerl.config.errors import short
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
    """The first two keys in which the configuration of a run folder differs from this one."""
    there, here = (dict(leaves(_identity(settings))) for settings in (read_config(folder), config.model_dump()))
    keys = [key for key in here | there if here.get(key) != there.get(key)]
    shown = [f"{key} is {short(there.get(key))} there, {short(here.get(key))} here" for key in keys[:2]]
    return "; ".join([*shown, f"{len(keys) - 2} more"] if len(keys) > 2 else shown)


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


def run_name(config: "Config", overrides: Collection[str]) -> str:
    """The run folder below `runs_dir`: dataset/model/trainer/other overrides/seed, or its `name`."""
    return config.name or f"{_path(config, overrides)}/seed{config.seed}"


def group_name(config: "Config", overrides: Collection[str]) -> str:
    """What a run has in common with its repetitions: its path without its seed and those of the runs it names."""
    return _path(config, [re.sub(r"\bseed\d+\b", "seed", word) for word in overrides])


def _path(config: "Config", overrides: Collection[str]) -> str:
    name = _file_name(distinguishing_overrides(overrides))
    return f"{config.dataset.name}/{config.model.name}/{config.trainer_name}/{name}"


def distinguishing_overrides(overrides: Collection[str]) -> list[str]:
    """The overrides in which a run differs from others of the same dataset, model, trainer and seed."""
    words = sorted(override.lstrip("+~") for override in overrides)
    return [word for word in words if word.partition("=")[0] not in _IN_THE_PATH and _is_identity(word)]


def sweep_name(overrides: Collection[str]) -> str:
    """The folder of a multirun below `runs_dir`."""
    return f"multirun/{_file_name(filter(_is_identity, sorted(overrides)))}"


def _is_identity(override: str) -> bool:
    return re.split(r"[=.]", override.lstrip("+~"))[0] not in NOT_IDENTITY


def _file_name(words: Iterable[str]) -> str:
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(words)).strip("_,")
    return shortened(name, 120) or "default"  # file systems end at 255
