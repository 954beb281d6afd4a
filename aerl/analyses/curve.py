"""The security curve: robust accuracy against eps, up to where nothing is left."""

import math
from functools import partial
from typing import Any

import numpy as np

from aerl import evaluate
from aerl.analyses import AnalysisContext
from aerl.attacks import pgd
from aerl.data import Split, subset
from aerl.report.figures import BLACK, trainer_colour
from aerl.results import Result, eps_text, proportion
from aerl.types import Count

_COLUMNS = ("eps", "value", "low", "high", "n")


def curve(
    context: AnalysisContext, *, samples: Count = 200, steps: Count = 50, restarts: Count = 1
) -> list[Result]:
    """Robust accuracy under PGD (log-odds loss) at eps/8, eps/4, ... doubling until it is zero.

    On a fixed subset of `samples` test images. A sample that falls at one eps falls at every larger one,
    whose ball contains the example, so only survivors are attacked further and the curve cannot rise. It
    ends at zero, or where the ball holds the whole box: an accuracy left there means that the attack fails,
    not that the model is robust (Athalye et al. 2018, section 3.1). Writes curve.csv, figures/curve.png, a
    Result for every eps, and `curve` in summary.json.
    """
    chosen = subset(Split(context.images, context.labels), samples)
    state = evaluate.predict(context.model, chosen, context.hardware, context.batch_size)
    labels = chosen.labels.numpy()
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
    results = []
    for point in points:
        value = {"curve_accuracy": point["value"]}
        results += context.log.log(
            value, n=len(chosen), split="test", attack="curve", norm=context.norm, eps=point["eps"]
        )
    rows = [[point[key] for key in _COLUMNS] for point in points]
    context.table("curve", _COLUMNS, rows)
    figure = _draw(np.array(rows), context.norm, context.eps, trainer_colour(context.trainer))
    context.draw("curve", figure, f"robust accuracy against {context.norm} eps")
    context.save(curve=points)
    return results


def _draw(rows: np.ndarray, norm: str, marked: float, colour: str) -> Any:
    from matplotlib.figure import Figure

    eps, value, low, high, n = rows.T
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    # Logarithmic in eps, with a linear piece that holds the clean accuracy at eps = 0.
    axis.set_xscale("symlog", linthresh=eps[1] if len(eps) > 1 else 1.0)
    axis.fill_between(eps, 100 * low, 100 * high, color=colour, alpha=0.2, linewidth=0, label="95 % interval")
    axis.plot(eps, 100 * value, "o-", color=colour, label="PGD, log-odds loss")
    axis.axvline(marked, color=BLACK, linestyle=":", label=f"the run's eps, {eps_text(marked)}")
    axis.set(ylim=(0, 100), xlim=(0, None), xlabel=f"{norm} eps, for pixels in [0, 1]")
    axis.set_ylabel(f"accuracy, % of {n[0]:.0f} samples")
    axis.set_xticks(eps, [eps_text(float(tick)) for tick in eps])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure
