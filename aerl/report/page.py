"""report.html of a run and of a set of runs: one file each, without scripts, that asks nothing of any network."""

import base64
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aerl.report import runs
from aerl.report.figures import trainer_colour
from aerl.report.table import duration, notes, spent, what
from aerl.runtime.files import atomic_write, inside
from aerl.tracking.results import read_summary
from aerl.types import UserError, eps_text, first_line

log = logging.getLogger("aerl")

NAME = "report.html"

# What the page says in a place of its own.
_NOT_A_NOTE = ("masking", "mechanism", "trust", "time", "files", "page", "W&B")
_FILES = {
    "summary.json": "status, accuracies with intervals, every check of the audit",
    "config.yaml": "the resolved configuration",
    "results.jsonl": "every measured number, one a line",
    "outcomes.npz": "per test image: label, prediction, distance under each attack",
    "examples.npz": "the first adversarial images of each attack",
    "run.log": "the log",
    "checkpoints/best.pt": "the selected weights",
}


@dataclass(frozen=True)
class Picture:
    """A figure as the page holds it; `width` and `height` in pixels."""

    caption: str
    source: str
    width: int
    height: int


def write_run(folder: Path) -> Path:
    """Write report.html of a run folder, finished or not, from its files alone; returns where.

    Raises UserError where the folder has no readable summary.json, or the disk refuses.
    """
    summary = read_summary(folder)
    if summary is None:
        raise UserError(f"{runs.shown(folder)}: no summary.json")
    from jinja2 import TemplateError

    try:
        text = _template("run.html.j2").render(_of_run(folder, summary))
    except (TemplateError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{runs.shown(folder)}: no report.html, {_damage(error)}") from error
    path = folder / NAME
    atomic_write(path, text)
    return path


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


def write_set(overview: runs.Overview, out: Path) -> Path:
    """Write report.html of a set of runs to the folder `out`; returns where. UserError where the disk refuses."""
    path = out / NAME
    everyone = [run for section in overview.sections for row in section.rows for run in row.runs]
    atomic_write(
        path,
        _template("set.html.j2").render(
            overview=overview,
            title=f"{len(everyone)} runs" if len(everyone) != 1 else "1 run",
            caption=runs.CAPTION,
            header=runs.header,
            cells=runs.cells,
            marks=_marks,
            link=lambda run: quote(os.path.relpath(run.folder / NAME, out)),
            colour=trainer_colour,
        ),
    )
    return path


def _damage(error: Exception) -> str:
    said = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
    return f"its summary.json is damaged ({said})"


def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "duration": duration, "eps": eps_text, "number": _number}
    return environment.get_template(name)


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f} %"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else "-"


# ------------------------------------------------------------------------------------------- a run


def _of_run(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "title": what(summary),
        "summary": summary,
        "folder": str(folder),
        "status": str(summary.get("status", "unknown")),
        "error": summary.get("error"),
        "clean": summary.get("clean_accuracy"),
        "worst": summary.get("worst_case_accuracy"),
        "masking": summary.get("masking") or {},
        "accuracies": list(_accuracies(summary)),
        "comparisons": summary.get("comparisons") or {},
        "notes": [note for note in notes(summary) if note[0] not in _NOT_A_NOTE],
        "pictures": list(_pictures(folder)),
        "files": list(_files(folder)),
        "config": _config(folder),
        "environment": list(_environment(summary)),
        "wandb": summary.get("wandb") or {},
    }


def _accuracies(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of the table of attacks: clean, each attack and the worst case, as far as they were measured."""
    rows = {"clean": {"accuracy": summary.get("clean_accuracy")}}
    for name, attack in (summary.get("attacks") or {}).items():
        rows[name] = {**attack, "accuracy": attack.get("robust_accuracy")}
    if summary.get("worst_case_accuracy"):
        rows["worst case"] = {"accuracy": summary["worst_case_accuracy"]}
    for name, row in rows.items():
        yield {"norm": None, "eps": None, "seconds": None, "counts": True, **row, "name": name}


def _config(folder: Path) -> str:
    path = folder / "config.yaml"
    return inside(folder, path).read_text(errors="replace") if path.is_file() else ""


def _pictures(folder: Path) -> Iterator[Picture]:
    """The figures of a run; one that cannot be shown, or is a link out of the folder, is left out, which is logged."""
    for path in sorted((folder / "figures").glob("*.png")):
        try:
            yield _picture(inside(folder, path))
        except Exception as error:  # PIL raises nearly everything for a damaged file, or one that is too large
            log.warning("%s: is left out of the page: %s", runs.shown(path), first_line(error))


def _picture(path: Path) -> Picture:
    from PIL import Image

    with Image.open(path) as image:
        (width, height), caption = image.size, str(image.info.get("Description", ""))
    name = path.stem.replace("_", " ")
    content = base64.b64encode(path.read_bytes()).decode()
    return Picture(f"{name}: {caption}" if caption else name, f"data:image/png;base64,{content}", width, height)


def _files(folder: Path) -> Iterator[tuple[str, str, str]]:
    """The files of a run folder that a reader may want: address, name and what is in it."""
    tables = {f"tables/{path.name}": "a table" for path in sorted(folder.glob("tables/*.csv"))}
    figures = {f"figures/{path.name}": "a figure, for papers" for path in sorted(folder.glob("figures/*.pdf"))}
    for name, told in {**_FILES, **tables, **figures}.items():
        if (folder / name).is_file():
            yield quote(name), name, told


def _environment(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the numbers depend on beside the configuration: label and text."""
    for key in ("run_id", "seed", "config_hash"):
        if summary.get(key) is not None:
            yield key.replace("_", " "), str(summary[key])
    if origin := summary.get("origin"):
        yield "judged model", f"{origin['folder']} (trainer {origin['trainer']}, seed {origin['seed']})"
    for key, value in (summary.get("environment") or {}).items():
        yield str(key).replace("_", " "), str(value)
    if times := spent(summary):
        yield "time", times
    if (total := (summary.get("seconds") or {}).get("total")) is not None:
        yield "time in all", duration(total)


# ----------------------------------------------------------------------------------------- the chart


def _marks(row: runs.Row) -> Sequence[dict[str, Any]]:
    """Where clean accuracy and worst case lie on a scale of 0 to 100, with a standard deviation to either side."""
    marks = []
    for lane, name in (("worst", runs.WORST), ("clean", runs.CLEAN)):
        if spread := row.accuracies[name]:
            mean, sd = 100 * spread.mean, 100 * (spread.sd or 0.0)
            low, high = max(mean - sd, 0.0), min(mean + sd, 100.0)
            marks.append({"lane": lane, "at": mean, "low": low, "width": high - low})
    return marks
