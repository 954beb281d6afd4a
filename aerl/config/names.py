"""What identifies a run: its hash, its folder, and in what it differs from another."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aerl.config.errors import short
from aerl.config.schema import Config
from aerl.tracking.results import read_config
from aerl.types import UserError, shortened

# Keys that change where a run is kept or how fast it goes, never its numbers.
NOT_IDENTITY = ("runs_dir", "data_dir", "name", "overwrite", "prepare_data_only", "logger")
# Overrides that the rest of the path, or their own keys, show.
_NOT_IN_THE_NAME = ("dataset", "model", "trainer", "seed", "multirun_sweeps")
# Keys that came later, and the values that earlier runs had: those are still the same runs.
_LATER = {"evaluation.batch_size": None, "hardware.distributed": False}
_LONGEST_PATH = 4096 - 512  # bytes: Linux's limit, less room for the files in a run folder


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that determines a run's numbers."""
    return {
        name: {key: value for key, value in part.items() if _LATER.get(f"{name}.{key}", ...) != value}
        if isinstance(part, Mapping)
        else part
        for name, part in config.items()
        if name not in NOT_IDENTITY and (name, part) != ("metric", {})
    }


def config_hash(config: Config) -> str:
    """Equal for two configurations if and only if they mean the same run."""
    text = json.dumps(_identity(config.model_dump()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(config: Config, folder: Path) -> str:
    """The first two keys in which the configuration of a run folder differs from this one."""
    try:
        there = dict(leaves(_identity(read_config(folder))))
    except UserError as error:
        return str(error)
    here = dict(leaves(_identity(config.model_dump())))
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


def run_name(config: Config, overrides: Collection[str]) -> str:
    """Where under `runs_dir` a run is kept: dataset/model/trainer/other overrides/seed, or its `name`.

    The same command finds its own folder again. UserError for a path that is too long.
    """
    name = f"{group_name(config, overrides, seeds=True)}/seed{config.seed}" if config.name is None else config.name
    if len(os.fsencode(Path(config.runs_dir).expanduser().absolute() / name)) > _LONGEST_PATH:
        key, value = ("runs_dir", config.runs_dir) if config.name is None else ("name", config.name)
        raise UserError(f"{key}={short(value)}: the run folder's path would be longer than {_LONGEST_PATH} bytes")
    return name


def group_name(config: Config, overrides: Collection[str], *, seeds: bool = False) -> str:
    """What a run has in common with its repetitions: its name without its seed and those of the runs it names."""
    words = overrides if seeds else [re.sub(r"\bseed\d+\b", "seed", word) for word in overrides]
    name = _file_name(distinguishing_overrides(words))
    return f"{config.dataset.name}/{config.model.name}/{config.trainer_name}/{name}"


def distinguishing_overrides(overrides: Collection[str]) -> list[str]:
    """The overrides in which a run differs from others of the same dataset, model, trainer and seed."""
    words = sorted(override.lstrip("+~") for override in overrides)
    return [word for word in words if word.partition("=")[0] not in _NOT_IN_THE_NAME and _is_identity(word)]


def sweep_name(overrides: Collection[str]) -> str:
    """Where under `runs_dir` the table of a multirun is kept, so that the same command finds it again."""
    return f"multirun/{_file_name(filter(_is_identity, sorted(overrides)))}"


def _is_identity(override: str) -> bool:
    return re.split(r"[=.]", override.lstrip("+~"))[0] not in NOT_IDENTITY


def _file_name(words: Iterable[str]) -> str:
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(words)).strip("_,")
    return shortened(name, 120) or "default"  # file systems end at 255
