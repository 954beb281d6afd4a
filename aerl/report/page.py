"""report.html of a run and of a set of runs: one file each, without scripts, that loads nothing."""

import base64
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from aerl.report.table import Grid, attack_grid, comparison_grid, duration, notes, places, shown, time_text, title
from aerl.runtime.files import atomic_write, inside
from aerl.tracking.results import read_summary
from aerl.types import UserError, first_line

if TYPE_CHECKING:  # pandas takes half a second to import
    from aerl.report.runs import Overview

log = logging.getLogger("aerl")

NAME = "report.html"
_FILES = ("*.*", "checkpoints/best.pt", "tables/*.csv", "figures/*.pdf")


@dataclass(frozen=True)
class Section:
    """A part of a page; what is empty is not shown."""

    title: str
    text: str = ""
    grid: Grid | None = None
    lines: Sequence[str] = ()
    facts: Sequence[tuple[str, str, str]] = ()  # label, text and the address that the label links to, or ""
    figures: Sequence[tuple[str, str]] = ()  # caption and data: address
    code: str = ""


def write_run(folder: Path) -> Path:
    """Write report.html of a run folder, finished or not, from its files alone; returns its path.

    Raises UserError where the folder has no readable summary.json, or the file cannot be written.
    """
    summary = read_summary(folder)
    if summary is None:
        raise UserError(f"{shown(folder)}: no summary.json")
    try:
        return _write(folder, **_run(folder, summary))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{shown(folder)}: no report.html, its summary.json is damaged ({reason})") from error


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Write report.html of the run folder at the end of the block, however that ends.

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


def write_set(overview: "Overview", out: Path) -> Path:
    """Write report.html of a set of runs to the folder `out`; returns its path. UserError if that fails."""
    from aerl.report.runs import CAPTION

    sections = [Section("In no table", lines=overview.failed)] if overview.failed else []
    for table in overview.tables:
        links = [(label, shown(run), quote(os.path.relpath(run / NAME, out))) for label, run in table.runs]
        sections += [Section(table.heading, CAPTION, table.text, table.notes), Section("Its runs", facts=links)]
    n = sum(len(table.runs) for table in overview.tables)
    return _write(out, kind="report", title=f"runs: {n}", warnings=overview.warnings, sections=sections)


def _write(folder: Path, **context: Any) -> Path:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    atomic_write(folder / NAME, environment.get_template("report.html.j2").render(context))
    return folder / NAME


# ------------------------------------------------------------------------------------------- a run


def _run(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    lines = [f"{label}: {text}" for label, text in notes(summary)]
    sections = [Section("Accuracy under attack", grid=attack_grid(summary), lines=lines)]
    for run, comparison in (summary.get("comparisons") or {}).items():
        text = "On the same images. b: right here only, c: right there only; p: McNemar's exact test."
        sections.append(Section(f"Compared with {run}", text, comparison_grid(comparison)))
    if figures := list(_figures(folder)):
        sections.append(Section("Figures", figures=figures))
    masking = summary.get("masking") or {}
    if masking.get("checks"):
        text = "An effect is an honest alternative that fools images which plain PGD misses, a symptom may cause one."
        sections.append(Section("Masking audit", text, _checks(masking["checks"])))
    sections.append(Section("Seeds, time and environment", facts=list(_environment(summary))))
    if (path := folder / "config.yaml").is_file():
        sections.append(Section("Configuration", code=inside(folder, path).read_text(errors="replace")))
    sections.append(Section("Files", str(folder), facts=list(_files(folder, summary))))
    return {
        "kind": f"run {summary.get('run_id') or ''}",
        "title": title(summary),
        "status": str(summary.get("status", "unknown")),
        "error": summary.get("error"),
        "headline": [
            ("Clean accuracy", *_accuracy(summary.get("clean_accuracy"))),
            ("Worst case over all attacks", *_accuracy(summary.get("worst_case_accuracy"))),
            (
                "Gradient masking",
                masking.get("verdict") or "-",
                f"audit on {masking.get('n')} images" if masking else "",
            ),
        ],
        "sections": sections,
    }


def _accuracy(accuracy: Mapping[str, Any] | None) -> tuple[str, str]:
    if not accuracy or accuracy["value"] is None:
        return "-", "not measured"
    value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
    return f"{value:.1f} %", f"{accuracy['n']} test images, 95 % interval {low:.1f} to {high:.1f} %"


def _checks(checks: Iterable[Mapping[str, Any]]) -> Grid:
    rows = [
        [
            check["name"].replace("_", " "),
            *("-" if check[key] is None else f"{check[key]:.4g}" for key in ("value", "threshold")),
            check["role"] if check["flag"] else "-",
            check["says"],
        ]
        for check in checks
    ]
    return Grid(("check", "value", "threshold", "flag", "says"), rows, ("check", "flag", "says"))


def _figures(folder: Path) -> Iterator[tuple[str, str]]:
    """The figures of a run; one that cannot be shown, or is a link out of the folder, is left out, which is logged."""
    from PIL import Image

    for path in sorted((folder / "figures").glob("*.png")):
        name = path.stem.replace("_", " ")
        try:
            with Image.open(inside(folder, path)) as image:
                caption = image.info.get("Description")
            source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            yield f"{name}: {caption}" if caption else name, source
        except Exception as error:  # PIL raises nearly everything for a damaged file, or one that is too large
            log.warning("%s: is left out of the page: %s", shown(path), first_line(error))


def _environment(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What the numbers depend on beside the configuration."""
    facts = {key: summary.get(key) for key in ("run_id", "seed", "config_hash")}
    if origin := summary.get("origin"):
        facts["model of"] = f"{origin['folder']} (trainer {origin['trainer']}, seed {origin['seed']})"
    facts |= {**(summary.get("environment") or {}), "time": time_text(summary)}
    facts["time in all"] = duration((summary.get("seconds") or {}).get("total") or 0.0)
    for key, value in facts.items():
        yield str(key).replace("_", " "), str(value), ""


def _files(folder: Path, summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The files of a run folder that a reader may want, and where W&B has the run."""
    for path in (path for pattern in _FILES for path in sorted(folder.glob(pattern))):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != NAME and not name.startswith("."):
            yield name, f"{path.stat().st_size:,} bytes", quote(name)
    for label, text in places(summary):
        if label == "W&B":
            yield label, text, text if text.startswith("https://") else ""
