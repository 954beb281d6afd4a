"""The run folder: what it holds while a run is under way, how it says how the run ended, what an earlier start left.

Everything that is read back is sealed: summary.json, the .npz files and the checkpoints by a digest inside them,
results.jsonl by one in whatever says how far the run has come, and all files of a finished run by `files` of
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


# What aerl writes into a run folder, and what overwrite=true discards.
_OWN = (
    "summary.json", "config.yaml", "results.jsonl", "outcomes.npz", "examples.npz", "progress.npz", "report.html",
    "run.log", "checkpoints", "figures", "tables", "wandb",
)  # fmt: skip
# What cannot be made again without training.
_TRAINED = ("results.jsonl", "checkpoints/")
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
        """Save, together with the results logged so far: a restart comes back to here."""
        self.save(results=self.results.seal(), **news)

    def close(self, **news: Any) -> None:
        """Say how the run ended; once more after W&B, so that the summary knows where W&B's files are."""
        self.save(**news)
        if self.tracker is not None:
            self.tracker.summary({"status": self.summary["status"], "error": self.summary["error"]})
            if self.artifacts and self.summary["status"] == "finished":
                log_artifacts(self.tracker, self.folder, self.summary)
            self.tracker.finish(0 if self.summary["status"] == "finished" else 1)
            self.summary["wandb"] = self.tracker.where()
        self.save()


def earlier_start(folder: Path, config: Config, wish: str | None = None) -> dict[str, Any]:
    """What `folder` knows of an earlier start of this very run; {} where there was none.

    overwrite=true is used up once: a run that it began, and that was stopped or killed, goes on. In a multirun `wish`
    names the command that said it. Raises UserError where the folder holds another run, damaged files, or other things.
    """
    try:
        summary = read_summary(folder)
    except UserError:
        if not config.overwrite or _foreign(folder):
            raise
        return {"status": _DISCARDED}
    if summary is None or "config_hash" not in summary:
        if foreign := _foreign(folder, summary):
            others = ", ".join(foreign[:3])
            raise UserError(f"run folder {folder}: holds other files ({others}) and no run; choose another name=NAME")
        if any(_holds_something(folder / name) for name in _OWN) and not config.overwrite:
            raise UserError(
                f"run folder {folder}: its summary.json is missing; restore it, or overwrite=true begins again"
            )
        return {"status": _DISCARDED} if config.overwrite else {}
    same = summary["config_hash"] == config_hash(config)
    if config.overwrite and not (same and _used_up(summary, wish)):
        return {"status": _DISCARDED}
    if not same:
        raise UserError(
            f"run folder {folder}: holds another configuration ({difference(config, folder)}); "
            "name=NAME keeps both, overwrite=true discards it"
        )
    if config.overwrite and summary["status"] != _DISCARDED:
        log.info("overwrite=true has begun this run already: going on with it")
    return summary


def _holds_something(path: Path) -> bool:
    """Whether there is a file, or a folder with something in it: W&B's may be a disk of its own, still empty."""
    if path.is_dir():
        return any(one.name != "lost+found" for one in path.iterdir())
    return path.exists()


def _used_up(summary: Mapping[str, Any], wish: str | None) -> bool:
    if wish is None:
        return summary.get("wish") is not None and summary["status"] in (_DISCARDED, "running", "stopped")
    return bool(summary.get("wish") == wish)


def _foreign(folder: Path, summary: Mapping[str, Any] | None = None) -> list[str]:
    """The files and folders in `folder` that aerl does not write."""
    own = _OWN if summary is None else _OWN[1:]  # a summary.json of somebody else's
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if name not in own and name != ".lock" and not name.startswith(".summary.json.")]


def whole(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run as it is to be believed: unfinished where files are not as the run left them.

    What can be measured again is, which is logged. Raises UserError where training would have to be repeated.
    """
    lost = changed_files(folder, summary)
    trained = [name for name in lost if name.startswith(_TRAINED)]
    if trained and summary["trainer"] != "none":
        raise UserError(
            f"run folder {folder}: {trained[0]} is missing, damaged or was changed since the run finished; restore it, "
            "or begin the run again with overwrite=true"
        )
    failed = [name for name, row in (summary.get("analyses") or {}).items() if row["status"] == "failed"]
    if not lost and not failed:
        return summary
    summary = {**summary, "status": "running"}
    if lost:
        log.warning("%s: not as the run left it, and made again: %s", folder, ", ".join(lost))
    if any(name.startswith(("figures/", "tables/")) for name in lost):
        summary |= {"analyses": {}, "results": summary["evaluated"]}
    if any(name in ("results.jsonl", "outcomes.npz", "examples.npz") for name in lost):
        summary |= unattacked()
    return summary


def unattacked() -> dict[str, Any]:
    """What a summary says before the first attack."""
    return {"attacks": {}, "analyses": {}, "masking": None, "evaluated": None}


def _files(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a run that somebody may read back."""
    paths = [folder / name for name in ("config.yaml", "results.jsonl", "outcomes.npz", "examples.npz")]
    paths += [path for name in ("checkpoints", "figures", "tables") for path in sorted((folder / name).glob("*"))]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths if path.is_file()}


@contextmanager
def recorded(
    folder: Path,
    config: Config,
    earlier: Mapping[str, Any],
    *,
    overrides: Sequence[str],
    choices: Mapping[str, str],
    environment: Mapping[str, str],
    inputs: Mapping[str, str],
    wish: str | None = None,
) -> Iterator[Record]:
    """Open the run folder and W&B; on the way out say how it ended, whatever happened.

    `earlier` is what `earlier_start` found; `choices` are the options taken of the groups dataset and
    model, for whoever judges this run later; `inputs` are the digests of what the run reads.
    """
    run_id = earlier.get("run_id") or secrets.token_hex(4)
    identity = {
        "run_id": run_id,
        "seed": config.seed,
        "dataset": config.dataset.name,
        "model": config.model.name,
        "trainer": config.trainer_name,
    }
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    taken = None if config.trainer else origin(config.checkpoint)
    trainer = config.trainer_name if taken is None else str(taken["trainer"])
    begun: dict[str, Any] = {"status": _DISCARDED, **identity, "config_hash": config_hash(config)}
    begun |= {"wish": (wish or "single") if config.overwrite else None}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if earlier.get("status") == _DISCARDED:
            _discard(folder, begun)
            earlier = {}
    summary: dict[str, Any] = {**unattacked(), "seconds": {}, "best_epoch": None, **begun, **earlier}
    summary |= {
        "status": "running",
        "error": None,
        "folder": str(folder),
        "epochs": config.trainer.epochs if config.trainer else None,
        "choices": dict(choices),
        "overrides": list(overrides),
        "checkpoint": config.checkpoint,
        "origin": taken,
        "environment": dict(environment),
        "inputs": dict(inputs),
        "files": {"config.yaml": hashlib.sha256(text.encode()).hexdigest()},
    }
    write_summary(folder, summary)
    logger = config.logger.model_dump(include={"mode", "project", "entity"})
    tracker = open_tracker(
        folder=folder,
        run_id=run_id,
        group=config.logger.group or group_name(config, overrides),
        job_type="train" if config.trainer else "evaluate",
        name=" ".join([config.trainer_name, *distinguishing_overrides(overrides), f"seed={config.seed}"]),
        tags=[
            config.dataset.name,
            config.model.name,
            trainer,
            f"{config.norm} eps {eps_text(config.eps)}",
            *config.attack,
            *config.logger.tags,
        ],
        config=config.model_dump() | {"origin": taken},
        **logger | ({} if is_main() else {"mode": "disabled"}),
    )
    results = ResultLog(folder, identity, tracker, scratch=not is_main())
    record = Record(folder, summary, results, tracker, artifacts=config.logger.artifacts)
    began = time.monotonic()
    try:
        atomic_write(folder / "config.yaml", text)
        with _log_file(folder / "run.log"):
            yield record
        total = summary["seconds"].get("total", 0.0) + time.monotonic() - began
        seconds = summary["seconds"] | {"total": total}
        record.close(status="finished", seconds=seconds, files=_files(folder))
    except Stopped as stopped:
        log.warning(str(stopped))
        record.close(status="stopped", error=str(stopped))
        raise
    except BaseException as error:
        record.close(status="failed", error=explain(error) or f"{type(error).__name__}: {error}")
        raise


def _discard(folder: Path, begun: Mapping[str, Any]) -> None:
    """Empty a run folder of what aerl has written. Killed in between, the next start goes on with it."""
    write_summary(folder, begun)
    for name in _OWN[1:]:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def log_artifacts(tracker: Tracker, folder: Path, summary: Mapping[str, Any]) -> None:
    """Give W&B what a finished run leaves, versioned: its outcomes, and the model it trained or judged.

    A judged model of another run is that run's artifact under its name, from the same files, so that W&B draws
    the line from the run that trained it to the one that judged it.
    """
    from aerl.training import checkpoint  # which needs torch

    headline = {key: summary[key] for key in ("clean_accuracy", "worst_case_accuracy")}
    taken = summary["origin"]
    owner = summary if taken is None else taken
    if summary["trainer"] != "none" or taken is not None:
        place = folder if taken is None else Path(taken["folder"])
        try:
            weights = checkpoint.find(str(folder) if taken is None else summary["checkpoint"])
        except UserError as error:  # removed since it was loaded
            log.warning("W&B is not told of the model: %s", error)
        else:
            files = {path.relative_to(place).as_posix(): path for path in (weights, place / "config.yaml")}
            metadata = {key: owner[key] for key in ("run_id", "trainer", "seed")}
            metadata |= headline if taken is None else {}
            tracker.artifact(f"model-{owner['run_id']}", "model", files, metadata, used=taken is not None)
    files = {name: folder / name for name in ("outcomes.npz", "summary.json")}
    metadata = headline | {"attacks": list(summary["attacks"])}
    tracker.artifact(f"outcomes-{summary['run_id']}", "outcomes", files, metadata, changing=["summary.json"])


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Everything logged also goes to run.log, and how the run failed, which the command line says by itself."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except Exception as error:
        expected = isinstance(error, UserError)
        trace = None if expected else (type(error), error, error.__traceback__)
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, str(error), (), trace))
        raise
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # of a full disk, which the error under way tells
            handler.close()
