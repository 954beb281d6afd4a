"""Pictures: what each attack did to a few samples, and what the model said before and after."""

import logging
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aerl.analyses import AnalysisContext, class_name
from aerl.report.figures import RIGHT, WRONG
from aerl.tracking.results import Result
from aerl.types import Count, eps_text

log = logging.getLogger("aerl")

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Block:
    """The samples shown for one attack; images (k, C, H, W), predictions and confidences (k,)."""

    title: str
    originals: Array
    adversarials: Array
    labels: list[int]
    before: list[tuple[int, float]]
    after: list[tuple[int, float]]


def pictures(context: AnalysisContext, *, samples: Count = 8) -> list[Result]:
    """Draw `figures/pictures.png`: for each attack original, perturbation and adversarial image.

    Up to `samples` a row, those that fooled the model first, then those that did not; samples that were
    already wrong without an attack come last. An attack on the survivors of others shows what it was given.
    Every image states the prediction and its confidence, every row of perturbations its scale. Measures
    nothing, so the list of Results is empty; without a kept adversarial example it warns and draws nothing.
    """
    chosen = {attack: _chosen(context, attack, samples) for attack in context.adversarial}
    blocks = [_block(context, attack, rows) for attack, rows in chosen.items() if rows]
    if not blocks:
        log.warning("pictures: no attack kept an adversarial example, so there is nothing to draw")
        return []
    context.draw("pictures", _draw(blocks, context.class_names), "; ".join(block.title for block in blocks))
    return []


def _block(context: AnalysisContext, attack: str, chosen: list[int]) -> _Block:
    originals = context.images[chosen].float() / 255
    adversarials = context.adversarial[attack][chosen].float()
    settings = context.attacks.get(attack, {})
    budget = f", {settings['norm']} eps {eps_text(settings['eps'])}" if settings.get("norm") else ""
    return _Block(
        title=f"{attack}{budget}",
        originals=originals.cpu().numpy(),
        adversarials=adversarials.cpu().numpy(),
        labels=[int(label) for label in context.labels[chosen]],
        before=_predictions(context, "clean", chosen),
        after=_predictions(context, attack, chosen),
    )


def _chosen(context: AnalysisContext, attack: str, samples: int) -> list[int]:
    """Indices of up to `samples` kept examples: the fooled first, then the robust, then the always wrong."""
    kept = len(context.adversarial[attack])
    label = context.outcomes["label"][:kept]
    right = context.outcomes["clean_pred"][:kept] == label
    fooled = context.outcomes[f"{attack}_pred"][:kept] != label
    rank = np.where(right & fooled, 0, np.where(right, 1, 2))
    order = [int(index) for index in np.argsort(rank, kind="stable")]
    if not context.attacks.get(attack, {}).get("alone", True):
        given = context.attacked(attack)
        order = [index for index in order if given[index]]
    return order[:samples]


def _predictions(context: AnalysisContext, images: str, chosen: list[int]) -> list[tuple[int, float]]:
    """Class and confidence of each of the images, clean or as an attack left them."""
    pred, confidence = (context.outcomes[f"{images}_{key}"][chosen] for key in ("pred", "confidence"))
    return list(zip(pred.tolist(), confidence.tolist(), strict=True))


def _draw(blocks: list[_Block], class_names: tuple[str, ...]) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    columns = max(len(block.labels) for block in blocks)
    figure = Figure(figsize=(1.3 + 1.45 * columns, 6.1 * len(blocks)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False)[:, 0]
    for part, block in zip(parts, blocks, strict=True):
        _draw_block(part, block, class_names, columns)
    return figure


def _draw_block(part: Any, block: _Block, class_names: tuple[str, ...], columns: int) -> None:
    part.suptitle(block.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes = part.subplots(3, columns, squeeze=False)
    delta = block.adversarials - block.originals
    scale = float(np.abs(delta).max()) or 1.0
    colours = "grey is 0" if delta.shape[1] == 3 else "purple +\norange -"
    rows = ("original", f"perturbation\nup to ±{scale:.2g}\n{colours}", "adversarial")
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.text(-0.12, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    for column, row in np.ndindex(columns, 3):
        axes[row, column].set_axis_off()
    for column, label in enumerate(block.labels):
        top, middle, bottom = axes[:, column]
        _show(top, block.originals[column], 0, 1)
        _show(middle, delta[column], -scale, scale)
        _show(bottom, block.adversarials[column], 0, 1)
        top.set_title(f"true: {_name(class_names, label)}", fontsize=9)
        _say(top, *block.before[column], label, class_names)
        middle.add_patch(_frame(middle, "0.7", 0.5))  # what is white has an edge, too
        flat = delta[column].ravel()
        _caption(middle, f"L2 {np.linalg.norm(flat):.2f}\nLinf {np.abs(flat).max():.3f}", "black")
        _say(bottom, *block.after[column], label, class_names)


def _say(axis: Any, predicted: int, confidence: float, label: int, class_names: tuple[str, ...]) -> None:
    """The prediction below an image, and a frame: thin when it is right, thick when it is wrong."""
    right = predicted == label
    colour = RIGHT if right else WRONG
    verdict = "right" if right else "wrong"
    _caption(axis, f"{_name(class_names, predicted)}\n{100 * confidence:.0f} %, {verdict}", colour)
    axis.add_patch(_frame(axis, colour, 1 if right else 3))


def _frame(axis: Any, colour: str, width: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (0, 0), 1, 1, transform=axis.transAxes, fill=False, edgecolor=colour, linewidth=width, clip_on=False
    )


def _caption(axis: Any, text: str, colour: str) -> None:
    axis.text(0.5, -0.05, text, transform=axis.transAxes, ha="center", va="top", fontsize=9, color=colour)


def _show(axis: Any, image: Array, low: float, high: float) -> None:
    """One image (C, H, W); a signed one is purple and orange around white, or, in colour, around grey."""
    if len(image) == 3:
        axis.imshow(((image - low) / (high - low)).clip(0, 1).transpose(1, 2, 0), interpolation="nearest")
    else:  # greyscale; of any other number of channels the mean
        palette = "PuOr" if low < 0 else "gray"
        axis.imshow(image.mean(axis=0), cmap=palette, vmin=low, vmax=high, interpolation="nearest")


def _name(class_names: tuple[str, ...], index: int) -> str:
    """A class name in two short lines at the most: ImageNet's names are long."""
    return "\n".join(textwrap.wrap(class_name(class_names, index), 16, max_lines=2, placeholder="..."))
