"""The table at the end of a multirun, over exactly its jobs, also those that left no run folder.

A Hydra callback notes each job's start and end, one JSON line each, in a folder that has a file for each job;
`aerl.run` adds the run folder. Hydra itself is not imported: it calls a callback's methods by their names.
Nothing heavy is imported before a multirun ends.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aerl import interrupt
from aerl.distributed import is_main

_manifest: Path | None = None  # the folder of the multirun under way


def note(job: int, **news: Any) -> None:
    """Add to what is known of a job of the multirun under way; without one this does nothing."""
    # A requeued job may outlive the folder.
    if is_main() and _manifest is not None and _manifest.is_dir():
        # A file for each job: two machines that append to one file over NFS overwrite each other's lines.
        with (_manifest / f"{job}.jsonl").open("a") as file:
            file.write(json.dumps(news) + "\n")


class Manifest:
    """The Hydra callback. Workers in other processes, also those of a requeued job, get it pickled."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        from aerl.config import sweep_name
        from aerl.files import writing
        from aerl.types import UserError

        if not is_main():
            return
        global _manifest
        folder = Path(config.runs_dir).expanduser().absolute() / sweep_name(config.hydra.overrides.task)
        jobs = folder / "jobs"
        try:
            with writing(folder):
                shutil.rmtree(jobs, ignore_errors=True)
                jobs.mkdir(parents=True, exist_ok=True)
        except UserError as error:
            sys.exit(f"error: {error}")  # any other exception Hydra would warn of, and go on
        _manifest = self.folder = jobs
        if config.hydra.launcher.get("n_jobs", 1) != 1:  # joblib's; one at a time is done in this process
            interrupt.hand_on()

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        """Hydra calls every method of a callback."""

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        global _manifest
        _manifest = self.folder
        if self.folder is not None:
            note(config.hydra.job.num, status="started", overrides=list(config.hydra.overrides.task))

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        if self.folder is None:
            return
        from aerl.config import explain

        error = job_return._return_value if job_return.status.name == "FAILED" else None
        if error is None:
            note(config.hydra.job.num, status="finished")
        else:
            told = explain(error) or f"{type(error).__name__}: {error}"
            note(config.hydra.job.num, status="failed", error=told)

    def on_run_end(self, config: Any, **kwargs: Any) -> None:
        """Hydra calls every method of a callback."""

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Hydra leaves this out where a job has failed, so that launch.py calls `conclude` instead."""


def conclude() -> None:
    """Print and write the tables over the jobs of the multirun that this process has started, if it has."""
    if _manifest is None or not _manifest.is_dir():
        return
    from aerl.report import page, runs
    from aerl.types import UserError

    jobs, folders, failed = _jobs(_manifest), [], []
    shared = set.intersection(*(set(job["overrides"]) for job in jobs.values())) if len(jobs) > 1 else set()
    for number, job in sorted(jobs.items()):
        if job["status"] == "finished":
            folders += [Path(job["folder"])] if "folder" in job else []
        else:
            told = [word for word in job["overrides"] if word not in shared]
            failed.append(_reason(f"job {number} ({' '.join(told)})", job))
    if not jobs:  # told already: the command line was wrong
        with contextlib.suppress(OSError):
            _manifest.rmdir()
            _manifest.parent.rmdir()
            _manifest.parent.parent.rmdir()
    if not folders and not failed:
        return
    seen = runs.overview(dict.fromkeys(folders), failed)
    runs.show(seen)
    for line in seen.doubts:
        print(line, file=sys.stderr)
    out = _manifest.parent
    try:
        runs.write_tables(seen, out)
        page.write_set(seen, out)
    except UserError as error:
        print(f"no report: {error}", file=sys.stderr)
        return
    print(f"\nwritten: {runs.shown(out / page.NAME)}, and beside it table.md, table.csv, table.tex")


def _jobs(manifest: Path) -> dict[int, dict[str, Any]]:
    """What was noted of each job, the later over the earlier; a line torn by a killed process is passed over."""
    jobs: dict[int, dict[str, Any]] = {}
    for file in manifest.glob("*.jsonl"):
        job = jobs[int(file.stem)] = {"status": "started", "overrides": []}
        for news in _lines(file):
            job.update(news)
    return jobs


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _reason(name: str, job: Mapping[str, Any]) -> str:
    from aerl.report.runs import one_line, shown

    what = f"{name}, {shown(Path(job['folder']))}" if "folder" in job else name
    if job["status"] == "failed":
        return f"failed: {what}: {one_line(job['error'])}"
    return f"unfinished: {what}: killed or interrupted; the same command goes on with it"
