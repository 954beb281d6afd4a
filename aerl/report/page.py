"""report.html of a run and of a set of runs: one file each, without scripts, that loads nothing."""

import base64
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aerl.errors import UserError, first_line
from aerl.report import table
from aerl.runtime.files import atomic_write, inside
from aerl.tracking.results import read_summary

if TYPE_CHECKING:  # pandas takes half a second to import
    from aerl.report.runs import Overview

log = logging.getLogger("aerl")

NAME = "report.html"
CAPTION = (
    "Accuracies in %: mean ± sample standard deviation over the n seeds. The 95 % interval of the worst case is over "
    "seeds and test images."
)
_FILES = ("*.*", "checkpoints/best.pt", "tables/*.csv", "figures/*.pdf")


def write_run(folder: Path) -> Path:
    """Write report.html of a run folder, finished or not, from its files alone; returns its path.

    Raises UserError if the folder has no readable summary.json, or the file cannot be written.
    """
    summary = read_summary(folder)
    if summary is None:
        raise UserError(f"{table.shown(folder)}: no summary.json")
    config = folder / "config.yaml"
    files = (path for pattern in _FILES for path in sorted(folder.glob(pattern)))
    html = _render(
        title=table.title(summary),
        summary=summary,
        attacks=table.attack_grid(summary),
        headline=" ".join(table.headline(summary)),
        notes=table.notes(summary),
        comparisons={run: table.comparison_grid(rows) for run, rows in (summary.get("comparisons") or {}).items()},
        figures=_figures(folder),
        time=dict(table.places(summary)).get("time", ""),
        config=inside(folder, config).read_text(errors="replace") if config.is_file() else "",
        files=[path.relative_to(folder).as_posix() for path in files if path.name != NAME and path.name[0] != "."],
    )
    atomic_write(folder / NAME, html)
    return folder / NAME


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Write report.html of the run folder at the end of the block, also after an exception.

    A run whose numbers are on the disk does not fail for its page: why there is none is a warning.
    """
    try:
        yield
    finally:
        try:
            if (folder / "summary.json").is_file():
                write_run(folder)
        except Exception as error:
            log.warning("no %s: %s", NAME, error)


def write_set(overview: "Overview", out: Path) -> None:
    """Write report.html of a set of runs to the folder `out`. UserError if that fails."""
    links = {run: os.path.relpath(run / NAME, out) for table in overview.tables for run in table.folders}
    atomic_write(out / NAME, _render(title=f"runs: {len(links)}", overview=overview, caption=CAPTION, links=links))


def _render(**context: Any) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.ChainableUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": table.duration, "shown": table.shown}
    return environment.get_template("report.html.j2").render(context)


def _interest(path: Path) -> tuple[int, str]:
    """The order of figures on the page."""
    first = ("pictures", "training", "distance", "curve")
    return first.index(path.stem) if path.stem in first else len(first), path.stem


def _figures(folder: Path) -> Iterator[tuple[str, str]]:
    """Caption and data: address of each figure; one that is damaged or a link out of the folder is skipped."""
    from PIL import Image

    for path in sorted((folder / "figures").glob("*.png"), key=_interest):
        name = path.stem.replace("_", " ")
        try:
            with Image.open(inside(folder, path)) as image:
                caption = image.info.get("Description")
            data = base64.b64encode(path.read_bytes()).decode()
            yield f"{name}: {caption}" if caption else name, f"data:image/png;base64,{data}"
        except Exception as error:  # PIL raises nearly everything for a damaged file, or one that is too large
            log.warning("%s: not in %s: %s", table.shown(path), NAME, first_line(error))
