"""The only wiring: one configuration becomes one run folder: train -> attack -> analyse -> report."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from aerl.config import compose
from aerl.config.names import run_name
from aerl.config.schema import Config
from aerl.report.multirun import note_job, wish
from aerl.report.page import NAME, written
from aerl.report.table import show
from aerl.runtime import ddp, gpus, signals
from aerl.runtime.files import locked, sha256
from aerl.tracking import inputs
from aerl.tracking.run_folder import Record, load_previous, recorded, verify
from aerl.tracking.wandb import Tracker
from aerl.types import UserError, first_line

if TYPE_CHECKING:  # torch takes seconds to import: a finished run or a wrong key is answered without it
    from aerl.analyses import AnalysisContext
    from aerl.build import Parts
    from aerl.data import Split
    from aerl.evaluation.evaluate import Outcomes

log = logging.getLogger("aerl")


def run(cfg: DictConfig) -> float | None:
    """Do what the configuration says, or what is left of it; returns the worst-case accuracy.

    The same command is the same run: an unfinished one goes on, a finished one is shown again.
    """
    _log_to_stderr(f"job {HydraConfig.get().job.num}: " if signals.is_worker() else "")
    if signals.is_worker():
        signals.defer_in_worker()
        ddp.sync_stop_request()
        signals.raise_if_stopped()  # what it was asked during an earlier job
    overrides = list(HydraConfig.get().overrides.task)
    config = compose.read(compose.inherit_from_checkpoint(cfg, overrides))
    if config.hardware.distributed:
        ddp.init_process_group(config.hardware.device)
    elif ddp.world_size() > 1:
        raise UserError(
            f"hardware.distributed=false: torchrun has started {ddp.world_size()} processes, each of which "
            "would do the whole run; hardware=ddp shares it among them"
        )
    with ddp.end_together():
        return _run(config, overrides)


def _run(config: Config, overrides: Sequence[str]) -> float | None:
    folder = Path(config.runs_dir).expanduser() / run_name(config, overrides)
    if HydraConfig.get().mode is RunMode.MULTIRUN and not config.prepare_data_only:
        note_job(HydraConfig.get().job.num, folder=str(folder.absolute()))
    found = ddp.broadcast_from_main(lambda: _found(folder, config))
    if found.get("status") == "finished" and _same_inputs(folder, config, found):
        return _show_again(folder, found)

    choices = _choices("dataset", "model")
    from aerl.build import build, build_data
    from aerl.evaluation.outcomes import judge
    from aerl.runtime.device import describe

    if config.prepare_data_only:
        data = build_data(config)
        log.info("%s: %d train, %d val and %d test images of %s are ready in %s", config.dataset.name,
                 len(data.train), len(data.val), len(data.test), "x".join(map(str, data.image_shape)),
                 config.data_dir)  # fmt: skip
        return None
    if "joblib" in HydraConfig.get().launcher._target_ and config.hardware.device != "cpu":
        gpus.claim()
    with signals.stop_immediately():
        parts = build(config)  # whatever is wrong is found here, before the run folder is touched
    ddp.broadcast_weights(parts.model)
    read = ddp.broadcast_from_main(lambda: _inputs(config, parts))
    with signals.listening(), ddp.scratch(folder) as place, _alone_in(place):
        earlier = ddp.broadcast_from_main(lambda: _found(folder, config))
        if difference := inputs.changed(earlier.get("inputs") or {}, read):
            raise UserError(f"run folder {folder}: {difference}; name=NAME keeps both, overwrite=true begins again")
        if earlier.get("status") == "finished":  # by another process meanwhile
            return _show_again(folder, earlier)
        with (
            written(place),
            recorded(
                place,
                config,
                earlier,
                overrides=overrides,
                choices=choices,
                environment=describe(parts.hardware),
                inputs=read,
                request=wish(),
            ) as record,
        ):
            for doubt in parts.doubts:
                log.warning("model: %s", doubt)
            record.save(doubts=list(parts.doubts))
            if parts.recipe is not None:
                _train(parts, config, record)
            elif config.checkpoint not in (None, "own"):
                _identify(config.checkpoint, record)
            record.summary.setdefault("trained", None)
            outcomes, split = judge(parts, config, record)
            if ddp.is_main():
                with ddp.main_process_only():
                    _analyse(parts, config, record, outcomes, split)
    _show(record.summary)
    return _headline(record.summary)


def _found(folder: Path, config: Config) -> dict[str, Any]:
    """What an earlier start has left in the run folder, as far as it can be believed."""
    earlier = load_previous(folder, config, wish())
    return verify(folder, earlier) if earlier.get("status") == "finished" else earlier


def _show_again(folder: Path, summary: Mapping[str, Any]) -> float | None:
    if HydraConfig.get().mode is RunMode.MULTIRUN:  # its table shows what was found
        log.info("was finished before: %s", folder)
    else:
        if ddp.is_main() and not (folder / NAME).is_file():
            with written(folder):
                pass
        _show(summary)
        log.info("This run was finished before; nothing was done. overwrite=true does it again.")
    return _headline(summary)


def _alone_in(folder: Path) -> AbstractContextManager[None]:
    """Keep other processes out of the run folder; a signal that comes while one is waited for ends the run."""

    def stop() -> None:
        signals.request_stop(signals.received())
        signals.raise_if_stopped()

    return locked(folder, stop) if ddp.is_main() else nullcontext()


def _same_inputs(folder: Path, config: Config, summary: Mapping[str, Any]) -> bool:
    """Whether a finished run has read what is there now, as far as that can be said without torch.

    False where only the data or the weights themselves can say it. Raises UserError where something has changed; what
    is gone is a warning: the numbers are still those of what it was.
    """
    recorded = summary.get("inputs") or {}
    found = ddp.broadcast_from_main(lambda: inputs.now(recorded, config))
    if difference := inputs.changed(recorded, found):
        raise UserError(f"run folder {folder}: {difference}; name=NAME keeps both, overwrite=true begins again")
    for key in sorted(key for key, digest in found.items() if digest == "missing"):
        log.warning("%s is not there any more: these numbers are of what it was", key)
    data = found[inputs.DATA_KEY]
    return config.checkpoint != "own" and data in ("missing", recorded.get(inputs.DATA_KEY, data))


def _inputs(config: Config, parts: "Parts") -> dict[str, str]:
    """All that the run reads, by content."""
    from aerl.training.checkpoint import digest

    read = inputs.files(config) | inputs.code(config)
    if config.checkpoint == "own":
        read["weights"] = digest(parts.model.state_dict())
    return read | {
        f"dataset={config.dataset.name}": parts.data.digest,
        inputs.DATA_KEY: inputs.data_key(config),
    }


def _show(summary: Mapping[str, Any]) -> None:
    if ddp.is_main():
        show(summary)


def _log_to_stderr(label: str) -> None:
    """Plain lines, and none of them through the root logger, which Hydra has pointed at standard output."""
    log.setLevel(logging.DEBUG if ddp.is_main() else logging.CRITICAL)
    log.propagate = False
    logging.getLogger().setLevel(logging.WARNING)  # nor other libraries' chatter
    logging.raiseExceptions = False  # a full disk is told by the files that matter, not by a log's traceback
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
    log.handlers[0].setLevel(logging.INFO)  # tracebacks go to run.log alone
    log.handlers[0].setFormatter(logging.Formatter(f"{label}%(message)s"))


def _choices(*groups: str) -> dict[str, str]:
    """Which options the command line takes of these groups."""
    options = HydraConfig.get().runtime.choices
    for group in groups:
        if group not in options:  # several were, and merged
            raise UserError(f"{group}: takes one option, not a list; -m {group}=A,B runs each of several, one by one")
    return {group: str(options[group]) for group in groups}


def _headline(summary: Mapping[str, Any]) -> float | None:
    accuracy = summary.get("worst_case_accuracy")
    return None if accuracy is None else accuracy["value"]


def _train(parts: "Parts", config: Config, record: Record) -> None:
    """Train, or go on training, and leave `parts.model` with the weights that the recipe selects."""
    from aerl.training import checkpoint
    from aerl.training.loop import fit

    assert parts.recipe is not None
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
        trained = record.results.seal()
        record.advance(best_epoch=best_epoch, seconds=seconds, weights=weights, trained=trained)
    ddp.broadcast_from_main(lambda: checkpoint.load_weights(parts.model, folder / "best.pt"))
    ddp.broadcast_weights(parts.model)


def _identify(judged: str, record: Record) -> None:
    """Record which file of weights is judged."""
    from aerl.training import checkpoint

    path = checkpoint.find(judged)
    record.save(weights={"file": str(path), "sha256": sha256(path)})


def _analyse(parts: "Parts", config: Config, record: Record, outcomes: "Outcomes", split: "Split") -> None:
    """Run the analyses that are not done yet, and show W&B what is worth seeing."""
    import torch

    from aerl.analyses import AnalysisContext
    from aerl.evaluation.outcomes import batch_size
    from aerl.runtime.files import load_arrays

    context = AnalysisContext(
        model=parts.model,
        images=split.images,
        labels=split.labels,
        class_names=parts.data.class_names,
        outcomes=outcomes,
        adversarial={
            part: torch.from_numpy(kept) for part, kept in load_arrays(record.folder / "examples.npz").items()
        },
        attacks=record.summary["attacks"],
        figures=record.folder / "figures",
        log=record.results,
        norm=config.norm,
        eps=config.eps,
        seed=config.seed,
        trainer=(record.summary["origin"] or record.summary)["trainer"],
        hardware=parts.hardware,
        batch_size=batch_size(parts, config),
        save=record.save,
    )
    rows = record.summary["analyses"]
    for name, analysis in parts.analyses.items():
        ddp.sync_stop_request()
        signals.raise_if_stopped()
        if rows.get(name, {}).get("status") in ("made", "not made"):
            log.info("%s: was made before", name)
            continue
        row = _made(name, analysis, context, record)
        record.advance(analyses=rows | {name: row})
        rows = record.summary["analyses"]
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] != "made"}
    record.save(not_made=reasons)
    if record.tracker is not None:
        _show_wandb(record.tracker, record.summary)


def _made(name: str, analysis: Callable[..., Any], context: "AnalysisContext", record: Record) -> dict[str, Any]:
    """Run one analysis, with smaller batches where the memory does not suffice; how that ended.

    Whatever it raises is its own end and not that of the run, whose numbers are complete without it.
    """
    from aerl.analyses import NotMade
    from aerl.attacks import NoGradient
    from aerl.runtime.device import is_out_of_memory

    began = time.monotonic()
    while True:
        record.results.restore(record.summary["results"])  # without what an earlier try has logged
        try:
            with signals.stop_immediately():
                analysis(context)
        except (NotMade, NoGradient) as error:
            log.warning("%s: not made: %s", name, error)
            return {"status": "not made", "reason": str(error)}
        except Exception as error:
            if is_out_of_memory(error) and context.batch_size > 1:
                context = replace(context, batch_size=context.batch_size // 2)
                log.warning("%s: out of memory: goes on with %d images at a time", name, context.batch_size)
                continue
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
            log.warning("%s: failed: %s; the same command tries it again", name, reason)
            if not isinstance(error, UserError):
                log.debug("%s", name, exc_info=error)
            record.results.restore(record.summary["results"])
            return {"status": "failed", "reason": f"failed: {reason}"}
        return {"status": "made", "seconds": time.monotonic() - began}


def _show_wandb(tracker: Tracker, summary: Mapping[str, Any]) -> None:
    """The closing table once more, and the numbers by which W&B sorts and plots runs."""
    accuracies = {"clean": summary["clean_accuracy"]}
    accuracies |= {name: told["robust_accuracy"] for name, told in summary["attacks"].items()}
    if summary["worst_case_accuracy"] is not None:
        accuracies["worst case"] = summary["worst_case_accuracy"]
    rows = []
    for name, accuracy in accuracies.items():
        told = summary["attacks"].get(name, {})
        row = [name, *(told.get(key) for key in ("norm", "eps", "seconds"))]
        rows.append(row + [accuracy[key] for key in ("value", "low", "high", "n")])
        tracker.summary({f"accuracy/{name.replace(' ', '_')}": accuracy["value"]})
    tracker.table("tables/attacks", ["attack", "norm", "eps", "seconds", "accuracy", "low", "high", "n"], rows)
