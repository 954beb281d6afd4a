"""The run folder: what it holds while a run is under way, and how it says how the run ended."""

import logging
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aerl.config import Config, config_hash, difference, explain, origin, telling
from aerl.files import atomic_write
from aerl.results import ResultLog, Tracker, open_tracker, read_summary, write_summary
from aerl.types import UserError

log = logging.getLogger("aerl")


@dataclass(frozen=True)
class Record:
    """What a run writes: its folder, its results, and a summary that is never behind."""

    folder: Path
    summary: dict[str, Any]
    results: ResultLog
    tracker: Tracker | None

    def save(self, **news: Any) -> None:
        self.summary.update(news)
        write_summary(self.folder, self.summary)

    def close(self, **news: Any) -> None:
        """Say how the run ended; W&B first, so that the summary knows where W&B's files are."""
        self.summary.update(news)
        if self.tracker is not None:
            self.tracker.summary({"status": self.summary["status"], "error": self.summary["error"]})
            self.tracker.finish(0 if self.summary["status"] == "finished" else 1)
            self.summary["wandb"] = self.tracker.where()
        self.save()


def earlier_start(folder: Path, config: Config) -> dict[str, Any]:
    """What `folder` knows of an earlier start of this very run; UserError if it holds another one."""
    summary = None if config.overwrite else read_summary(folder)
    if summary is None:
        return {}
    if summary.get("config_hash") != config_hash(config):
        raise UserError(
            f"run folder {folder}: holds another configuration ({difference(config, folder)}); "
            "name=NAME keeps both, overwrite=true discards it"
        )
    return summary


@contextmanager
def recorded(
    folder: Path,
    config: Config,
    earlier: Mapping[str, Any],
    *,
    overrides: Sequence[str],
    choices: Mapping[str, str],
    environment: Mapping[str, str],
) -> Iterator[Record]:
    """Open the run folder and W&B; on the way out say how it ended, whatever happened.

    `earlier` is what `earlier_start` found; `choices` are the options taken of the groups dataset and
    model, for whoever judges this run later.
    """
    if config.overwrite and folder.exists():
        shutil.rmtree(folder)
    run_id = earlier.get("run_id") or secrets.token_hex(4)
    identity = {
        "run_id": run_id,
        "seed": config.seed,
        "dataset": config.dataset.name,
        "model": config.model.name,
        "trainer": config.trainer_name,
    }
    summary: dict[str, Any] = {"attacks": {}, "seconds": {}, "best_epoch": None, **earlier}
    summary |= {
        "status": "running",
        "error": None,
        **identity,
        "folder": str(folder),
        "config_hash": config_hash(config),
        "epochs": config.trainer.epochs if config.trainer else None,
        "choices": dict(choices),
        "origin": None if config.trainer else origin(config.checkpoint),
        "environment": dict(environment),
        "masking": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tracker = open_tracker(
        folder=folder,
        run_id=run_id,
        job_type=config.trainer_name,
        name=" ".join([config.trainer_name, *telling(overrides), f"seed={config.seed}"]),
        tags=[
            config.dataset.name,
            config.model.name,
            config.trainer_name,
            *config.attack,
            *config.logger.tags,
        ],
        config=config.model_dump(),
        **config.logger.model_dump(exclude={"tags"}),
    )
    record = Record(folder, summary, ResultLog(folder, identity, tracker), tracker)
    began = time.monotonic()
    try:
        record.save()
        atomic_write(folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
        with _log_file(folder / "run.log"):
            yield record
        total = summary["seconds"].get("total", 0.0) + time.monotonic() - began
        record.close(status="finished", seconds=summary["seconds"] | {"total": total})
    except BaseException as error:
        record.close(status="failed", error=explain(error) or f"{type(error).__name__}: {error}")
        raise


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
        handler.close()
