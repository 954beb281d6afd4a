"""The table at the end of a multirun, over exactly its jobs, also those that left no run folder.

A Hydra callback notes each job's start and end, one JSON line each, in a folder that has a file for each job;
`aerl.run` adds the run folder. Hydra itself is not imported: it calls a callback's methods by their names.
Nothing heavy is imported before a multirun ends.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aerl.runtime import signals
from aerl.runtime.ddp import is_main

_manifest: Path | None = None  # the folder of the multirun under way
_then: list[str] = []  # the run that follows it

# What is overridden for the jobs is also meant for the run that follows them; dataset and model it takes from theirs.
_CARRIED = ("norm", "eps", "evaluation", "hardware", "logger", "runs_dir", "data_dir", "overwrite")


def note_job(job: int, **news: Any) -> None:
    """Add to what is known of a job of the multirun under way; without one this does nothing."""
    # A requeued job may outlive the folder.
    if is_main() and _manifest is not None and _manifest.is_dir():
        # A file for each job: two machines that append to one file over NFS overwrite each other's lines.
        with (_manifest / f"{job}.jsonl").open("a") as file:
            file.write(json.dumps(news) + "\n")


def wish(folder: Path | None = None) -> str | None:
    """By what name the multirun under way says overwrite=true: the same until all of its jobs are done; else None."""
    from aerl.report.status import planned_wish

    folder = folder or _manifest
    return None if folder is None else planned_wish(folder)


class Manifest:
    """The Hydra callback. Workers in other processes, also those of a requeued job, get it pickled."""

    def __init__(self, then: Sequence[str] = ()) -> None:
        """`then`: the overrides of a run that follows once all jobs are done. In them {runs} stands for the run
        folders of the jobs, {first} for the first of these, and {folder} for the multirun's under runs_dir."""
        self.then = list(then)
        self.folder: Path | None = None

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        from aerl.config.multirun import check_jobs, sweep_jobs
        from aerl.config.names import sweep_name
        from aerl.report import status
        from aerl.report.status import PLAN, planned
        from aerl.runtime.files import atomic_write, writing

        if not is_main():
            return
        global _manifest, _then
        self.on_run_start(config)
        words = list(config.hydra.overrides.task)
        launcher = [word for word in config.hydra.overrides.hydra if not word.startswith("hydra.mode=")]
        command = ["launch.py", *([] if "multirun_sweeps" in " ".join(words) else ["-m"]), *launcher, *words]
        with _ending_hydra():
            folder = Path(config.runs_dir).expanduser().absolute() / sweep_name(words) / "jobs"
            jobs = sweep_jobs(config)
            known = jobs is not None and jobs == planned(folder)
            if jobs is not None and not known:
                check_jobs(config, jobs)
            with writing(folder):
                if known and config.overwrite and all(job.state == "done" for job in status.jobs(folder.parent)):
                    known = False  # a new wish: all of them begin again
                plan = {
                    "command": command,
                    "jobs": jobs,
                    "wish": wish(folder) if known else secrets.token_hex(4),
                }
                if not known:  # else what is known of them still holds
                    shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
                atomic_write(folder / PLAN, json.dumps(plan))
        _manifest = self.folder = folder
        carried = [word for word in words if re.split("[=.]", word)[0] in _CARRIED]
        _then = [*self.then, *carried] if self.then else []
        if config.hydra.launcher.get("n_jobs", 1) != 1:  # joblib's; one at a time is done in this process
            signals.forward_to_workers()

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        from aerl.config.multirun import check_overrides

        with _ending_hydra():
            check_overrides(config)

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        global _manifest
        _manifest = self.folder
        if self.folder is not None:
            note_job(config.hydra.job.num, status="started", overrides=list(config.hydra.overrides.task))

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        if self.folder is None:
            return
        from aerl.config.errors import explain

        error = job_return._return_value if job_return.status.name == "FAILED" else None
        if error is None:
            note_job(config.hydra.job.num, status="finished")
        else:
            told = explain(error) or f"{type(error).__name__}: {error}"
            note_job(config.hydra.job.num, status="failed", error=told)

    def on_run_end(self, config: Any, **kwargs: Any) -> None:
        """Hydra calls every method of a callback."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Hydra leaves this out where a job has failed, so that launch.py calls `conclude` instead."""


@contextlib.contextmanager
def _ending_hydra() -> Iterator[None]:
    """End the process with the error's line: Hydra would warn of an exception in a callback, and go on."""
    from aerl.config.errors import explain
    from aerl.runtime.terminal import full_error, print_error

    try:
        yield
    except Exception as error:
        line = explain(error)
        if line is None or full_error():
            traceback.print_exception(error)
        elif is_main():
            print_error(line)
        sys.exit(1)


def print_table() -> None:
    """Print and write the tables over the jobs of the multirun that this process has started, if it has."""
    if _manifest is None or not _manifest.is_dir():
        return
    from aerl.report import page, runs, status
    from aerl.types import UserError

    out = _manifest.parent
    jobs = status.jobs(out)
    if all(job.state == "left" for job in jobs):  # told already: the command line was wrong
        shutil.rmtree(_manifest)
        with contextlib.suppress(OSError):
            out.rmdir()
            out.parent.rmdir()
        return
    folders = dict.fromkeys(job.folder for job in jobs if job.state == "done" and job.folder is not None)
    seen = runs.overview(folders, status.listed(jobs, "failed", "unfinished"))
    if folders or seen.failed:
        runs.show(seen)
    for line in seen.doubts:
        print(line, file=sys.stderr)
    done = all(job.state == "done" for job in jobs)
    print(f"\n{status.count(jobs)}{'' if done else '; the same command does what is not done'}")
    try:
        runs.write_tables(seen, out)
        page.write_set(seen, out)
    except UserError as error:
        print(f"no report: {error}", file=sys.stderr)
    else:
        print(f"written: {runs.shown(out / page.NAME)}, and beside it table.md, table.csv, table.tex")
    sys.stdout.flush()
    if _then and done:
        _follow([str(folder) for folder in folders])


def _follow(folders: Sequence[str]) -> None:
    """The run that needs all jobs' results; this command fails where it does."""
    assert _manifest is not None
    place = {
        "runs": ",".join(f'"{folder}"' for folder in folders),
        "first": folders[0],
        "folder": "/".join(_manifest.parent.parts[-2:]),
    }
    command = [sys.executable, str(Path(os.environ["AERL_ROOT"], "launch.py"))]
    command += [word.format_map(place) for word in _then]
    ours = ("HYDRA_FULL_ERROR", "TORCHELASTIC_RUN_ID")  # of this process alone
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    if code := subprocess.run(command, env=environment).returncode:
        sys.exit(code)
