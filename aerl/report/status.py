"""`python -m aerl.report.status [FOLDER]`: how far all runs are, what failed and why, and what remains.

From files alone, also while a multirun is running, and from another machine that sees the folder.
"""

import contextlib
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aerl.errors import UserError
from aerl.report.table import duration, shown
from aerl.runtime.terminal import Parser, command, one_line
from aerl.tracking.results import find_runs, read_summary

PLAN = "plan.json"  # in the folder `jobs` of a multirun, next to a file for each job
_STATES = {"started": "unfinished", "finished": "done"}  # as reported by the callback; other words are the same


class Job(NamedTuple):
    """A job of a multirun, or a run by itself."""

    state: str  # done, failed, unfinished or left
    folder: Path | None
    text: str  # its number, the overrides that not all jobs share, its folder, and why it is not done


def read_plan(multirun: Path) -> dict[str, Any]:
    """What the Hydra callback planned: `command`, the overrides of all `jobs` (None if the sweeper chooses them one by
    one), `overwrite_id` and `then`; {} without a readable plan."""
    try:
        return dict(json.loads((multirun / "jobs" / PLAN).read_text()))
    except (OSError, TypeError, ValueError):
        return {}


def read_jobs(multirun: Path) -> list[Job]:
    """The jobs of a multirun, also those that never started."""
    planned = enumerate(read_plan(multirun).get("jobs") or [])
    noted: dict[int, dict[str, Any]] = {number: {"status": "left", "overrides": words} for number, words in planned}
    for file in (multirun / "jobs").glob("*.jsonl"):
        job = noted.setdefault(int(file.stem), {"status": "started", "overrides": []})
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line torn by a killed process
                job.update(json.loads(line))
    shared = set.intersection(*(set(job["overrides"]) for job in noted.values())) if len(noted) > 1 else set()
    jobs = []
    for number, job in sorted(noted.items()):
        state = _STATES.get(job["status"], job["status"])
        folder = Path(job["folder"]) if "folder" in job else None
        text = f"{state}: job {number} ({' '.join(word for word in job['overrides'] if word not in shared)})"
        where = f", {shown(folder)}" if folder else ""
        reason = _progress(folder) if state == "unfinished" else job.get("error")
        jobs.append(Job(state, folder, one_line(f"{text}{where}{': ' if reason else ''}{reason or ''}")))
    return jobs


def _progress(folder: Path | None) -> str:
    """What is known about a job that started and did not end."""
    if folder is None or not (folder / "summary.json").exists():
        return "started; nothing written yet"
    with contextlib.suppress(UserError):
        if (summary := read_summary(folder) or {}).get("status") == "stopped":
            return str(summary["error"])
    last = max(path.stat().st_mtime for path in folder.glob("[!.]*"))
    return f"running, or killed; last wrote {duration(max(0.0, time.time() - last))} ago"


def select(jobs: Sequence[Job], *states: str) -> list[Job]:
    """The jobs in these states, in this order."""
    return [job for state in states for job in jobs if job.state == state]


def count_text(jobs: Sequence[Job], unit: str = "jobs") -> str:
    """One line, such as `12 jobs: 9 done, 3 failed, 0 left`."""
    states = Counter(job.state for job in jobs)
    unfinished = f", {states['unfinished']} unfinished" if states["unfinished"] else ""
    left = f", {states['left']} left" if unit == "jobs" else ""
    return f"{len(jobs)} {unit}: {states['done']} done, {states['failed']} failed{unfinished}{left}"


def single_runs(folder: Path, known: Collection[Path]) -> list[Job]:
    """The run folders in a folder, at any depth, that are not `known` as those of jobs."""
    jobs = []
    for run in find_runs(folder):
        if run.absolute() in known:
            continue
        try:
            summary = read_summary(run) or {}
            status, error = str(summary.get("status")), summary.get("error")
        except UserError as damaged:
            status, error = "failed", str(damaged)
        state = {"finished": "done", "failed": "failed"}.get(status, "unfinished")
        reason = _progress(run) if state == "unfinished" else error
        jobs.append(Job(state, run, one_line(f"{state}: {shown(run)}{': ' if reason else ''}{reason or ''}")))
    return jobs


@command
def main(words: Sequence[str] | None = None) -> int:
    """Exit code 0 if every job of every multirun, and every other run, is done, else 1."""
    parser = Parser(prog="python -m aerl.report.status", description="How far all runs are, and what remains.")
    where = "a folder that contains runs or multiruns at any depth, such as runs_dir (default: runs)"
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help=where)
    folder = parser.parse_args(words).folder
    multiruns = sorted(path.parent for path in folder.rglob("jobs") if any(path.glob("*.json*")))
    code, known = 0, set()
    for multirun in multiruns:
        jobs = read_jobs(multirun)
        known |= {job.folder.absolute() for job in jobs if job.folder is not None}
        print(f"{shown(multirun)}: {count_text(jobs)}")
        if rest := select(jobs, "failed", "unfinished", "left"):
            code = 1
            print(*(f"  {job.text}" for job in rest), sep="\n")
            print(f"  the rest: {shlex.join(['python', *read_plan(multirun).get('command', [])])}")
    if single := single_runs(folder, known):
        print(f"{shown(folder)}, single runs: {count_text(single, 'runs')}")
        if rest := select(single, "failed", "unfinished"):
            code = 1
            print(*(f"  {run.text}" for run in rest), sep="\n")
    if not multiruns and not single:
        raise UserError(f"{folder}: {'holds no run' if folder.is_dir() else 'no such folder'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
