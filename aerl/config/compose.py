"""The composed YAML as a checked Config, with dataset and model of the run whose checkpoint is evaluated."""

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from aerl.config.errors import omegaconf_line, pydantic_line
from aerl.config.names import leaves
from aerl.config.schema import Config
from aerl.errors import UserError, first_line, short
from aerl.runtime.paths import local
from aerl.tracking.results import read_config, read_summary
from aerl.types import NonNegative

_GROUPS = ("dataset", "model")  # that an evaluation takes from the run that it evaluates


def read(cfg: DictConfig) -> Config:
    """The composed YAML as a checked Config; UserError names the first key that is wrong."""
    if "radii" in cfg:
        raise UserError("radii: no such key; eps=[0.25,0.5] takes several")
    try:
        config = Config.model_validate(_at_several_eps(cfg) if OmegaConf.is_list(cfg.get("eps")) else _resolved(cfg))
    except OmegaConfBaseException as error:
        raise UserError(omegaconf_line(error)) from error
    except ValidationError as error:
        raise UserError(pydantic_line(error)) from error
    config.check_threat()
    return config


def _resolved(cfg: DictConfig, **news: Any) -> dict[str, Any]:
    copied = copy.deepcopy(cfg)
    for key, value in news.items():
        OmegaConf.update(copied, key, value)
    resolved: dict[str, Any] = OmegaConf.to_container(copied, resolve=True, throw_on_missing=True)  # type: ignore
    return resolved


def _at_several_eps(cfg: DictConfig) -> dict[str, Any]:
    """The configuration at the largest eps, after the attacks that differ at each smaller one, named NAME_eps0.25.

    The smallest come first: what they fool is fooled at every larger eps, too.
    """
    try:
        radii = sorted(set(TypeAdapter(list[NonNegative]).validate_python(OmegaConf.to_container(cfg.eps))))
    except ValidationError as error:
        raise UserError(pydantic_line(error, "eps")) from error
    if not radii:
        raise UserError("eps=[]: expected a number, or a list of them")
    whole = _resolved(cfg, eps=radii[-1])
    smaller = {
        f"{name}_eps{eps:.6g}": spec
        for eps in radii[:-1]
        for name, spec in _resolved(cfg, eps=eps)["attack"].items()
        if spec != whole["attack"][name]
    }
    analyses = {"worst_case": {"_target_": "aerl.analyses.worst_case.WorstCase"}, **whole["analysis"]}
    return {**whole, "radii": radii, "attack": {**smaller, **whole["attack"]}, "analysis": analyses}


def inherit_from_checkpoint(cfg: DictConfig, overrides: Collection[str]) -> DictConfig:
    """With trainer=none and the checkpoint of a run: that run's dataset and model, unless the overrides set them."""
    evaluated = cfg.checkpoint if cfg.trainer is None else None
    folder = None if evaluated in (None, "own") else _run_folder(str(evaluated))
    return cfg if folder is None else _like_run(folder, overrides)


def options(cfg: DictConfig, chosen: Mapping[str, Any], overrides: Collection[str]) -> dict[str, str]:
    """The options of the groups dataset and model: the `chosen` ones of Hydra, or those of an evaluated run."""
    evaluated = cfg.checkpoint if cfg.trainer is None else None
    folder = None if evaluated in (None, "own") else _run_folder(str(evaluated))
    theirs = {} if folder is None else (read_summary(folder) or {}).get("choices") or {}
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    return {group: chosen[group] if group in given else theirs.get(group, chosen[group]) for group in _GROUPS}


def of_run(run: str, key: str) -> Config:
    """A configuration with the dataset and model of another run (its folder, or a .pt file in it), else defaults.

    Raises UserError under the `key` that named the run.
    """
    try:
        folder = _run_folder(run)
        if folder is None:
            raise UserError("expected a run folder or a .pt file in one (no config.yaml and summary.json found)")
        return read(_like_run(folder, []))
    except UserError as error:
        raise UserError(f"{key}={run}: {error}") from error


def origin(checkpoint: str | None) -> dict[str, Any] | None:
    """The run that trained the model of a checkpoint: its `folder`, `run_id`, `trainer` and `seed`; None if unknown."""
    folder = None if checkpoint in (None, "own") else _run_folder(checkpoint)
    if folder is None:
        return None
    summary = read_summary(folder) or {}
    trained = summary.get("origin") or summary  # it may itself have evaluated another run's model
    return {"folder": str(folder)} | {key: trained.get(key) for key in ("run_id", "trainer", "seed")}


def run_names(runs: Sequence[str]) -> list[str]:
    """A name for each of these runs, of [a-z0-9_.-]: the first kind of name that differs for all of them.

    Trainer and seed (rl_seed0), with the model (cnn_rl_seed0), the folder, with its parent, or a number at the end.
    """
    candidates = []
    for number, run in enumerate(runs, start=1):
        folder = _run_folder(run) or Path(run)
        summary, place = read_summary(folder) or {}, folder.resolve()
        trained = f"{summary.get('trainer')}_seed{summary.get('seed')}"
        names = [trained, f"{summary.get('model')}_{trained}", place.name, f"{place.parent.name}_{place.name}"]
        names.append(f"{trained}_{number}")
        candidates.append([re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-") for name in names])
    return next((list(kind) for kind in zip(*candidates, strict=True) if len(set(kind)) == len(runs)), [])


def _run_folder(checkpoint: str) -> Path | None:
    path = local(checkpoint)
    folder = path.parent.parent if path.is_file() else path
    return folder if all((folder / name).is_file() for name in ("config.yaml", "summary.json")) else None


def _like_run(folder: Path, overrides: Collection[str]) -> DictConfig:
    """The command line's configuration with dataset and model as a run folder has them, unless it sets them.

    The folder may come from somebody else: options of our groups and plain values are taken, but no other `_target_`.
    """
    chosen = {override.lstrip("+~").partition("=")[0] for override in overrides}
    groups = [group for group in _GROUPS if group not in chosen]
    try:
        theirs = (read_summary(folder) or {})["choices"]
        words = [f"{group}={theirs[group]}" for group in groups]
        saved = read_config(folder)
        values = dict(leaves({group: dict(saved[group]) for group in groups}))
        if not all(re.fullmatch(r"\w+=[\w-]+", word) for word in words):
            raise ValueError(f"unexpected options: {words}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: config.yaml or summary.json is damaged ({first_line(error)})") from error
    from hydra import compose

    cfg = compose("config", overrides=[*words, *overrides])
    for key, value in values.items():
        if key in chosen or value == OmegaConf.select(cfg, key, default=None):
            continue
        # Only plain names joined by dots: OmegaConf would also take net[_target_].
        plain = re.fullmatch(r"[\w.-]+", key) and "${" not in str(value)
        if not plain or key.rpartition(".")[2] == "_target_":
            raise UserError(f"{folder}: config.yaml has {key}={short(value)}, which is not allowed in a run folder")
        try:
            OmegaConf.update(cfg, key, value, force_add=False)
        except OmegaConfBaseException as error:
            raise UserError(f"{folder}: config.yaml has {key}={short(value)}, an unknown key") from error
    return cfg
