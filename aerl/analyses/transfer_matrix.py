"""The transfer matrix: how each of several models does on the examples crafted on each of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aerl.analyses import AnalysisContext
from aerl.attacks import Crafted, attacking, predictions
from aerl.attacks.transfer import Loss
from aerl.data import to_unit
from aerl.evaluation.statistics import proportion
from aerl.runtime.progress import progress
from aerl.tracking.results import Result
from aerl.types import Count, Index, NonNegative, Norm, UserError, eps_text

# Of every target, its accuracy as results.proportion states it.
Row = dict[str, dict[str, float]]

_COLUMNS = (
    "source",
    "target",
    "accuracy",
    "low",
    "high",
    "n",
    "source_clean_accuracy",
    "target_clean_accuracy",
)


@dataclass(frozen=True, kw_only=True)
class TransferMatrix:
    """Accuracy of every run (target) on the examples crafted on every run (source), on all of the images.

    The examples are those of `aerl.attacks.Crafted`; on the diagonal they are white-box PGD's. All images
    count, as in the paper, also those that a model gets wrong without an attack. The settings are those of
    `aerl.attacks.Transfer`, and examples that it has crafted with the same ones are used again. Raises
    UserError when it is made if a run cannot be loaded.
    """

    runs: list[str]
    norm: Norm = "L2"
    eps: NonNegative
    steps: Count = 100
    step_size: NonNegative | None = None
    loss: Loss = "log_odds"
    seed: Index = 0
    load: Callable[..., Mapping[str, nn.Module]]
    store: Path

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs=[]: name the run folders to compare")
        self._models  # noqa: B018 (so that an error is told now, before anything is computed)

    @cached_property
    def _models(self) -> Mapping[str, nn.Module]:
        return self.load(self.runs, key="runs")

    def __call__(self, context: AnalysisContext) -> list[Result]:
        """Write `tables/transfer_matrix.csv` (with 95 % Wilson intervals), `figures/transfer_matrix.png` and, in
        summary.json, `transfer`; returns one Result "transfer_accuracy" for each pair."""
        settings = {key: getattr(self, key) for key in ("norm", "eps", "steps", "step_size", "loss", "seed")}
        crafted = {name: Crafted(model, self.store, **settings) for name, model in self._models.items()}
        clean, accuracy = _measured(context, self._models, crafted)
        n = len(context.images)
        names = dict(zip(self._models, self.runs, strict=True))
        context.save(transfer=settings | {"n": n, "runs": names, "clean": clean, "accuracy": accuracy})
        rows = [
            [
                source,
                target,
                told["value"],
                told["low"],
                told["high"],
                n,
                clean[source]["value"],
                clean[target]["value"],
            ]
            for source, row in accuracy.items()
            for target, told in row.items()
        ]
        context.table("transfer_matrix", _COLUMNS, rows)
        title = f"{self.norm} eps {eps_text(self.eps)}, n = {n}"
        context.draw("transfer_matrix", _draw(accuracy, clean, title), title)
        return [
            result
            for source, row in accuracy.items()
            for target, told in row.items()
            for result in context.log.log(
                {"transfer_accuracy": told["value"]}, n=n, split="test", norm=self.norm, eps=self.eps,
                source=source, attack=f"transfer_{source}_to_{target}",
            )
        ]  # fmt: skip


def _measured(
    context: AnalysisContext, models: Mapping[str, nn.Module], crafted: Mapping[str, Crafted]
) -> tuple[Row, dict[str, Row]]:
    """Accuracy of every model: on the clean images, and for every source on its examples."""
    n = len(context.images)
    right = {source: dict.fromkeys(models, 0) for source in (None, *models)}
    with progress("transfer_matrix", total=n) as bar:
        for index in torch.split(torch.arange(n), context.batch_size):
            device, layout = context.hardware.device, context.hardware.memory_format
            x, y = to_unit(context.images[index].to(device), layout), context.labels[index].to(device)
            for source, counts in right.items():
                x_adv = x if source is None else crafted[source](x, y)
                for target, model in models.items():
                    counts[target] += _right(model, x_adv, y)
            bar.update(len(index))
    accuracy = {
        source: {target: proportion(count, n) for target, count in counts.items()} for source, counts in right.items()
    }
    return accuracy.pop(None), {str(source): row for source, row in accuracy.items()}


def _right(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with attacking(model), torch.no_grad():
        return int((predictions(model(x)) == y).sum())


def _draw(
    accuracy: Mapping[str, Row],
    clean: Row,
    title: str,
) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others
    from matplotlib.patches import Rectangle

    names = list(clean)
    percent = np.array([[100 * told["value"] for told in row.values()] for row in accuracy.values()])
    figure = Figure(figsize=(4 + 1.2 * len(names), 3 + 0.9 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(percent):
        told = accuracy[names[row]][names[column]]
        colour = "white" if value < 50 else "black"
        axes.text(column, row, f"{value:.1f}", ha="center", va="bottom", fontsize=12, color=colour)
        interval = f"{100 * told['low']:.1f} to {100 * told['high']:.1f}"
        axes.text(column, row, f"\n{interval}", ha="center", va="center", fontsize=8, color=colour)
        if row == column:  # white-box
            frame = Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor=colour, lw=2)
            axes.add_patch(frame)
    labels = [f"{name}\nclean {100 * clean[name]['value']:.1f}" for name in names]
    slanted = max(map(len, names)) > 13  # a column has no room for more
    axes.set_xticks(range(len(names)), labels)
    if slanted:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    axes.set_xlabel("judged on")
    axes.set_ylabel("examples crafted on")
    axes.set_title(f"Accuracy under transferred examples\n{title}; framed: white-box")
    figure.colorbar(image, ax=axes, label="accuracy, % (95 % interval below)")
    return figure
