"""The loss near each image: how steep it is, and how fast its gradient turns."""

from typing import Any, Literal

import numpy as np
import torch

from aerl.analyses import AnalysisContext
from aerl.analyses.gradients import loss_gradient
from aerl.attacks import attacking, losses
from aerl.attacks.projections import ascent_direction, norms
from aerl.data import to_unit
from aerl.report.figures import trainer_colour
from aerl.tracking.results import Result
from aerl.types import Count, Positive

# Statistic: label of its axis.
_PANELS = {
    "gradient_norm": "L2 norm of the input gradient, nats per unit",
    "curvature": "change of the gradient along itself, nats per unit squared",
}


def curvature(
    context: AnalysisContext,
    *,
    samples: Count = 500,
    loss: Literal["ce", "log_odds", "margin"] = "ce",
    step: Positive = 0.01,
) -> list[Result]:
    """The input gradient's L2 norm and the loss's curvature along it, at correctly classified images.

    The curvature is ||grad(x + step * u) - grad(x)||_2 / step with u the gradient's direction, for pixels in [0, 1]
    (Moosavi-Dezfooli et al. 2019, section 4.1). Gradients that are zero or not finite are counted and left out. Writes
    figures/curvature.png, tables/curvature.csv and a Result of each median. NotMade if no image is classified
    correctly.
    """
    images, device = context.right(samples), context.hardware.device
    norm, bend = [], []
    with attacking(context.model):
        for rows in torch.split(torch.arange(len(images)), context.batch_size):
            x, y = to_unit(images.images[rows].to(device)), images.labels[rows].to(device)
            here = loss_gradient(context.model, getattr(losses, loss), x, y)
            there = loss_gradient(context.model, getattr(losses, loss), x + step * ascent_direction(here, "L2"), y)
            norm.append(norms(here, "L2").flatten().cpu())
            bend.append((norms(there - here, "L2") / step).flatten().cpu())
    values = torch.stack([torch.cat(norm), torch.cat(bend)]).double().numpy()
    alive = (values[0] > 0) & np.isfinite(values[1])
    zero, found = float(1 - alive.mean()), dict(zip(_PANELS, values[:, alive], strict=True))
    quartiles = {
        name: np.quantile(kept, (0.25, 0.5, 0.75)).tolist() if alive.any() else [np.nan] * 3
        for name, kept in found.items()
    }
    columns = ("what", "n", "zero", "quartile_1", "median", "quartile_3")
    context.table("curvature", columns, [[name, len(images), zero, *row] for name, row in quartiles.items()])
    caption = f"norm of the input gradient and curvature at clean images, loss {loss}"
    context.draw("curvature", _draw(found, loss, zero, trainer_colour(context.trainer)), caption)
    medians = {f"{name}_median": row[1] for name, row in quartiles.items()} | {"gradient_zero": zero}
    context.save(curvature={"n": len(images), "loss": loss, **medians})
    return context.log.log(medians, n=len(images), split="test", attack="curvature")


def _draw(found: dict[str, np.ndarray], loss: str, zero: float, colour: str) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(f"The loss ({loss}) at clean images")
    for axis, (name, values) in zip(figure.subplots(1, 2), found.items(), strict=True):
        axis.set(xlabel=_PANELS[name], ylabel="% of samples")
        positive = values[values > 0]
        if len(positive):
            low, high = np.log10(positive.min()), np.log10(positive.max())
            bins, weights = np.logspace(low - 0.05, high + 0.05, 31), np.full(len(positive), 100 / len(values))
            axis.hist(positive, bins=bins, weights=weights, color=colour)
            median = float(np.median(values))
            axis.axvline(median, color="black", linestyle=":", label=f"median {median:.3g}")
            axis.set_xscale("log")
            axis.legend(frameon=False, title=f"n = {len(values)}; no gradient: {zero:.1%}")
    return figure
