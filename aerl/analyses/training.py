"""The training of the run's model, epoch by epoch."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from aerl.analyses.context import AnalysisContext, NotMade
from aerl.report import figures
from aerl.tracking.results import read_results, read_summary

# Panels of the figure: label of the axis, then (split, metric, label, line style).
_PANELS = {
    "objective": [("train", "loss", "training", "-")],
    "cross-entropy": [("val", "loss", "validation", "--")],
    "accuracy, %": [
        ("train", "accuracy", "training", "-"), ("val", "accuracy", "validation", "--"),
        ("val", "adversarial_accuracy", "validation, adversarial", ":"), ("train", "reward", "reward, training", "-."),
    ],
    "gradient norm": [("train", "grad_norm", "before clipping", "-")],
}  # fmt: skip

Curves = Mapping[tuple[str, str], Mapping[int, float]]  # by split and metric, a value for each epoch, from 1


def training(context: AnalysisContext) -> None:
    """Loss, accuracy, reward and gradient norm of every epoch, on training and validation images.

    Writes figures/training.png, and tables/training.csv with a column for each split and metric. NotMade if the run did
    not train its model.
    """
    curves: defaultdict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for result in read_results(context.log.path):
        if result.split in ("train", "val") and result.step is not None:
            curves[result.split, result.metric][result.step] = result.value
    if not curves:
        raise NotMade("this run did not train its model")
    epochs = sorted({epoch for values in curves.values() for epoch in values})
    columns = [f"{split}_{metric}" for split, metric in curves]
    rows = [[epoch, *(values.get(epoch, "") for values in curves.values())] for epoch in epochs]
    context.table("training", ["epoch", *columns], rows)
    best = (read_summary(context.log.path.parent) or {}).get("best_epoch")
    caption = "every epoch; the dotted line is the epoch whose weights were kept" if best else "every epoch"
    context.draw("training", _draw(curves, best, figures.trainer_colour(context.trainer)), caption)


def _draw(curves: Curves, best: int | None, colour: str) -> Any:
    figure, axes = figures.subplots(2, 2, figsize=(9, 5.6), sharex=True)
    for axis, (label, lines) in zip(axes.flat, _PANELS.items(), strict=True):
        scale = 100 if label.endswith("%") else 1
        for split, metric, name, style in lines:
            values = curves.get((split, metric), {})
            # A trainer whose action is the label earns 1 in every step.
            if values and not (metric == "reward" and set(values.values()) == {1.0}):
                shade = colour if split == "train" and metric != "reward" else figures.GREY
                points = [scale * value for value in values.values()]
                marker = "o" if len(points) == 1 else None
                axis.plot(list(values), points, style, color=shade, label=name, marker=marker)
        if best:
            axis.axvline(best, color=figures.BLACK, linestyle=":", linewidth=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
        if scale == 100:
            axis.set_ylim(0, 100)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    return figure
