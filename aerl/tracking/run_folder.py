"""The run folder: what a run writes into it, and what an earlier start left.

Everything that is read back has a digest: in the .npz files, the checkpoints and summary.json themselves, and in
summary.json for all others. summary.json is written first: only a folder that has it belongs to aerl.
"""

import hashlib
import logging
import math
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aerl.config.compose import origin
from aerl.config.errors import explain
from aerl.config.names import config_hash, difference, differences, distinguishing_overrides, group_name
from aerl.config.schema import Config, Trainer
from aerl.errors import UserError
from aerl.runtime.ddp import is_main
from aerl.runtime.files import atomic_write, sha256, writing
from aerl.runtime.signals import Stopped
from aerl.runtime.terminal import eps_text
from aerl.tracking.loggers import open_loggers
from aerl.tracking.results import ResultLog, changed_files, read_summary, trainer_of, write_summary
from aerl.tracking.wandb import Tracker, open_tracker

log = logging.getLogger("aerl")

_SEALED = ("config.yaml", "results.jsonl", "outcomes.npz", "examples.npz", "evidence.npz")
_SEALED_FOLDERS = ("checkpoints", "figures", "tables")
# What overwrite=true deletes.
_FILES = ("summary.json", *_SEALED, "progress.npz", "progress.npy", "report.html", "run.log")
_OWN = (*_FILES, *_SEALED_FOLDERS, "wandb", "tensorboard", "csv")
_IDENTITY = ("run_id", "seed", "dataset", "model", "trainer")  # of each line of results.jsonl
_DISCARDED = "discarded"  # the status of a folder that overwrite=true empties


@dataclass(frozen=True)
class Record:
    """What a run writes: its folder, its results, and its summary."""

    folder: Path
    summary: dict[str, Any]
    results: ResultLog
    wandb: Tracker | None
    artifacts: bool = False

    def save(self, **news: Any) -> None:
        self.summary.update(news)
        write_summary(self.folder, self.summary)

    def advance(self, **news: Any) -> None:
        """Save, together with the results logged so far: a restart goes back to here."""
        self.save(results=self.results.seal(), **news)

    def close(self, status: str, error: str | None = None, **news: Any) -> None:
        """Record how the run ended; again after W&B, whose files the summary names."""
        self.save(status=status, error=error, **news)
        logger = self.results.logger
        if logger is not None:
            logger.summary({"status": status, "error": error})
        if self.wandb is not None and self.artifacts and status == "finished":
            log_artifacts(self.wandb, self.folder, self.summary)
        if logger is not None:
            logger.finish(0 if status == "finished" else 1)
        if self.wandb is not None:
            self.save(wandb=self.wandb.where())


def load_previous(folder: Path, config: Config, request: str | None = None) -> dict[str, Any]:
    """The summary of an earlier start of this run; {} if there was none.

    overwrite=true counts once: a run that it started resumes. In a multirun `request` is the id of the command. Raises
    UserError if the folder holds another run, damaged files, or files that are not aerl's.
    """
    try:
        summary = read_summary(folder)
    except UserError:
        if not config.overwrite:
            raise
        summary = None
    if summary is None or "config_hash" not in summary:
        own = _OWN[summary is not None :]  # a summary.json without a hash is another program's
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if foreign := [n for n in names if n not in own and not n.startswith((".lock", ".summary.json."))]:
            others = ", ".join(foreign[:3])
            raise UserError(f"run folder {folder}: holds other files ({others}) and no run; use another name=NAME")
        if not config.overwrite and any(_has_content(folder / name) for name in _OWN):
            raise UserError(
                f"run folder {folder}: summary.json is missing; restore it, or use overwrite=true to start again"
            )
        return {"status": _DISCARDED} if config.overwrite else {}
    same = summary["config_hash"] == config_hash(config)
    if config.overwrite:
        unfinished = summary["status"] in (_DISCARDED, "running", "stopped")
        if not same or summary.get("wish") != (request or "single") or not (request or unfinished):
            return {"status": _DISCARDED}
        log.info("already started by overwrite=true; resuming")
    elif not same:
        differing = differences(config, folder)
        epochs = config.trainer.epochs if config.trainer else 0
        longer = "trainer.epochs" in differing and (summary.get("epochs") or math.inf) < epochs
        if longer and differing.keys() <= {"trainer.epochs", "dataset.epochs"} and _can_go_on(config.trainer):
            log.info("trained for %d epochs; going on to %d", summary["epochs"], epochs)
            seconds = {key: value for key, value in summary["seconds"].items() if key != "train"}
            news = {"config_hash": config_hash(config), "status": "running", "seconds": seconds}
            return {**summary, **unattacked(), **news}
        raise UserError(
            f"run folder {folder}: holds another configuration ({difference(config, folder)}); "
            "use name=NAME to keep both, overwrite=true to start again"
            + f", or name=NAME checkpoint={folder} to train on from its weights"
            * longer
        )
    return summary


def _can_go_on(trainer: Trainer | None) -> bool:
    """Whether more epochs would have been preceded by the same training: its rates do not depend on their number."""
    if trainer is None or trainer.until is not None or trainer.patience is not None:
        return False
    return trainer.schedule.kind in ("constant", "step") and trainer.schedule.warmup == 0


def _has_content(path: Path) -> bool:
    """Whether `path` is a file or a folder with something in it: W&B's may be an empty disk mounted there."""
    return any(child.name != "lost+found" for child in path.iterdir()) if path.is_dir() else path.exists()


def verify(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run, marked as unfinished if files have changed or an analysis failed.

    Raises UserError if the run would have to be trained again; anything else is measured again.
    """
    changed = changed_files(folder, summary)
    trained = [name for name in changed if name.startswith(("results.jsonl", "checkpoints/"))]
    if trained and summary["trainer"] != "none":
        raise UserError(
            f"run folder {folder}: {trained[0]} is missing, damaged or was changed since the run finished; restore it, "
            "or use overwrite=true to start again"
        )
    failed = any(row["status"] == "failed" for row in (summary.get("analyses") or {}).values())
    if not changed and not failed:
        return summary
    summary = {**summary, "status": "running"}
    if changed:
        log.warning("%s: changed since the run finished, computing again: %s", folder, ", ".join(changed))
    if any(name.startswith(("figures/", "tables/")) for name in changed):
        summary |= {"analyses": {}, "results": summary["evaluated"]}
    if not {"results.jsonl", "outcomes.npz", "examples.npz", "evidence.npz"}.isdisjoint(changed):
        summary |= unattacked()
    return summary


def unattacked() -> dict[str, Any]:
    """The summary before the first attack."""
    return {"attacks": {}, "analyses": {}, "masking": None, "evaluated": None}


@contextmanager
def recorded(
    folder: Path, config: Config, previous: Mapping[str, Any], *, request: str | None = None, **facts: Any
) -> Iterator[Record]:
    """Open the run folder and the loggers; on the way out, record how the run ended.

    `previous` and `request` are as in `load_previous`. `facts` are entries of summary.json: `overrides`, `environment`,
    `inputs`, `choices` (of dataset and model, for runs that evaluate this one's model), and `data`, its `facts`.
    """
    summary = _start(folder, config, previous, request, facts)
    tracker = _track(folder, config, summary) if is_main() else None
    logger = open_loggers(folder, config, tracker) if is_main() else None
    results = ResultLog(folder, {key: summary[key] for key in _IDENTITY}, logger)
    record = Record(folder, summary, results, tracker, artifacts=config.logger.artifacts)
    began = time.monotonic()
    try:
        with _log_file(folder / "run.log"):
            yield record
        total = summary["seconds"].get("total", 0.0) + time.monotonic() - began
        record.close("finished", seconds=summary["seconds"] | {"total": total}, files=_digests(folder))
    except Stopped as stopped:
        log.warning(str(stopped))
        record.close("stopped", str(stopped))
        raise
    except BaseException as error:
        record.close("failed", explain(error) or f"{type(error).__name__}: {error}")
        raise


def _start(
    folder: Path, config: Config, previous: Mapping[str, Any], request: str | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write summary.json, then config.yaml, of a run that starts or resumes; returns the summary."""
    run_id = previous.get("run_id") or secrets.token_hex(4)
    names = (run_id, config.seed, config.dataset.name, config.model.name, config.trainer_name)
    started = {
        **dict(zip(_IDENTITY, names, strict=True)),
        "config_hash": config_hash(config),
        "wish": (request or "single") if config.overwrite else None,
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if previous.get("status") == _DISCARDED:
            _discard(folder, {"status": _DISCARDED, **started})
            previous = {}
        for place in (folder, *(folder / name for name in _SEALED_FOLDERS)):
            for temporary in place.glob(".*.????????????.tmp"):  # of a killed process: this one holds the lock
                temporary.unlink()
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    summary: dict[str, Any] = {**unattacked(), "seconds": {}, "best_epoch": None, **started, **previous}
    summary |= {
        "status": "running",
        "error": None,
        "folder": str(folder),
        "epochs": config.trainer.epochs if config.trainer else None,
        "checkpoint": config.checkpoint,
        "origin": None if config.trainer else origin(config.checkpoint),
        **facts,
        "files": {"config.yaml": hashlib.sha256(text.encode()).hexdigest()},
    }
    write_summary(folder, summary)
    atomic_write(folder / "config.yaml", text)
    return summary


def _track(folder: Path, config: Config, summary: Mapping[str, Any]) -> Tracker | None:
    overrides, logger = summary["overrides"], config.logger
    threat_model = f"{config.norm} eps {eps_text(config.eps)}"
    trainer = trainer_of(summary)
    return open_tracker(
        logger.mode,
        folder,
        summary["run_id"],
        project=logger.project,
        entity=logger.entity,
        group=logger.group or group_name(config, overrides),
        job_type="train" if config.trainer else "evaluate",
        name=" ".join([config.trainer_name, *distinguishing_overrides(overrides), f"seed={config.seed}"]),
        tags=[config.dataset.name, config.model.name, trainer, threat_model, *config.attack, *logger.tags],
        config=config.model_dump() | {"origin": summary["origin"]},
    )


def _discard(folder: Path, summary: Mapping[str, Any]) -> None:
    """Delete what aerl has written into a run folder. If it is killed meanwhile, the next start continues."""
    write_summary(folder, summary)
    for name in _OWN[1:]:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _digests(folder: Path) -> dict[str, str]:
    paths = [folder / name for name in _SEALED]
    paths += [path for name in _SEALED_FOLDERS for path in sorted((folder / name).glob("*"))]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths if path.is_file()}


def log_artifacts(tracker: Tracker, folder: Path, summary: Mapping[str, Any]) -> None:
    """Version in W&B the outcomes of a finished run and the model that it trained or evaluated.

    The model of another run is that run's artifact, from the same files: W&B then links the two runs.
    """
    from aerl.training import checkpoint  # which needs torch

    headline = {key: summary[key] for key in ("clean_accuracy", "worst_case_accuracy")}
    origin = summary["origin"]
    owner, place = (origin, Path(origin["folder"])) if origin else (summary, folder)
    try:
        if origin or summary["trainer"] != "none":
            weights = checkpoint.find(summary["checkpoint"] if origin else str(folder))
            files = {path.relative_to(place).as_posix(): path for path in (weights, place / "config.yaml")}
            metadata = {key: owner[key] for key in ("run_id", "trainer", "seed")} | ({} if origin else headline)
            tracker.artifact(f"model-{owner['run_id']}", "model", files, metadata, used=bool(origin))
    except UserError as error:  # removed since it was loaded
        log.warning("the model is not logged to W&B: %s", error)
    files = {name: folder / name for name in ("outcomes.npz", "summary.json")}
    metadata = headline | {"attacks": list(summary["attacks"])}
    tracker.artifact(f"outcomes-{summary['run_id']}", "outcomes", files, metadata)


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Log to run.log, too, also how the run failed, which the command line prints itself."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except Exception as error:
        log.debug(str(error), exc_info=not isinstance(error, UserError))
        raise
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # a full disk, which is reported already
            handler.close()
