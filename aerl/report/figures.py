"""How aerl's figures look: one palette that any colour vision tells apart, and every figure as PNG and PDF."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aerl.runtime.files import atomic_write

# Okabe and Ito's palette (2008).
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#767676",
)  # fmt: skip
RIGHT, WRONG = BLUE, VERMILION  # of predictions
_TRAINERS = {
    "sl": BLUE, "sl_adv": SKY, "rl": VERMILION, "rl_adv": ORANGE, "rl_expected": PURPLE,
    "pgd_at": GREEN, "trades": YELLOW,
}  # fmt: skip


def trainer_colour(trainer: str) -> str:
    """The colour of a trainer in every figure; grey for one that aerl does not know."""
    return _TRAINERS.get(trainer, GREY)


def save(figure: Any, folder: Path, name: str, caption: str = "") -> Path:
    """Write a matplotlib Figure to `folder` as `name`.png, which carries its caption, and, for papers, `name`.pdf.

    Returns the path of the PNG. Raises UserError where the files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    png = {"dpi": 130, "metadata": {"Description": caption}}
    for suffix, options in (("pdf", {"metadata": {"CreationDate": None}}), ("png", png)):
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix, **options)
        atomic_write(folder / f"{name}.{suffix}", stream.getvalue())
    return folder / f"{name}.png"


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A matplotlib Figure and its axes (rows, columns), without pyplot: no window system and no shared state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def panels(titles: Sequence[str], sizes: Sequence[tuple[float, float]]) -> tuple[Any, list[Any]]:
    """A Figure, and in it one part for each of `sizes` (width, height), from top to bottom, with its title."""
    from matplotlib.figure import Figure

    heights = [height for _, height in sizes]
    figure = Figure(figsize=(max(width for width, _ in sizes), sum(heights)), layout="constrained")
    parts = figure.subfigures(len(sizes), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, title in zip(parts, titles, strict=True):
        if title:
            part.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, list(parts)


def heatmap(
    axis: Any, percent: Any, rows: Sequence[str], columns: Sequence[str], text: Callable[[int, int], str], rotation: int
) -> Any:
    """Draw `percent` (rows, columns) from 0 to 100 with `text(row, column)` in each cell; the image, for a colour bar.

    Without names of `rows` and `columns` there is no text: too many classes to label.
    """
    image = axis.imshow(percent, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    if rows:
        align = {"ha": "right", "rotation_mode": "anchor"} if rotation else {}
        axis.set_xticks(range(len(columns)), columns, rotation=rotation, **align)
        axis.set_yticks(range(len(rows)), rows)
        for row, values in enumerate(percent):
            for column, value in enumerate(values):
                colour = "white" if value < 50 else "black"
                axis.text(column, row, text(row, column), ha="center", va="center", fontsize=9, color=colour)
    return image
