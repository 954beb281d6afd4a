"""The run folder: what a run writes into it, and what an earlier start left.

Everything that is read back is sealed: summary.json, the .npz files and the checkpoints by a digest inside them,
results.jsonl by one in the state that says how far the run has come, and all files of a finished run by `files` of
summary.json. summary.json is the first file of a folder: only a folder that has it belongs to aerl.
"""

import hashlib
import logging
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aerl.config.compose import origin
from aerl.config.errors import explain
from aerl.config.names import config_hash, difference, distinguishing_overrides, group_name
from aerl.config.schema import Config
from aerl.runtime.ddp import is_main
from aerl.runtime.files import atomic_write, sha256, writing
from aerl.runtime.signals import Stopped
from aerl.tracking.results import ResultLog, changed_files, read_summary, write_summary
from aerl.tracking.wandb import Tracker, open_tracker
from aerl.types import UserError, eps_text

log = logging.getLogger("aerl")

_SEALED = ("config.yaml", "results.jsonl", "outcomes.npz", "examples.npz")
_SEALED_FOLDERS = ("checkpoints", "figures", "tables")
# What overwrite=true discards.
_OWN = ("summary.json", *_SEALED, "progress.npz", "report.html", "run.log", *_SEALED_FOLDERS, "wandb")
_TRAINED = ("results.jsonl", "checkpoints/")  # what only training makes again
_DISCARDED = "discarded"  # the status of a folder that overwrite=true empties


@dataclass(frozen=True)
class Record:
    """What a run writes: its folder, its results, and a summary that is never behind."""

    folder: Path
    summary: dict[str, Any]
    results: ResultLog
    tracker: Tracker | None
    artifacts: bool = False

    def save(self, **news: Any) -> None:
        self.summary.update(news)
        write_summary(self.folder, self.summary)

    def advance(self, **news: Any) -> None:
        """Save, together with the results logged so far: a restart goes back to here."""
        self.save(results=self.results.seal(), **news)

    def close(self, **news: Any) -> None:
        """Record how the run ended; once more after W&B, so that the summary names W&B's files."""
        self.save(**news)
        if self.tracker is not None:
            finished = self.summary["status"] == "finished"
            self.tracker.summary({"status": self.summary["status"], "error": self.summary["error"]})
            if self.artifacts and finished:
                log_artifacts(self.tracker, self.folder, self.summary)
            self.tracker.finish(0 if finished else 1)
            self.summary["wandb"] = self.tracker.where()
        self.save()


def load_previous(folder: Path, config: Config, request: str | None = None) -> dict[str, Any]:
    """The summary of an earlier start of this very run; {} where there was none.

    overwrite=true is used up once: a run that it began, and that was stopped or killed, resumes. In a multirun
    `request` is the id of the command that asked for it. Raises UserError where the folder holds another run, damaged
    files, or files that are not aerl's.
    """
    discarded = {"status": _DISCARDED}
    try:
        summary = read_summary(folder)
    except UserError:
        if not config.overwrite or _foreign(folder, _OWN):
            raise
        return discarded
    if summary is None or "config_hash" not in summary:
        if foreign := _foreign(folder, _OWN if summary is None else _OWN[1:]):  # a summary.json of somebody else's
            others = ", ".join(foreign[:3])
            raise UserError(f"run folder {folder}: holds other files ({others}) and no run; choose another name=NAME")
        if config.overwrite:
            return discarded
        if any(_holds_something(folder / name) for name in _OWN):
            raise UserError(
                f"run folder {folder}: its summary.json is missing; restore it, or overwrite=true begins again"
            )
        return {}
    same = summary["config_hash"] == config_hash(config)
    if config.overwrite:
        if not same or not _used_up(summary, request):
            return discarded
        log.info("overwrite=true has begun this run already: going on with it")
    elif not same:
        raise UserError(
            f"run folder {folder}: holds another configuration ({difference(config, folder)}); "
            "name=NAME keeps both, overwrite=true discards it"
        )
    return summary


def _holds_something(path: Path) -> bool:
    """Whether there is a file, or a folder with something in it: W&B's may be a disk of its own, still empty."""
    if path.is_dir():
        return any(one.name != "lost+found" for one in path.iterdir())
    return path.exists()


def _used_up(summary: Mapping[str, Any], request: str | None) -> bool:
    if request is None:
        return summary.get("wish") is not None and summary["status"] in (_DISCARDED, "running", "stopped")
    return bool(summary.get("wish") == request)


def _foreign(folder: Path, own: Sequence[str]) -> list[str]:
    """The files and folders in `folder` that aerl does not write."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if name not in (*own, ".lock") and not name.startswith(".summary.json.")]


def verify(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run: marked unfinished where files have changed or an analysis failed.

    What can be measured again is, which is logged. Raises UserError where training would have to be repeated.
    """
    lost = changed_files(folder, summary)
    trained = [name for name in lost if name.startswith(_TRAINED)]
    if trained and summary["trainer"] != "none":
        raise UserError(
            f"run folder {folder}: {trained[0]} is missing, damaged or was changed since the run finished; restore it, "
            "or begin the run again with overwrite=true"
        )
    failed = any(row["status"] == "failed" for row in (summary.get("analyses") or {}).values())
    if not lost and not failed:
        return summary
    summary = {**summary, "status": "running"}
    if lost:
        log.warning("%s: changed since the run finished, and made again: %s", folder, ", ".join(lost))
    if any(name.startswith(("figures/", "tables/")) for name in lost):
        summary |= {"analyses": {}, "results": summary["evaluated"]}
    if not {"results.jsonl", "outcomes.npz", "examples.npz"}.isdisjoint(lost):
        summary |= unattacked()
    return summary


def unattacked() -> dict[str, Any]:
    """What a summary says before the first attack."""
    return {"attacks": {}, "analyses": {}, "masking": None, "evaluated": None}


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a run that somebody may read back."""
    paths = [folder / name for name in _SEALED]
    paths += [path for name in _SEALED_FOLDERS for path in sorted((folder / name).glob("*"))]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths if path.is_file()}


@contextmanager
def recorded(
    folder: Path,
    config: Config,
    previous: Mapping[str, Any],
    *,
    overrides: Sequence[str],
    choices: Mapping[str, str],
    environment: Mapping[str, str],
    inputs: Mapping[str, str],
    request: str | None = None,
) -> Iterator[Record]:
    """Open the run folder and W&B; on the way out record how the run ended, whatever happened.

    `previous` is from `load_previous`; `choices` are the options of the groups dataset and model, for runs that
    evaluate this one's model; `inputs` are the digests of what the run reads.
    """
    run_id = previous.get("run_id") or secrets.token_hex(4)
    identity = {
        "run_id": run_id,
        "seed": config.seed,
        "dataset": config.dataset.name,
        "model": config.model.name,
        "trainer": config.trainer_name,
    }
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    trained_by = None if config.trainer else origin(config.checkpoint)
    begun: dict[str, Any] = {
        "status": _DISCARDED,
        **identity,
        "config_hash": config_hash(config),
        "wish": (request or "single") if config.overwrite else None,
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if previous.get("status") == _DISCARDED:
            _discard(folder, begun)
            previous = {}
    summary: dict[str, Any] = {**unattacked(), "seconds": {}, "best_epoch": None, **begun, **previous}
    summary |= {
        "status": "running",
        "error": None,
        "folder": str(folder),
        "epochs": config.trainer.epochs if config.trainer else None,
        "choices": dict(choices),
        "overrides": list(overrides),
        "checkpoint": config.checkpoint,
        "origin": trained_by,
        "environment": dict(environment),
        "inputs": dict(inputs),
        "files": {"config.yaml": hashlib.sha256(text.encode()).hexdigest()},
    }
    write_summary(folder, summary)
    tracker = open_tracker(
        config.logger.mode if is_main() else "disabled",
        folder,
        run_id,
        project=config.logger.project,
        entity=config.logger.entity,
        group=config.logger.group or group_name(config, overrides),
        job_type="train" if config.trainer else "evaluate",
        name=" ".join([config.trainer_name, *distinguishing_overrides(overrides), f"seed={config.seed}"]),
        tags=[
            config.dataset.name,
            config.model.name,
            str((trained_by or identity)["trainer"]),
            f"{config.norm} eps {eps_text(config.eps)}",
            *config.attack,
            *config.logger.tags,
        ],
        config=config.model_dump() | {"origin": trained_by},
    )
    results = ResultLog(folder, identity, tracker, scratch=not is_main())
    record = Record(folder, summary, results, tracker, artifacts=config.logger.artifacts)
    began = time.monotonic()
    try:
        atomic_write(folder / "config.yaml", text)
        with _log_file(folder / "run.log"):
            yield record
        total = summary["seconds"].get("total", 0.0) + time.monotonic() - began
        record.close(status="finished", seconds=summary["seconds"] | {"total": total}, files=_digests(folder))
    except Stopped as stopped:
        log.warning(str(stopped))
        record.close(status="stopped", error=str(stopped))
        raise
    except BaseException as error:
        record.close(status="failed", error=explain(error) or f"{type(error).__name__}: {error}")
        raise


def _discard(folder: Path, begun: Mapping[str, Any]) -> None:
    """Delete what aerl has written into a run folder. Killed in between, the next start continues."""
    write_summary(folder, begun)
    for name in _OWN[1:]:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def log_artifacts(tracker: Tracker, folder: Path, summary: Mapping[str, Any]) -> None:
    """Version in W&B what a finished run leaves: its outcomes, and the model it trained or evaluated.

    An evaluated model of another run is that run's artifact, from the same files: W&B then draws the line from the run
    that trained it to the one that evaluated it.
    """
    from aerl.training import checkpoint  # which needs torch

    headline = {key: summary[key] for key in ("clean_accuracy", "worst_case_accuracy")}
    origin = summary["origin"]
    owner = origin or summary
    if origin or summary["trainer"] != "none":
        place = Path(owner["folder"]) if origin else folder
        try:
            weights = checkpoint.find(summary["checkpoint"] if origin else str(folder))
        except UserError as error:  # removed since it was loaded
            log.warning("the model is no artifact in W&B: %s", error)
        else:
            files = {path.relative_to(place).as_posix(): path for path in (weights, place / "config.yaml")}
            metadata = {key: owner[key] for key in ("run_id", "trainer", "seed")} | ({} if origin else headline)
            tracker.artifact(f"model-{owner['run_id']}", "model", files, metadata, used=bool(origin))
    files = {name: folder / name for name in ("outcomes.npz", "summary.json")}
    metadata = headline | {"attacks": list(summary["attacks"])}
    tracker.artifact(f"outcomes-{summary['run_id']}", "outcomes", files, metadata, changing=["summary.json"])


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Log to run.log too, also how the run failed, which the command line prints itself."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except Exception as error:
        trace = None if isinstance(error, UserError) else (type(error), error, error.__traceback__)
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, str(error), (), trace))
        raise
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # a full disk, which is reported already
            handler.close()
