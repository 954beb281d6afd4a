"""Security curves: robust accuracy against eps, up to where nothing is left, and against the steps of PGD."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aerl.analyses import AnalysisContext, Beside, Subject
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


@dataclass(frozen=True, kw_only=True)
class Curve(Beside):
    """Robust accuracy under PGD (log-odds loss) on `samples` test images: against eps, and against the steps.

    eps doubles from an eighth of the run's until nothing is left or the ball holds the box: an accuracy left there
    means that the attack fails (Athalye et al. 2018, section 3.1). Each eps is tried on the survivors of the smaller
    ones, whose examples are in the larger ball, too. The steps are those of one PGD at the run's eps, each eps / 10.
    `runs` are other runs to show beside this one, on the same images. Writes tables/curve.csv, tables/curve_steps.csv,
    figures/curve.png and, of this run, `curve` in summary.json and a Result for each eps.
    """

    samples: Count = 200
    steps: Count = 30
    restarts: Count = 1

    def __call__(self, context: AnalysisContext) -> list[Result]:
        chosen = subset(Split(context.images, context.labels), self.samples)
        found: list[tuple[Subject, Points, Points]] = []
        for subject in self.subjects(context):
            its = replace(context, model=subject.model)
            clean = evaluate.predict(its.model, chosen, its.hardware, its.batch_size)
            points = _against_eps(its, chosen, clean, self.steps, self.restarts)
            stepwise = _against_steps(its, chosen, clean, self.steps) if its.eps > 0 else []
            found.append((subject, points, stepwise))
        for name, key, number in (("curve", "eps", 0), ("curve_steps", "step", 1)):
            columns = (key, "value", "low", "high", "n")
            rows = [[s.name, *(row[column] for column in columns)] for s, *both in found for row in both[number]]
            context.table(name, ["model", *columns], rows)
        figure = _draw(found, context.norm, context.eps)
        context.draw("curve", figure, f"robust accuracy against {context.norm} eps and against steps of PGD")
        points = found[0][1]
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


def _draw(found: list[tuple[Subject, Points, Points]], norm: str, marked: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    # Logarithmic in eps, with a linear piece that holds the clean accuracy at eps = 0.
    eps = max(([point["eps"] for point in points] for _, points, _ in found), key=len)
    left.set_xscale("symlog", linthresh=eps[1] if len(eps) > 1 else 1.0)
    left.axvline(marked, color=BLACK, linestyle=":", label=f"the run's eps, {eps_text(marked)}")
    left.set_xlabel(f"{norm} eps, for pixels in [0, 1]")
    left.set_xticks(eps, [eps_text(tick) for tick in eps])
    left.minorticks_off()
    right.set_xlabel(f"steps of PGD, each eps / 10, at {norm} eps {eps_text(marked)}")
    for number, (subject, points, stepwise) in enumerate(found):
        colour, line = trainer_colour(subject.trainer), ("-", "--", ":", "-.")[number % 4]
        for axis, key, rows, marker in ((left, "eps", points, "o"), (right, "step", stepwise, None)):
            x, value, low, high = (np.array([row[name] for row in rows]) for name in (key, "value", "low", "high"))
            axis.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(x, 100 * value, line, marker=marker, color=colour, label=subject.name)
    for axis in (left, right):
        axis.set(xlim=(0, None), ylim=(0, 100), ylabel=f"accuracy, % of {found[0][1][0]['n']:.0f} samples")
        axis.grid(alpha=0.3)
    left.legend(frameon=False, title="PGD, log-odds loss; 95 % interval", fontsize=9)
    return figure
