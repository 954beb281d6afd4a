"""`python -m aerl.report FOLDER... [--out DIR]`: tables and pages from the files of finished runs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from aerl.report import page, runs
from aerl.report.table import shown
from aerl.runtime.terminal import Parser, command, one_line
from aerl.types import UserError


@command
def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aerl.report", description="Tables over runs and seeds, and a page for each run.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="searched at any depth for run folders")
    where = "where tables and report.html go (default: the FOLDER, if it is one, else here)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=where)
    given = parser.parse_args(words)
    out = given.out or (given.folders[0] if len(given.folders) == 1 else Path())
    found: dict[Path, Path] = {}
    lines = []
    for folder in given.folders:
        try:
            found |= {run.resolve(): run for run in runs.run_folders(folder)}
        except UserError as error:
            lines.append(str(error))
    if not found:
        raise UserError("; ".join(lines))
    overview = runs.overview(found.values())
    runs.show(overview)
    runs.write_tables(overview, out)
    lines += overview.warnings
    for folder in found.values():
        try:
            page.write_run(folder)
        except UserError as error:
            lines.append(str(error))
    if list(found) != [out.resolve()]:  # else it would replace the page of the only run
        page.write_set(overview, out)
    for line in dict.fromkeys(lines):
        print(one_line(line), file=sys.stderr)
    print(f"\nwritten: {shown(out / page.NAME)}, and beside it table.md, table.csv, table.tex")
    return 0


if __name__ == "__main__":
    sys.exit(main())
