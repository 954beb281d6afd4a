"""The transfer matrix: the accuracy of each of several models on the examples crafted on each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aerl.analyses.context import AnalysisContext, Beside
from aerl.attacks import Crafted, attacking, predictions
from aerl.attacks.transfer import Loss
from aerl.data import Split
from aerl.errors import UserError
from aerl.evaluation import evaluate
from aerl.evaluation.statistics import proportion
from aerl.report import figures
from aerl.runtime.progress import progress
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import Result
from aerl.types import Count, Index, NonNegative, Norm

Row = dict[str, dict[str, float]]  # by target, its accuracy as `proportion` states it

_COLUMNS = ("source", "target", "accuracy", "low", "high", "n", "source_clean_accuracy", "target_clean_accuracy")


@dataclass(frozen=True, kw_only=True)
class TransferMatrix(Beside):
    """Accuracy of every run (target) on the examples crafted on every run (source), on all images, as in the paper.

    The examples are those of `aerl.attacks.Crafted`; on the diagonal they are those of white-box PGD. The settings are
    those of `aerl.attacks.Transfer`; examples with the same settings are reused.
    """

    norm: Norm = "L2"
    eps: NonNegative
    steps: Count = 100
    step_size: NonNegative | None = None
    loss: Loss = "log_odds"
    seed: Index = 0
    store: Path

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs=[]: name the run folders to compare")
        super().__post_init__()

    def __call__(self, context: AnalysisContext) -> list[Result]:
        """Write tables/transfer_matrix.csv (with 95 % Wilson intervals), figures/transfer_matrix.png and, in
        summary.json, `transfer`; returns a Result "transfer_accuracy" for each pair."""
        settings = {key: getattr(self, key) for key in ("norm", "eps", "steps", "step_size", "loss", "seed")}
        models = {other.name: other.model for other in self.others}
        crafted = {name: Crafted(model, self.store, **settings) for name, model in models.items()}
        accuracy, n = _accuracy(context, models, crafted), len(context.images)
        clean = accuracy.pop("")
        names = dict(zip(models, self.runs, strict=True))
        context.save(transfer=settings | {"n": n, "runs": names, "clean": clean, "accuracy": accuracy})
        rows, results = [], []
        for source, row in accuracy.items():
            for target, cell in row.items():
                ends = (clean[source]["value"], clean[target]["value"])
                rows.append((source, target, cell["value"], cell["low"], cell["high"], n, *ends))
                results += context.log.log(
                    {"transfer_accuracy": cell["value"]}, n=n, split="test", norm=self.norm, eps=self.eps,
                    source=source, attack=f"transfer_{source}_to_{target}",
                )  # fmt: skip
        context.table("transfer_matrix", _COLUMNS, rows)
        title = f"{self.norm} eps {eps_text(self.eps)}, n = {n}"
        context.draw("transfer_matrix", _draw(accuracy, clean, title), title)
        return results


def _accuracy(
    context: AnalysisContext, models: Mapping[str, nn.Module], crafted: Mapping[str, Crafted]
) -> dict[str, Row]:
    """By source and target; the source "" stands for the clean images."""
    n, images = len(context.images), Split(context.images, context.labels)
    correct = {source: dict.fromkeys(models, 0) for source in ("", *models)}
    with progress("transfer_matrix", total=n) as bar:
        for index in torch.split(torch.arange(n), context.batch_size):
            x, y = evaluate.batch(images, index, context.hardware)
            for source, counts in correct.items():
                x_adv = crafted[source](x, y) if source else x
                for target, model in models.items():
                    with attacking(model), torch.no_grad():
                        counts[target] += int((predictions(model(x_adv)) == y).sum())
            bar.update(len(index))
    return {
        source: {target: proportion(count, n) for target, count in counts.items()} for source, counts in correct.items()
    }


def _draw(accuracy: Mapping[str, Row], clean: Row, title: str) -> Any:
    from matplotlib.patches import Rectangle

    cells = [list(row.values()) for row in accuracy.values()]
    percent = [[100 * cell["value"] for cell in row] for row in cells]
    labels = [f"{name}\nclean {100 * cell['value']:.1f}" for name, cell in clean.items()]

    def text(row: int, column: int) -> str:
        value, low, high = (100 * cells[row][column][key] for key in ("value", "low", "high"))
        return f"$\\bf{{{value:.1f}}}$\n{low:.1f} to {high:.1f}"

    size = (4 + 1.2 * len(labels), 3 + 0.9 * len(labels))
    figure, ((axis,),) = figures.subplots(figsize=size)
    image = figures.heatmap(axis, percent, labels, labels, text, rotation=30 if max(map(len, clean)) > 13 else 0)
    for number in range(len(labels)):
        colour = "white" if percent[number][number] < 50 else "black"
        axis.add_patch(Rectangle((number - 0.48, number - 0.48), 0.96, 0.96, fill=False, edgecolor=colour, lw=2))
    axis.set(xlabel="evaluated on", ylabel="examples crafted on")
    axis.set_title(f"Accuracy under transferred examples\n{title}; framed: white-box")
    figure.colorbar(image, ax=axis, label="accuracy, % (95 % interval below)")
    return figure
