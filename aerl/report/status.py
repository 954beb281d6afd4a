"""`python -m aerl.report.status [FOLDER]`: how far the multiruns are, what failed and why, and what is left.

From files alone, also while a multirun is under way, and from another machine that sees the folder.
"""

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aerl.report.runs import one_line, shown
from aerl.report.table import duration
from aerl.runtime.terminal import Parser, command, print_error
from aerl.tracking.results import read_summary
from aerl.types import UserError

PLAN = "plan.json"
_SHOWN = 20  # of the jobs in one state; the others are counted

State = Literal["done", "failed", "unfinished", "left"]


@dataclass(frozen=True)
class Job:
    """A job of a multirun: `words` are the overrides that not all of its jobs share, `reason` why it is not done."""

    number: int
    words: Sequence[str]
    state: State
    folder: Path | None
    reason: str = ""

    def __str__(self) -> str:
        where = "" if self.folder is None else f", {shown(self.folder)}"
        told = f": {self.reason}" if self.reason else ""
        return f"{self.state}: job {self.number} ({' '.join(self.words)}){where}{told}"


def jobs(multirun: Path) -> list[Job]:
    """The jobs of the multirun whose folder this is, also those that were never begun."""
    noted = _noted(multirun / "jobs")
    shared = set.intersection(*(set(job["overrides"]) for job in noted.values())) if len(noted) > 1 else set()
    return [
        _job(number, [word for word in job["overrides"] if word not in shared], job)
        for number, job in sorted(noted.items())
    ]


def remaining(multirun: Path) -> str:
    """The command line that does what is left."""
    return shlex.join(["python", *_read(multirun / "jobs").get("command", [])])


def count(found: Sequence[Job]) -> str:
    """One line, such as `12 jobs: 9 done, 3 failed, 0 left`."""
    states = Counter(job.state for job in found)
    unfinished = f"{states['unfinished']} unfinished, " if states["unfinished"] else ""
    return f"{len(found)} jobs: {states['done']} done, {states['failed']} failed, {unfinished}{states['left']} left"


def listed(found: Sequence[Job], *states: State) -> Iterator[str]:
    """A line for each job in one of these states, and one for those that would be too many."""
    for state in states:
        lines = [str(job) for job in found if job.state == state]
        yield from lines[:_SHOWN]
        if len(lines) > _SHOWN:
            yield f"{state}: {len(lines) - _SHOWN} more"


def _job(number: int, words: Sequence[str], noted: dict[str, Any]) -> Job:
    folder = Path(noted["folder"]) if "folder" in noted else None
    if noted["status"] == "left":
        return Job(number, words, "left", None)
    if noted["status"] == "failed":
        return Job(number, words, "failed", folder, one_line(noted["error"]))
    if noted["status"] == "finished":
        return Job(number, words, "done", folder)
    return Job(number, words, "unfinished", folder, _under_way(folder))


def _under_way(folder: Path | None) -> str:
    """What a job that has begun and not ended is doing: a killed one cannot tell."""
    if folder is None:
        return "begun; nothing written yet"
    try:
        summary = read_summary(folder) or {}
    except UserError as error:
        return str(error)
    if summary.get("status") == "stopped":
        return str(summary["error"])
    files = [file for file in (*folder.glob("*"), *folder.glob("checkpoints/*.pt")) if file.is_file()]
    if not files:
        return "begun; nothing written yet"
    ago = duration(max(0.0, time.time() - max(file.stat().st_mtime for file in files)))
    return f"running, or killed; last wrote {ago} ago"


def _noted(folder: Path) -> dict[int, dict[str, Any]]:
    """What was noted of each job, the later over the earlier; a line torn by a killed process is passed over."""
    found: dict[int, dict[str, Any]] = {
        number: {"status": "left", "overrides": words} for number, words in enumerate(planned(folder) or [])
    }
    for file in folder.glob("*.jsonl"):
        job = found.setdefault(int(file.stem), {"status": "started", "overrides": []})
        for line in file.read_text().splitlines():
            try:
                job.update(json.loads(line))
            except ValueError:
                continue
    return found


def planned(folder: Path) -> list[list[str]] | None:
    """The overrides of every job, where they were known before; `folder` is the multirun's `jobs`."""
    return _read(folder).get("jobs")


def planned_wish(folder: Path) -> str | None:
    """See `multirun.wish`."""
    return _read(folder).get("wish")


def _read(folder: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((folder / PLAN).read_text())
    except (OSError, ValueError):
        return {}
    return told


@command
def main(words: Sequence[str] | None = None) -> int:
    """Exit code 0 where every job of every multirun is done, else 1."""
    parser = Parser(prog="python -m aerl.report.status", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER",
        help="a multirun's folder, or one that holds multiruns, such as runs_dir (default: runs)",
    )  # fmt: skip
    folder = parser.parse_args(words).folder
    found = sorted(path.parent for path in folder.rglob("jobs") if any(path.glob("*.json*")))
    if not found:
        reason = "holds no multirun" if folder.is_dir() else "no such folder"
        print_error(f"{folder}: {reason}; runs that were started one by one: python -m aerl.report")
        return 1
    everything = True
    for multirun in found:
        told = jobs(multirun)
        print(f"{shown(multirun)}: {count(told)}")
        for line in listed(told, "failed", "unfinished", "left"):
            print(f"  {line}")
        if any(job.state != "done" for job in told):
            everything = False
            print(f"  the rest: {remaining(multirun)}")
    return 0 if everything else 1


if __name__ == "__main__":
    sys.exit(main())
