"""`python -m aerl.report FOLDER...`: tables and pages about runs that were made before."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from aerl.report import page, runs
from aerl.runtime.terminal import Parser, command, one_line
from aerl.types import UserError


@command
def main(words: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 where no run was found or nothing could be written."""
    parser = Parser(
        prog="python -m aerl.report",
        description="Tables over runs and seeds, and pages to look at, from the files of run folders alone.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="searched for run folders, at any depth"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where table.md, table.csv, table.tex and report.html go (default: the FOLDER, if it is one, else here)",
    )  # fmt: skip
    given = parser.parse_args(words)
    out = given.out or (given.folders[0] if len(given.folders) == 1 else Path())
    found: list[Path] = []
    without: list[str] = []
    for folder in given.folders:
        try:
            found += runs.run_folders(folder)
        except UserError as error:
            without.append(str(error))
    if not found:
        raise UserError("; ".join(without))
    for line in without:
        _warn(line)
    found = list({folder.resolve(): folder for folder in found}.values())
    seen = runs.overview(found)
    runs.show(seen)
    for line in seen.doubts:
        _warn(line)
    runs.write_tables(seen, out)
    for folder in found:
        try:
            page.write_run(folder)
        except UserError as error:
            _warn(str(error))
    if not _same(found, out):
        page.write_set(seen, out)
    print(f"\nwritten: {runs.shown(out / 'report.html')}, and beside it table.md, table.csv, table.tex")
    return 0


def _same(found: Sequence[Path], out: Path) -> bool:
    """Whether the page of the set would take the place of the page of its only run."""
    return len(found) == 1 and found[0].resolve() == out.resolve()


@functools.cache
def _warn(line: str) -> None:
    """On stderr, and only once of what is found wrong twice."""
    print(one_line(line), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
