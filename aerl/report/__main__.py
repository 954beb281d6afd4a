"""`python -m aerl.report FOLDER... [--out DIR]`: tables and pages from the files of finished runs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from aerl.errors import first_line
from aerl.report import page, runs
from aerl.runtime.terminal import Parser, command, one_line


@command
def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aerl.report", description="Tables over runs and seeds, and a page for each run.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="searched at any depth for run folders")
    where = "where tables and report.html go (default: the FOLDER, if it is one, else here)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=where)
    parser.add_argument(
        "--frontier", action="store_true", help="also draw clean against worst-case accuracy of all runs"
    )
    given = parser.parse_args(words)
    out = given.out or (given.folders[0] if len(given.folders) == 1 else Path())
    folders = {run.resolve(): run for folder in given.folders for run in runs.run_folders(folder)}
    overview = runs.overview(folders.values())
    runs.publish(overview, out)
    if given.frontier:
        from aerl.report import frontier  # and matplotlib

        for path in frontier.draw(overview, out):
            print(f"written: {path}")
    for folder in folders.values():  # after the page of the set, because one of them may be `out`
        try:
            page.write_run(folder)
        except Exception as error:  # a damaged summary can raise nearly anything
            print(one_line(f"{folder}: no {page.NAME}: {first_line(error)}"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
