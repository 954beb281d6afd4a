"""Security curves: robust accuracy against eps, up to where nothing is left, and against the steps of PGD."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aerl.analyses import AnalysisContext
from aerl.attacks import SampleGenerator, pgd, predictions
from aerl.data import Split, subset
from aerl.evaluation import evaluate
from aerl.evaluation.outcomes import Attacked
from aerl.evaluation.statistics import proportion
from aerl.report.figures import BLACK, trainer_colour
from aerl.tracking.results import Result
from aerl.types import Count, eps_text

Points = list[dict[str, float]]


def curve(context: AnalysisContext, *, samples: Count = 200, steps: Count = 30, restarts: Count = 1) -> list[Result]:
    """Robust accuracy under PGD (log-odds loss): against eps, and against the steps at the run's own eps.

    On a fixed subset of `samples` test images. eps is the run's eighth, doubling until nothing is left. A sample
    that falls at one eps falls at every larger one, whose ball contains the example, so only survivors are attacked
    further and the curve cannot rise. It ends at zero, or where the ball holds the whole box: an accuracy left there
    means that the attack fails, not that the model is robust (Athalye et al. 2018, section 3.1). Against steps: what
    one PGD from a random start, in steps of eps / 10, has left after each of them. Writes tables/curve.csv,
    tables/curve_steps.csv, figures/curve.png, a Result for every eps, and `curve` in summary.json.
    """
    chosen = subset(Split(context.images, context.labels), samples)
    clean = evaluate.predict(context.model, chosen, context.hardware, context.batch_size)
    points = _against_eps(context, chosen, clean, steps, restarts)
    stepwise = _against_steps(context, chosen, clean, steps) if context.eps > 0 else []
    results = []
    for point in points:
        value = {"curve_accuracy": point["value"]}
        results += context.log.log(
            value, n=len(chosen), split="test", attack="curve", norm=context.norm, eps=point["eps"]
        )
    for name, key, rows in (("curve", "eps", points), ("curve_steps", "step", stepwise)):
        columns = (key, "value", "low", "high", "n")
        context.table(name, columns, [[row[column] for column in columns] for row in rows])
    figure = _draw(points, stepwise, context.norm, context.eps, trainer_colour(context.trainer))
    context.draw("curve", figure, f"robust accuracy against {context.norm} eps and against steps of PGD")
    context.save(curve=points)
    return results


def _against_eps(context: AnalysisContext, chosen: Split, clean: Attacked, steps: int, restarts: int) -> Points:
    state, labels = clean, chosen.labels.numpy()
    shape = context.images.shape[1:]
    widest = 1.0 if context.norm == "Linf" else math.sqrt(math.prod(shape))  # the box's own diameter
    points = [{"eps": 0.0} | proportion(int((state.pred == labels).sum()), len(chosen))]
    eps = context.eps / 8
    while points[-1]["value"] > 0 and points[-1]["eps"] < widest and eps > 0:
        eps = min(eps, widest)
        attack = partial(pgd, norm=context.norm, eps=eps, steps=steps, restarts=restarts)
        state = evaluate.run_attack(
            attack, context.model, chosen, state, context.hardware,
            name="curve", seed=context.seed, batch_size=context.batch_size,
        )["curve"]  # fmt: skip
        points.append({"eps": eps} | proportion(int((state.pred == labels).sum()), len(chosen)))
        eps *= 2
    return points


def _against_steps(context: AnalysisContext, chosen: Split, clean: Attacked, steps: int) -> Points:
    standing = torch.from_numpy(clean.pred) == chosen.labels
    fallen = np.zeros(steps + 1, int)

    def work(rows: Tensor) -> None:
        x, y = evaluate.batch(chosen, rows, context.hardware)
        here = np.zeros_like(fallen)  # counted once the batch is done: it may be repeated in smaller parts

        def observe(step: int, index: Tensor, logits: Tensor, gradient: Tensor | None) -> None:
            here[step] += int((predictions(logits) != y[index]).sum())

        with evaluate.reproducible(context.seed, "curve_steps", 0, int(rows[0]), device=x.device):
            pgd(
                context.model, x, y, generator=SampleGenerator.for_images(x, context.seed, "curve_steps"),
                norm=context.norm, eps=context.eps, steps=steps, observe=observe,
            )  # fmt: skip
        np.add(fallen, here, out=fallen)

    evaluate.within_memory(work, standing.nonzero().squeeze(1), context.batch_size)
    left = int(standing.sum()) - fallen.cumsum()
    return [{"step": float(step)} | proportion(int(count), len(chosen)) for step, count in enumerate(left)]


def _draw(points: Points, stepwise: Points, norm: str, marked: float, colour: str) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    figure = Figure(figsize=(10, 3.8) if stepwise else (6.4, 4), layout="constrained")
    axis, *more = figure.subplots(1, 2 if stepwise else 1, squeeze=False)[0]
    n = int(points[0]["n"])
    eps = [point["eps"] for point in points]
    # Logarithmic in eps, with a linear piece that holds the clean accuracy at eps = 0.
    axis.set_xscale("symlog", linthresh=eps[1] if len(eps) > 1 else 1.0)
    _line(axis, eps, points, colour, "o-")
    axis.axvline(marked, color=BLACK, linestyle=":", label=f"the run's eps, {eps_text(marked)}")
    axis.set(xlim=(0, None), xlabel=f"{norm} eps, for pixels in [0, 1]")
    axis.set_xticks(eps, [eps_text(tick) for tick in eps])
    axis.minorticks_off()
    for other in more:
        _line(other, [point["step"] for point in stepwise], stepwise, colour, "-")
        other.set(xlim=(0, None), xlabel=f"steps of PGD, each eps / 10, at {norm} eps {eps_text(marked)}")
    for each in (axis, *more):
        each.set(ylim=(0, 100), ylabel=f"accuracy, % of {n} samples")
        each.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def _line(axis: Any, x: list[float], points: Points, colour: str, style: str) -> None:
    value, low, high = (100 * np.array([point[key] for point in points]) for key in ("value", "low", "high"))
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, label="95 % interval")
    axis.plot(x, value, style, color=colour, label="PGD, log-odds loss")
