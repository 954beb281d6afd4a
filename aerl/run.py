"""A run: one configuration becomes one run folder. Build -> train -> evaluate -> analyse -> report."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from aerl.config import compose, recipes
from aerl.config.names import run_folder
from aerl.config.schema import Config
from aerl.errors import UserError
from aerl.report import page, table
from aerl.report.multirun import note_job, overwrite_id
from aerl.runtime import ddp, gpus, signals
from aerl.runtime.files import locked, sha256
from aerl.runtime.paths import local
from aerl.tracking import inputs
from aerl.tracking.loggers import log_accuracies
from aerl.tracking.run_folder import Record, load_previous, recorded, verify

if TYPE_CHECKING:
    from aerl.build import Parts

log = logging.getLogger("aerl")


def run(cfg: DictConfig) -> float | None:
    """Do what the configuration asks, or what is left of it; returns the worst-case accuracy.

    The same command is the same run: an unfinished one resumes, a finished one is shown again.
    """
    config = compose.read(compose.inherit_from_checkpoint(cfg, HydraConfig.get().overrides.task))
    if config.hardware.distributed:
        ddp.init_process_group(config.hardware.device)
    elif ddp.world_size() > 1:
        raise UserError(f"hardware.distributed=false: torchrun started {ddp.world_size()} processes; use hardware=ddp")
    with ddp.end_together():
        if config.prepare_data_only:
            _prepare_data(config)
            return None
        hydra = HydraConfig.get()
        choices = compose.options(cfg, hydra.runtime.choices, hydra.overrides.task)
        accuracy = _run(config, choices)["worst_case_accuracy"]
    return None if accuracy is None else float(accuracy["value"])


def _run(config: Config, choices: Mapping[str, str]) -> dict[str, Any]:
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    folder = run_folder(local(config.runs_dir, "runs_dir"), config, overrides)
    if hydra.mode is RunMode.MULTIRUN:
        note_job(hydra.job.num, folder=str(folder.absolute()))
    previous = ddp.broadcast_from_main(lambda: _previous(folder, config))
    if previous.get("status") == "finished" and inputs.are_same(folder, config, previous):
        return _show_again(folder, previous)

    # These import torch, which takes seconds: not for a finished run or a wrong key.
    from aerl.analyses.run import run_analyses
    from aerl.build import build
    from aerl.evaluation.evaluate import evaluate
    from aerl.models import Classifier
    from aerl.runtime.device import describe

    if "joblib" in hydra.launcher._target_ and config.hardware.device != "cpu":
        gpus.claim()
    with signals.stop_immediately():
        parts = build(config)  # raises all errors of the configuration, before the run folder is touched
    ddp.broadcast_weights(parts.model)
    digests = ddp.broadcast_from_main(lambda: inputs.read(config, parts.data.digest, parts.model))
    with signals.listening(), ddp.scratch(folder) as place, locked(place, _stop_if_signalled):
        previous = ddp.broadcast_from_main(lambda: _previous(folder, config))
        inputs.check(folder, previous.get("inputs") or {}, digests)
        if previous.get("status") == "finished":  # by another process, while this one waited
            return _show_again(folder, previous)
        opened = recorded(
            place, config, previous, overrides=overrides, environment=describe(parts.hardware), inputs=digests,
            choices=choices, request=overwrite_id(),
            data=parts.data.facts,
        )  # fmt: skip
        with page.written(place), opened as record:
            record.save(doubts=list(parts.doubts))
            _report_recipe(hydra.runtime.choices)
            for doubt in parts.doubts:
                log.warning("model: %s", doubt)
            _train(parts, config, record)
            if config.evaluation.withhold_normalization:
                assert isinstance(parts.model, Classifier)
                parts.model.withhold_normalization()
                record.save(normalization="withheld")
            outcomes, split = evaluate(parts, config, record)
            if ddp.is_main():
                with ddp.main_process_only():
                    run_analyses(parts, config, record, outcomes, split)
                    if record.results.logger is not None:
                        log_accuracies(record.results.logger, record.summary)
    if ddp.is_main():
        table.show(record.summary)
    return record.summary


def _report_recipe(choices: Mapping[str, Any]) -> None:
    """Say where settings come from that neither the trainer's file nor the command line has."""
    dataset, trainer, recipe = (str(choices.get(group)) for group in ("dataset", "trainer", "recipe"))
    if recipe == f"{dataset}_{trainer}" and (found := recipes.inherited(dataset, trainer)):
        log.info("recipe: %s, of the trainer that %s builds on; recipe=none leaves it out", found[0], trainer)


def _train(parts: "Parts", config: Config, record: Record) -> None:
    """Give `parts.model` the selected weights, trained first if they are not yet; record which they are."""
    from aerl.training import checkpoint
    from aerl.training.loop import fit

    record.summary.setdefault("trained", None)
    if parts.recipe is None:
        if config.checkpoint not in (None, "own"):
            path = checkpoint.find(config.checkpoint)
            record.save(weights={"file": str(path), "sha256": sha256(path)})
        return
    folder, began = record.folder / "checkpoints", time.monotonic()
    if "train" not in record.summary["seconds"]:
        best_epoch = fit(
            parts.model, parts.data, parts.recipe, parts.hardware,
            seed=config.seed, folder=folder, results=record.results,
        )  # fmt: skip
        seconds = record.summary["seconds"] | {"train": time.monotonic() - began}
        digest = ddp.broadcast_from_main(lambda: sha256(folder / "best.pt"))
        weights = {"file": "checkpoints/best.pt", "sha256": digest}
        record.advance(best_epoch=best_epoch, seconds=seconds, weights=weights, trained=record.results.seal())
    ddp.broadcast_from_main(lambda: checkpoint.load_weights(parts.model, folder / "best.pt"))
    ddp.broadcast_weights(parts.model)


def _previous(folder: Path, config: Config) -> dict[str, Any]:
    """The summary of an earlier start, as far as the files that it wrote are unchanged."""
    previous = load_previous(folder, config, overwrite_id())
    return verify(folder, previous) if previous.get("status") == "finished" else previous


def _show_again(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    if ddp.is_main() and not (folder / page.NAME).is_file():
        with page.written(folder):
            pass
    if ddp.is_main() and HydraConfig.get().mode is RunMode.RUN:  # a multirun ends with a table of all
        table.show(summary)
    log.info("%s: already finished; overwrite=true runs it again", folder)
    return summary


def _prepare_data(config: Config) -> None:
    from aerl.build import build_data

    data = build_data(config)
    counts = f"{len(data.train)} train, {len(data.val)} val and {len(data.test)} test images"
    shape = "x".join(map(str, data.image_shape))
    log.info("%s: %s of %s are ready in %s", config.dataset.name, counts, shape, config.data_dir)


def _stop_if_signalled() -> None:
    signals.request_stop(signals.received())
    signals.raise_if_stopped()
