"""Pictures of a few samples: original, perturbation and adversarial image of each attack, with the predictions."""

import logging
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aerl.analyses.context import AnalysisContext, class_name
from aerl.analyses.others import FinishedRun, beside
from aerl.data import to_unit
from aerl.report import figures
from aerl.report.figures import RIGHT, WRONG
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import Result
from aerl.types import Count

log = logging.getLogger("aerl")


def pictures(context: AnalysisContext, *, samples: Count = 8, runs: Sequence[FinishedRun] = ()) -> list[Result]:
    """Draw figures/pictures.png: for each attack the original, perturbed and adversarial images, up to `samples`.

    Fooled images come first, then robust ones, then those that were wrong when clean. An attack on the survivors of
    others shows only images that it got. `runs` are other finished runs on the same samples to show beside this one.
    Returns no Results. Without examples it warns and draws nothing.
    """
    shown = [
        (f"{run}: {_title(its, attack)}" if run else _title(its, attack), its, attack, rows)
        for run, its in beside(context, runs).items()
        for attack in its.adversarial
        if (rows := _chosen(its, attack, samples))
    ]
    if not shown:
        log.warning("pictures: no attack has examples to show, nothing to draw")
        return []
    columns = max(len(rows) for *_, rows in shown)
    figure, parts = figures.panels([title for title, *_ in shown], [(1.3 + 1.45 * columns, 6.1)] * len(shown))
    for part, (_, its, attack, rows) in zip(parts, shown, strict=True):
        _draw_attack(part.subplots(3, columns, squeeze=False), its, attack, rows)
    context.draw("pictures", figure, "; ".join(title for title, *_ in shown))
    return []


def _title(context: AnalysisContext, attack: str) -> str:
    info = context.attacks.get(attack, {})
    return f"{attack}, {info['norm']} eps {eps_text(info['eps'])}" if info.get("norm") else attack


def _chosen(context: AnalysisContext, attack: str, samples: int) -> list[int]:
    """Rows of up to `samples` examples: first the fooled, then the robust, then those that were wrong when clean."""
    n = len(context.adversarial[attack])
    label = context.outcomes["label"][:n]
    right = context.outcomes["clean_pred"][:n] == label
    fooled = context.outcomes[f"{attack}_pred"][:n] != label
    order = np.argsort(np.where(right & fooled, 0, np.where(right, 1, 2)), kind="stable")
    if not context.attacks.get(attack, {}).get("alone", True):
        order = order[context.attacked(attack)[order]]
    rows: list[int] = order[:samples].tolist()
    return rows


def _draw_attack(axes: Any, context: AnalysisContext, attack: str, rows: list[int]) -> None:
    """Draw the samples `rows` into axes (3, columns)."""
    originals = to_unit(context.images[rows]).cpu().numpy()
    adversarials = context.adversarial[attack][rows].float().cpu().numpy()
    delta = adversarials - originals
    scale = float(np.abs(delta).max()) or 1.0
    colours = "grey is 0" if delta.shape[1] == 3 else "purple +\norange -"
    names = ("original", f"perturbation\nup to ±{scale:.2g}\n{colours}", "adversarial")
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.text(-0.12, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    for (top, middle, bottom), row, original, change, adversarial in zip(
        axes.T, rows, originals, delta, adversarials, strict=False
    ):
        _show(top, original, 0, 1)
        _show(middle, change, -scale, scale)
        _show(bottom, adversarial, 0, 1)
        top.set_title(f"true: {_name(context.class_names, int(context.labels[row]))}", fontsize=9)
        _write_prediction(top, context, "clean", row)
        _write(middle, f"L2 {np.linalg.norm(change):.2f}\nLinf {np.abs(change).max():.3f}", "black", "0.7", 0.5)
        _write_prediction(bottom, context, attack, row)


def _show(axis: Any, image: npt.NDArray[np.float32], low: float, high: float) -> None:
    """One image (C, H, W). A perturbation is purple and orange around white or, in colour, around grey."""
    if len(image) == 3:
        axis.imshow(((image - low) / (high - low)).clip(0, 1).transpose(1, 2, 0), interpolation="nearest")
    else:  # the mean of any other number of channels
        palette = "PuOr" if low < 0 else "gray"
        axis.imshow(image.mean(axis=0), cmap=palette, vmin=low, vmax=high, interpolation="nearest")


def _write_prediction(axis: Any, context: AnalysisContext, images: str, row: int) -> None:
    """Prediction and confidence below an image, in a thin frame if right and a thick one if wrong."""
    predicted, confidence = (context.outcomes[f"{images}_{key}"][row] for key in ("pred", "confidence"))
    right = predicted == context.labels[row]
    text = f"{_name(context.class_names, int(predicted))}\n{100 * confidence:.0f} %, {'right' if right else 'wrong'}"
    colour = RIGHT if right else WRONG
    _write(axis, text, colour, colour, 1 if right else 3)


def _write(axis: Any, text: str, colour: str, frame: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    axis.text(0.5, -0.05, text, transform=axis.transAxes, ha="center", va="top", fontsize=9, color=colour)
    axis.add_patch(
        Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, edgecolor=frame, linewidth=width, clip_on=False)
    )


def _name(class_names: Sequence[str], index: int) -> str:
    """A class name in at most two short lines: those of ImageNet are long."""
    return "\n".join(textwrap.wrap(class_name(class_names, index), 16, max_lines=2, placeholder="..."))
