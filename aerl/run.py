"""A run: one configuration becomes one run folder. Build -> train -> evaluate -> analyse -> report."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from aerl.config import compose
from aerl.config.names import run_name
from aerl.config.schema import Config
from aerl.report.multirun import note_job, overwrite_id
from aerl.report.page import NAME, written
from aerl.report.table import show
from aerl.runtime import ddp, gpus, signals
from aerl.runtime.files import locked, sha256
from aerl.tracking import inputs
from aerl.tracking.run_folder import Record, load_previous, recorded, verify
from aerl.tracking.wandb import log_accuracies
from aerl.types import UserError

if TYPE_CHECKING:
    from aerl.build import Parts

log = logging.getLogger("aerl")


def run(cfg: DictConfig) -> float | None:
    """Do what the configuration says, or what is left of it; returns the worst-case accuracy.

    The same command is the same run: an unfinished one goes on, a finished one is shown again.
    """
    overrides = list(HydraConfig.get().overrides.task)
    config = compose.read(compose.inherit_from_checkpoint(cfg, overrides))
    if config.hardware.distributed:
        ddp.init_process_group(config.hardware.device)
    elif ddp.world_size() > 1:
        raise UserError(
            f"hardware.distributed=false: each of the {ddp.world_size()} processes that torchrun has started would do "
            "all of the run; hardware=ddp shares it among them"
        )
    with ddp.end_together():
        return _run(config, overrides)


def _run(config: Config, overrides: Sequence[str]) -> float | None:
    folder = Path(config.runs_dir).expanduser() / run_name(config, overrides)
    if _in_multirun() and not config.prepare_data_only:
        note_job(HydraConfig.get().job.num, folder=str(folder.absolute()))
    earlier = ddp.broadcast_from_main(lambda: _earlier(folder, config))
    if earlier.get("status") == "finished" and inputs.are_same(folder, config, earlier):
        return _show_again(folder, earlier)
    choices = _choices("dataset", "model")

    # These import torch, which takes seconds: a finished run or a wrong key is answered without it.
    from aerl.analyses.run import run_analyses
    from aerl.build import build, build_data
    from aerl.evaluation.evaluate import evaluate
    from aerl.runtime.device import describe

    if config.prepare_data_only:
        data, shape = (data := build_data(config)), "x".join(map(str, data.image_shape))
        sizes = (len(data.train), len(data.val), len(data.test), shape, config.data_dir)
        log.info("%s: %d train, %d val and %d test images of %s are ready in %s", config.dataset.name, *sizes)
        return None
    if "joblib" in HydraConfig.get().launcher._target_ and config.hardware.device != "cpu":
        gpus.claim()
    with signals.stop_immediately():
        parts = build(config)  # whatever is wrong is found here, before the run folder is touched
    ddp.broadcast_weights(parts.model)
    read = ddp.broadcast_from_main(lambda: inputs.read(config, parts.data.digest, parts.model))
    with signals.listening(), ddp.scratch(folder) as place, _locked(place):
        earlier = ddp.broadcast_from_main(lambda: _earlier(folder, config))
        inputs.check(folder, earlier.get("inputs") or {}, read)
        if earlier.get("status") == "finished":  # by another process meanwhile
            return _show_again(folder, earlier)
        opened = recorded(
            place, config, earlier, overrides=overrides, choices=choices, environment=describe(parts.hardware),
            inputs=read, request=overwrite_id(),
        )  # fmt: skip
        with written(place), opened as record:
            for doubt in parts.doubts:
                log.warning("model: %s", doubt)
            record.save(doubts=list(parts.doubts))
            _train(parts, config, record)
            outcomes, split = evaluate(parts, config, record)
            if ddp.is_main():
                with ddp.main_process_only():
                    run_analyses(parts, config, record, outcomes, split)
                    if record.tracker is not None:
                        log_accuracies(record.tracker, record.summary)
    return _show(record.summary)


def _train(parts: "Parts", config: Config, record: Record) -> None:
    """Train, or go on training, and give `parts.model` the weights that the recipe selects; record which they are."""
    from aerl.training import checkpoint
    from aerl.training.loop import fit

    record.summary.setdefault("trained", None)
    if parts.recipe is None:
        if config.checkpoint not in (None, "own"):
            path = checkpoint.find(config.checkpoint)
            record.save(weights={"file": str(path), "sha256": sha256(path)})
        return
    folder = record.folder / "checkpoints"
    if "train" not in record.summary["seconds"]:
        began = time.monotonic()
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


def _earlier(folder: Path, config: Config) -> dict[str, Any]:
    """What an earlier start has written into the run folder, as far as it can be believed."""
    earlier = load_previous(folder, config, overwrite_id())
    return verify(folder, earlier) if earlier.get("status") == "finished" else earlier


def _show_again(folder: Path, summary: Mapping[str, Any]) -> float | None:
    if _in_multirun():  # its table shows the numbers
        log.info("was finished before: %s", folder)
        return _headline(summary)
    if ddp.is_main() and not (folder / NAME).is_file():
        with written(folder):
            pass
    _show(summary)
    log.info("This run was finished before; nothing was done. overwrite=true does it again.")
    return _headline(summary)


def _show(summary: Mapping[str, Any]) -> float | None:
    if ddp.is_main():
        show(summary)
    return _headline(summary)


def _headline(summary: Mapping[str, Any]) -> float | None:
    accuracy = summary.get("worst_case_accuracy")
    return None if accuracy is None else accuracy["value"]


def _locked(folder: Path) -> AbstractContextManager[None]:
    """Keep other processes out of the run folder; a signal that comes while one is waited for ends the run."""

    def stop() -> None:
        signals.request_stop(signals.received())
        signals.raise_if_stopped()

    return locked(folder, stop) if ddp.is_main() else nullcontext()


def _in_multirun() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN


def _choices(*groups: str) -> dict[str, str]:
    """Which options the command line takes of these groups."""
    options = HydraConfig.get().runtime.choices
    for group in groups:
        if group not in options:  # several were, and merged
            raise UserError(f"{group}: takes one option, not a list; -m {group}=A,B runs each of several, one by one")
    return {group: str(options[group]) for group in groups}
