"""The table at the end of a multirun, over exactly its jobs, also those without a run folder.

A Hydra callback writes the plan, and when each job starts and ends, to `jobs` in the multirun's folder; `aerl.run` adds
the run folder. The environment variable AERL_MULTIRUN names the multirun's folder to all its processes. Hydra itself is
not imported: it calls a callback's methods by their names.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aerl.config.errors import print_exception
from aerl.config.names import sweep_folder
from aerl.errors import UserError
from aerl.report.status import PLAN, count_text, read_jobs, read_plan, select
from aerl.runtime import signals
from aerl.runtime.ddp import is_main
from aerl.runtime.files import atomic_write, writing
from aerl.tracking.results import read_summary

_FOLDER = "AERL_MULTIRUN"
# Overrides of the jobs that also hold for the run that follows them; it has dataset and model from their checkpoints.
_INHERITED = ("norm", "eps", "evaluation", "hardware", "logger", "runs_dir", "data_dir", "overwrite")


def _current() -> Path | None:
    """The folder of the multirun that this process belongs to."""
    return Path(os.environ[_FOLDER]) if os.environ.get(_FOLDER) else None


def note_job(job: int, **news: Any) -> None:
    """Add to what is known about a job of the current multirun, if there is one."""
    folder = _current()
    if is_main() and folder is not None and (folder / "jobs").is_dir():  # a requeued job may outlive it
        # A file for each job: two machines that append to one file over NFS overwrite each other's lines.
        with (folder / "jobs" / f"{job}.jsonl").open("a") as file:
            file.write(json.dumps(news) + "\n")


def overwrite_id() -> str | None:
    """Names the command that asked for overwrite=true: the same for every repetition of a multirun until all of its
    jobs are done. None outside of a multirun."""
    folder = _current()
    return None if folder is None else read_plan(folder).get("overwrite_id")


class Manifest:
    """The Hydra callback. Workers in other processes, also those of a requeued job, get it pickled."""

    def __init__(self, then: Sequence[str] = (), stop_at_failure: bool = False) -> None:
        """`stop_at_failure`: no job starts after one has failed, and running ones are saved.

        `then`: the overrides of a run that follows when all jobs are done. In them {runs} stands for the run
        folders of the jobs, {first} for the one with the weights of the first, and {folder} for the multirun's under
        runs_dir."""
        self.then, self.stop_at_failure, self.process = list(then), stop_at_failure, os.getpid()
        self.folder: Path | None = None

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        os.environ.pop(_FOLDER, None)  # inherited from a multirun that this process is not part of

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        if not is_main():
            return
        self.on_run_start(config)
        with _exit_on_error():
            self.folder = sweep_folder(Path(config.runs_dir).expanduser().absolute(), config.hydra.overrides.task)
            self._plan(config, self.folder)
        os.environ[_FOLDER] = str(self.folder)
        if config.hydra.launcher.get("n_jobs", 1) != 1:  # joblib's; one at a time runs in this process
            signals.forward_to_workers()

    def _plan(self, config: Any, folder: Path) -> None:
        """Check all jobs and write the plan; what is known about the same jobs remains."""
        from aerl.config.multirun import check_jobs, sweep_jobs

        inherited = [word for word in config.hydra.overrides.task if re.split("[=.]", word)[0] in _INHERITED]
        if any(word.startswith("multirun_sweeps=") for word in self.then):
            inherited += [word for word in config.hydra.overrides.hydra if re.match("hydra[/.]launcher", word)]
        jobs, before = sweep_jobs(config), read_plan(folder)
        same = jobs is not None and jobs == before.get("jobs")
        if jobs is not None and not same:
            check_jobs(config, jobs)
        if config.overwrite and not select(read_jobs(folder), "failed", "unfinished", "left"):
            same = False  # all of them start again
        plan = {
            "command": ["launch.py", *sys.argv[1:]],
            "jobs": jobs,
            "overwrite_id": before.get("overwrite_id") if same else secrets.token_hex(4),
            "then": [*self.then, *inherited] if self.then else [],
        }
        with writing(folder / "jobs"):
            if not same:
                shutil.rmtree(folder / "jobs", ignore_errors=True)
            (folder / "jobs").mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "jobs" / PLAN, json.dumps(plan))

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        if self.folder is not None:
            os.environ[_FOLDER] = str(self.folder)
            note_job(config.hydra.job.num, status="started", overrides=list(config.hydra.overrides.task))

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        if self.folder is not None:
            failed = job_return.status.name == "FAILED"
            error = str(job_return._return_value) if failed else ""  # in one line: aerl.config.cli.run_job raised it
            note_job(config.hydra.job.num, status="failed" if failed else "finished", error=error)
            if failed and self.stop_at_failure and not signals.received():
                print(f"job {config.hydra.job.num} failed, and stop_at_failure is set", file=sys.stderr, flush=True)
                if self.process == os.getpid():
                    sys.exit(1)
                if signals.is_worker():  # of joblib; on Slurm the number may be another process of this machine
                    os.kill(self.process, signal.SIGTERM)  # which it forwards to the workers

    def on_run_end(self, config: Any, **kwargs: Any) -> None:
        """Hydra calls every method of a callback."""

    on_multirun_end = on_run_end  # not called if a job fails, so launch.py calls `print_table`


@contextlib.contextmanager
def _exit_on_error() -> Iterator[None]:
    """End the process with the error's line: Hydra would only warn of an exception in a callback."""
    try:
        yield
    except Exception as error:
        print_exception(error)
        sys.exit(1)


def print_table() -> None:
    """Print and write the tables over the jobs of the multirun that this process started, if any."""
    out = _current()
    if out is None or not (out / "jobs").is_dir():
        return
    from aerl.report import runs  # and pandas

    jobs = read_jobs(out)
    if len(select(jobs, "left")) == len(jobs):  # the command line was wrong, which is reported already
        shutil.rmtree(out / "jobs")
        with contextlib.suppress(OSError):  # an earlier table is there
            os.removedirs(out)
        return
    folders = list(dict.fromkeys(job.folder for job in select(jobs, "done") if job.folder is not None))
    try:
        runs.publish(runs.overview(folders, [job.text for job in select(jobs, "failed", "unfinished")]), out)
    except UserError as error:
        print(f"no report: {error}", file=sys.stderr)
    done = len(select(jobs, "done")) == len(jobs)
    print(count_text(jobs) + ("" if done else "; the same command does what is not done"), flush=True)
    if done and (then := read_plan(out).get("then")):
        _run_then(then, folders, out)


def _run_then(then: Sequence[str], folders: Sequence[Path], out: Path) -> None:
    """Start the run that needs all jobs' results; this process fails if it does."""
    runs, folder = ",".join(f'"{folder}"' for folder in folders), "/".join(out.parts[-2:])
    first = ((read_summary(folders[0]) or {}).get("origin") or {}).get("folder") or folders[0]
    words = [word.format(runs=runs, first=first, folder=folder) for word in then]
    command = [sys.executable, str(Path(os.environ["AERL_ROOT"], "launch.py")), *words]
    ours = ("HYDRA_FULL_ERROR", "TORCHELASTIC_RUN_ID", _FOLDER)  # of this process alone
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    if code := subprocess.run(command, env=environment).returncode:
        sys.exit(code)
