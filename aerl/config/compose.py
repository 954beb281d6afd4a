"""The composed YAML as a checked configuration, with dataset and model of the run whose checkpoint is evaluated."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from aerl.config.errors import UNPRINTABLE, omegaconf_line, pydantic_line, short
from aerl.config.names import leaves
from aerl.config.schema import Config
from aerl.hub import local
from aerl.tracking.results import read_config, read_summary
from aerl.types import UserError, first_line


def read(cfg: DictConfig) -> Config:
    """The composed YAML as a checked Config; UserError names the first key that is wrong."""
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(omegaconf_line(error)) from error
    for key, value in leaves(container, lists=True):
        if isinstance(value, str) and UNPRINTABLE.search(value):
            raise UserError(f"{key}={short(value)}: has a control character, or a byte that is no text in this locale")
    try:
        config = Config.model_validate(container)
    except ValidationError as error:
        raise UserError(pydantic_line(error)) from error
    attacks: dict[str, Mapping[str, Any]] = {f"attack.{name}.": spec for name, spec in config.attack.items()}
    if config.trainer and config.trainer.adversary:
        attacks["trainer.adversary.attack."] = config.trainer.adversary.attack
    for key, spec in {"": {"norm": config.norm, "eps": config.eps}, **attacks}.items():
        norm, eps = spec.get("norm"), spec.get("eps")
        if norm == "Linf" and isinstance(eps, int | float) and eps > 1:
            raise UserError(f"{key}eps={short(eps)}: pixels are in [0, 1]; did you mean {eps:g}/255?")
    return config


def inherit_from_checkpoint(cfg: DictConfig, overrides: Collection[str]) -> DictConfig:
    """With trainer=none and the checkpoint of a run: that run's dataset and model, unless the overrides set them."""
    if cfg.trainer is not None or cfg.checkpoint in (None, "own") or OmegaConf.is_config(cfg.checkpoint):
        return cfg
    chosen = {override.lstrip("+~").partition("=")[0] for override in overrides}
    groups = [group for group in ("dataset", "model") if group not in chosen]
    folder = _run_folder(str(cfg.checkpoint))
    if not groups or folder is None:
        return cfg
    try:
        return _taken_from(folder, groups, overrides)
    except UserError as error:
        raise UserError(f"checkpoint={cfg.checkpoint}: {error}; set dataset= and model= yourself") from error


def of_run(run: str, key: str) -> Config:
    """A configuration with the dataset and the model of another run (its folder, or a .pt file in it).

    The rest is at its default. Raises UserError, under the `key` that named the run.
    """
    try:
        folder = _run_folder(run)
        if folder is None:
            raise UserError("no run folder, nor a .pt file in one: there is no config.yaml and summary.json")
        return read(_taken_from(folder, ["dataset", "model"], []))
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
    """A name for each of these runs, of [a-z0-9_.-]: the first of these that differs for all of them.

    Trainer and seed (rl_seed0), the model before that (cnn_rl_seed0), the folder's name, also with its parent's, or
    trainer, seed and a number.
    """
    candidates = []
    for run in runs:
        folder = _run_folder(run) or Path(run)
        summary = read_summary(folder) or {}
        trained = f"{summary.get('trainer')}_seed{summary.get('seed')}"
        place = folder.resolve()
        names = [trained, f"{summary.get('model')}_{trained}", place.name, f"{place.parent.name}_{place.name}"]
        candidates.append([re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-") for name in names])
    numbered = [f"{names[0]}_{number}" for number, names in enumerate(candidates, start=1)]
    return next((list(names) for names in zip(*candidates, strict=True) if len(set(names)) == len(names)), numbered)


def _run_folder(checkpoint: str) -> Path | None:
    path = local(checkpoint)
    folder = path.parent.parent if path.is_file() else path
    return folder if all((folder / name).is_file() for name in ("config.yaml", "summary.json")) else None


def _taken_from(folder: Path, groups: Collection[str], overrides: Collection[str]) -> DictConfig:
    """The command line's configuration with these groups (dataset, model) as a run folder has them.

    Only names of our own config groups and plain values are taken from the run folder. What its files
    name as code to import is compared with ours and refused where it differs.
    """
    try:
        options = (read_summary(folder) or {})["choices"]
        wanted = [f"{group}={options[group]}" for group in groups]
        saved = read_config(folder)
        values = dict(leaves({group: dict(saved[group].items()) for group in groups}))
        if not all(re.fullmatch(r"\w+=[\w-]+", word) for word in wanted):
            raise ValueError(f"{wanted} is no choice of options")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"its config.yaml or summary.json is damaged ({first_line(error)})") from error
    chosen = {override.lstrip("+~").partition("=")[0] for override in overrides}
    cfg = compose("config", overrides=[*wanted, *overrides])
    for key, value in values.items():
        if key in chosen or value == OmegaConf.select(cfg, key, default=None):
            continue
        # A key is plain names joined by dots: OmegaConf would also understand net[_target_].
        plain = re.fullmatch(r"[\w.-]+", key) and "${" not in str(value)
        if not plain or key.rpartition(".")[2] == "_target_":
            raise UserError(f"its config.yaml says {key}={short(value)}, which is not taken from a run folder")
        try:
            OmegaConf.update(cfg, key, value, force_add=False)
        except OmegaConfBaseException as error:
            raise UserError(f"its config.yaml says {key}={short(value)}, a key unknown here") from error
    return cfg
