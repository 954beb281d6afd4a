"""Security curves: robust accuracy against eps, up to where nothing is left, and against the steps of PGD."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aerl.analyses import AnalysisContext
from aerl.attacks import SampleGenerator, pgd, predictions
from aerl.data import Split, subset
from aerl.evaluation import evaluate
from aerl.evaluation.memory import within_memory
from aerl.evaluation.outcomes import Attacked
from aerl.evaluation.statistics import proportion
from aerl.report.figures import BLACK, trainer_colour
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import Result
from aerl.types import Count, box_width

Points = list[dict[str, float]]


def curve(context: AnalysisContext, *, samples: Count = 200, steps: Count = 30, restarts: Count = 1) -> list[Result]:
    """Robust accuracy under PGD (log-odds loss) on `samples` test images: against eps, and against the steps.

    eps doubles from an eighth of the run's until nothing is left or the ball holds the box: an accuracy left there
    means that the attack fails (Athalye et al. 2018, section 3.1). Each eps is tried on the survivors of the smaller
    ones, whose examples are in the larger ball, too. The steps are those of one PGD at the run's eps, each eps / 10.
    Writes tables/curve.csv, tables/curve_steps.csv, figures/curve.png, `curve` in summary.json, and a Result for each
    eps.
    """
    chosen = subset(Split(context.images, context.labels), samples)
    clean = evaluate.predict(context.model, chosen, context.hardware, context.batch_size)
    points = _against_eps(context, chosen, clean, steps, restarts)
    stepwise = _against_steps(context, chosen, clean, steps) if context.eps > 0 else []
    for name, key, rows in (("curve", "eps", points), ("curve_steps", "step", stepwise)):
        columns = (key, "value", "low", "high", "n")
        context.table(name, columns, [[row[column] for column in columns] for row in rows])
    figure = _draw(points, stepwise, context.norm, context.eps, trainer_colour(context.trainer))
    context.draw("curve", figure, f"robust accuracy against {context.norm} eps and against steps of PGD")
    context.save(curve=points)
    log = partial(context.log.log, n=len(chosen), split="test", attack="curve", norm=context.norm)
    return [result for point in points for result in log({"curve_accuracy": point["value"]}, eps=point["eps"])]


def _against_eps(context: AnalysisContext, chosen: Split, state: Attacked, steps: int, restarts: int) -> Points:
    box = box_width(context.norm, context.images[0].numel())
    points: Points = []
    eps, larger = 0.0, context.eps / 8
    while True:
        correct = int((state.pred == chosen.labels.numpy()).sum())
        points.append({"eps": eps} | proportion(correct, len(chosen)))
        if correct == 0 or eps == box or larger == 0:
            return points
        eps, larger = min(larger, box), 2 * larger
        attack = partial(pgd, norm=context.norm, eps=eps, steps=steps, restarts=restarts)
        state = evaluate.run_attack(
            attack, context.model, chosen, state, context.hardware,
            name="curve", seed=context.seed, batch_size=context.batch_size,
        )["curve"]  # fmt: skip


def _against_steps(context: AnalysisContext, chosen: Split, clean: Attacked, steps: int) -> Points:
    standing = torch.from_numpy(clean.pred) == chosen.labels
    fooled = np.zeros(steps + 1, int)

    def work(rows: Tensor) -> None:
        x, y = evaluate.batch(chosen, rows, context.hardware)
        here = np.zeros_like(fooled)  # added once the batch is done, which may be repeated in smaller parts

        def observe(step: int, index: Tensor, point: Tensor, logits: Tensor, gradient: Tensor | None) -> None:
            here[step] += int((predictions(logits) != y[index]).sum())

        with evaluate.reproducible(context.seed, "curve_steps", 0, int(rows[0]), device=x.device):
            pgd(
                context.model, x, y, generator=SampleGenerator.for_images(x, context.seed, "curve_steps"),
                norm=context.norm, eps=context.eps, steps=steps, observe=observe,
            )  # fmt: skip
        np.add(fooled, here, out=fooled)

    within_memory(work, standing.nonzero().squeeze(1), context.batch_size)
    left = int(standing.sum()) - fooled.cumsum()
    return [{"step": float(step)} | proportion(int(count), len(chosen)) for step, count in enumerate(left)]


def _draw(points: Points, stepwise: Points, norm: str, marked: float, colour: str) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    # Logarithmic in eps, with a linear piece that holds the clean accuracy at eps = 0.
    eps = [point["eps"] for point in points]
    left.set_xscale("symlog", linthresh=eps[1] if len(eps) > 1 else 1.0)
    left.axvline(marked, color=BLACK, linestyle=":", label=f"the run's eps, {eps_text(marked)}")
    left.set_xlabel(f"{norm} eps, for pixels in [0, 1]")
    left.set_xticks(eps, [eps_text(tick) for tick in eps])
    left.minorticks_off()
    right.set_xlabel(f"steps of PGD, each eps / 10, at {norm} eps {eps_text(marked)}")
    for axis, key, rows, style in ((left, "eps", points, "o-"), (right, "step", stepwise, "-")):
        x, value, low, high = (np.array([row[name] for row in rows]) for name in (key, "value", "low", "high"))
        axis.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.2, linewidth=0, label="95 % interval")
        axis.plot(x, 100 * value, style, color=colour, label="PGD, log-odds loss")
        axis.set(xlim=(0, None), ylim=(0, 100), ylabel=f"accuracy, % of {points[0]['n']:.0f} samples")
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    return figure
