"""The training of the run's model, epoch by epoch."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from aerl.analyses.context import AnalysisContext, NotMade
from aerl.config.compose import run_names
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


def _trained(run: str) -> str:
    """Checks a run when the configuration is read."""
    if not _curves(Path(run).expanduser() / "results.jsonl"):
        raise ValueError("must be a run folder that trained its model")
    return run


@dataclass(frozen=True, kw_only=True)
class Training:
    """Loss, accuracy, reward and gradient norm of every epoch, on training and validation images.

    `runs` are other runs, finished or not, to show beside this one. Writes figures/training.png, and
    tables/training.csv with a column for each split and metric of this run. NotMade if it did not train its model.
    """

    runs: list[Annotated[str, AfterValidator(_trained)]] = field(default_factory=list)

    def __call__(self, context: AnalysisContext) -> None:
        curves = _curves(context.log.path)
        if not curves:
            raise NotMade("this run did not train its model")
        epochs = sorted({epoch for values in curves.values() for epoch in values})
        columns = [f"{split}_{metric}" for split, metric in curves]
        rows = [[epoch, *(values.get(epoch, "") for values in curves.values())] for epoch in epochs]
        context.table("training", ["epoch", *columns], rows)
        best = (read_summary(context.log.path.parent) or {}).get("best_epoch")
        shown = [(context.trainer, context.trainer, curves)]
        for name, run in zip(run_names(self.runs), self.runs, strict=True):
            folder = Path(run).expanduser()
            trainer = str((read_summary(folder) or {}).get("trainer"))
            shown.append((name, trainer, _curves(folder / "results.jsonl")))
        caption = "every epoch; the dotted line is the epoch whose weights were kept" if best else "every epoch"
        context.draw("training", _draw(shown, best), caption)


def _curves(path: Path) -> Curves:
    curves: defaultdict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for result in read_results(path) if path.is_file() else ():
        if result.split in ("train", "val") and result.step is not None:
            curves[result.split, result.metric][result.step] = result.value
    return curves


def _draw(shown: Sequence[tuple[str, str, Curves]], best: int | None) -> Any:
    """With several runs the name, the trainer (the colour) and the curves of each; the first is this run."""
    figure, axes = figures.subplots(2, 2, figsize=(9, 5.6), sharex=True)
    for axis, (label, lines) in zip(axes.flat, _PANELS.items(), strict=True):
        scale = 100 if label.endswith("%") else 1
        for run, trainer, curves in shown:
            colour = figures.trainer_colour(trainer)
            for split, metric, name, style in lines:
                values = curves.get((split, metric), {})
                # A trainer whose action is the label earns 1 in every step.
                if values and not (metric == "reward" and set(values.values()) == {1.0}):
                    own = len(shown) > 1 or (split == "train" and metric != "reward")
                    points = [scale * value for value in values.values()]
                    axis.plot(
                        list(values), points, style, color=colour if own else figures.GREY,
                        label=name if len(shown) == 1 else f"{run}: {name}", marker="o" if len(points) == 1 else None,
                    )  # fmt: skip
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
