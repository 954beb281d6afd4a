"""What identifies a run: its hash, its folder, and in what it differs from another."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from aerl.config.errors import short
from aerl.config.schema import Config
from aerl.tracking.results import read_config
from aerl.types import UserError, shortened

# Keys that change where a run is kept or how fast it goes, never its numbers.
NOT_IDENTITY = ("runs_dir", "data_dir", "name", "overwrite", "prepare_data_only", "logger")


def identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that determines a run's numbers."""
    return _identifying(config.model_dump())


def _identifying(config: Mapping[Any, Any]) -> dict[str, Any]:
    def counts(key: str, value: Any) -> bool:
        # These came later: runs made before them are still the same runs.
        return (key, value) not in (("evaluation.batch_size", None), ("hardware.distributed", False))

    return {
        name: {key: value for key, value in part.items() if counts(f"{name}.{key}", value)}
        if isinstance(part, Mapping)
        else part
        for name, part in config.items()
        if name not in NOT_IDENTITY and (name, part) != ("metric", {})
    }


def config_hash(config: Config) -> str:
    """Equal for two configurations if and only if they mean the same run."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Told by the path already, or by what it sets.
_NOT_IN_THE_NAME = ("dataset", "model", "trainer", "seed", "multirun_sweeps")


def distinguishing_overrides(overrides: Collection[str]) -> list[str]:
    """The overrides that tell a run from its neighbours of the same dataset, model, trainer and seed."""
    words = sorted(override.lstrip("+~") for override in overrides)
    keys = [word.partition("=")[0] for word in words]
    return [
        word
        for word, key in zip(words, keys, strict=True)
        if key not in _NOT_IN_THE_NAME and key.partition(".")[0] not in NOT_IDENTITY
    ]


def run_name(config: Config, overrides: Collection[str]) -> str:
    """Where under `runs_dir` a run is kept: dataset/model/trainer/what else was overridden/seed.

    Named by identity, not by the clock, so that the same command finds its own folder again.
    """
    name = f"{_place(config, overrides)}/seed{config.seed}" if config.name is None else config.name
    folder = Path(config.runs_dir).expanduser().absolute() / name
    if len(os.fsencode(folder)) > _LONGEST_PATH:
        key, value = ("runs_dir", config.runs_dir) if config.name is None else ("name", config.name)
        raise UserError(f"{key}={short(value)}: the run folder's path would be longer than {_LONGEST_PATH} bytes")
    return name


_LONGEST_PATH = 4096 - 512  # bytes: Linux's own limit less room for the files in a run folder


def group_name(config: Config, overrides: Collection[str]) -> str:
    """What a run has in common with its repetitions: its name without the seed, nor those of runs it takes."""
    return _place(config, [re.sub(r"\bseed\d+\b", "seed", override) for override in overrides])


def _place(config: Config, overrides: Collection[str]) -> str:
    words = _file_name(distinguishing_overrides(overrides)) or "default"
    return f"{config.dataset.name}/{config.model.name}/{config.trainer_name}/{words}"


def sweep_name(overrides: Collection[str]) -> str:
    """Where under `runs_dir` the table of a multirun is kept, so that the same command finds it again."""
    words = sorted(overrides)
    kept = [word for word in words if re.split(r"[=.]", word.lstrip("+~"))[0] not in NOT_IDENTITY]
    return f"multirun/{_file_name(kept) or 'default'}"


def _file_name(words: Collection[str]) -> str:
    return shortened(re.sub(r"[^\w.=,+-]+", "_", ",".join(words)).strip("_,"), 120)  # file systems end at 255


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def difference(config: Config, folder: Path) -> str:
    """The first keys in which the configuration kept in a run folder differs from this one, for a reader."""
    try:
        kept = read_config(folder)
    except UserError as error:
        return str(error)
    here = dict(leaves(identity(config)))
    there = dict(leaves(_identifying(kept)))
    differing = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    told = [f"{key} is {short(there.get(key))} there, {short(here.get(key))} here" for key in differing[:2]]
    return "; ".join([*told, f"{len(differing) - 2} more"] if len(differing) > 2 else told)
