"""`python -m aerl.report.status [FOLDER]`: how far the multiruns are, what failed and why, and what remains.

From files alone, also while a multirun is running, and from another machine that sees the folder.
"""

import contextlib
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aerl.report.table import duration, shown
from aerl.runtime.terminal import Parser, command, one_line
from aerl.tracking.results import read_summary
from aerl.types import UserError

PLAN = "plan.json"  # in the folder `jobs` of a multirun, beside a file for each job
_LONGEST_LIST = 20  # of the jobs in one state

State = Literal["done", "failed", "unfinished", "left"]
_STATES: dict[str, State] = {"left": "left", "started": "unfinished", "failed": "failed", "finished": "done"}


@dataclass(frozen=True)
class Job:
    """A job of a multirun: `words` are the overrides that not all jobs share, `reason` says why it is not done."""

    number: int
    words: Sequence[str]
    state: State
    folder: Path | None = None
    reason: str = ""

    def __str__(self) -> str:
        where = "" if self.folder is None else f", {shown(self.folder)}"
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.state}: job {self.number} ({' '.join(self.words)}){where}{reason}"


def read_plan(multirun: Path) -> dict[str, Any]:
    """The `command`, the overrides of all `jobs` (None where the sweeper finds them as it goes), and what the Hydra
    callback notes beside these; {} without a readable plan."""
    try:
        plan = json.loads((multirun / "jobs" / PLAN).read_text())
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


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
        words = [word for word in job["overrides"] if word not in shared]
        state = _STATES[job["status"]]
        folder = Path(job["folder"]) if "folder" in job else None
        reason = _progress(folder) if state == "unfinished" else ""
        jobs.append(Job(number, words, state, folder, one_line(job["error"]) if state == "failed" else reason))
    return jobs


def _progress(folder: Path | None) -> str:
    """What is known of a job that has started and not ended."""
    if folder is None or not (folder / "summary.json").exists():
        return "started; nothing written yet"
    try:
        summary = read_summary(folder) or {}
    except UserError as error:
        return str(error)
    if summary.get("status") == "stopped":
        return str(summary["error"])
    files = [file for file in (*folder.glob("*"), *folder.glob("checkpoints/*.pt")) if file.is_file()]
    ago = duration(max(0.0, time.time() - max(file.stat().st_mtime for file in files)))
    return f"running, or killed; last wrote {ago} ago"


def count_text(jobs: Sequence[Job]) -> str:
    """One line, such as `12 jobs: 9 done, 3 failed, 0 left`."""
    states = Counter(job.state for job in jobs)
    unfinished = f"{states['unfinished']} unfinished, " if states["unfinished"] else ""
    return f"{len(jobs)} jobs: {states['done']} done, {states['failed']} failed, {unfinished}{states['left']} left"


def list_jobs(jobs: Sequence[Job], *states: State) -> Iterator[str]:
    """A line for each job in one of these states, up to a number."""
    for state in states:
        lines = [str(job) for job in jobs if job.state == state]
        yield from lines[:_LONGEST_LIST]
        if len(lines) > _LONGEST_LIST:
            yield f"{state}: {len(lines) - _LONGEST_LIST} more"


@command
def main(words: Sequence[str] | None = None) -> int:
    """Exit code 0 where every job of every multirun is done, else 1."""
    parser = Parser(prog="python -m aerl.report.status", description="How far the multiruns are, and what remains.")
    where = "a multirun's folder, or one that holds multiruns, such as runs_dir (default: runs)"
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help=where)
    folder = parser.parse_args(words).folder
    multiruns = sorted(path.parent for path in folder.rglob("jobs") if any(path.glob("*.json*")))
    if not multiruns:
        reason = "holds no multirun" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {reason}; runs that were started one by one: python -m aerl.report")
    done = True
    for multirun in multiruns:
        jobs = read_jobs(multirun)
        print(f"{shown(multirun)}: {count_text(jobs)}")
        for line in list_jobs(jobs, "failed", "unfinished", "left"):
            print(f"  {line}")
        if any(job.state != "done" for job in jobs):
            done = False
            print(f"  the rest: {shlex.join(['python', *read_plan(multirun).get('command', [])])}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
