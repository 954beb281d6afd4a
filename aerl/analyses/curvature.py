"""The loss near each image: how steep it is, and how fast its gradient turns."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aerl.analyses import AnalysisContext
from aerl.attacks import attacking, losses
from aerl.attacks.modes import input_gradient
from aerl.attacks.projections import ascent_direction
from aerl.attacks.projections import norms as sizes
from aerl.data import to_unit
from aerl.report.figures import trainer_colour
from aerl.tracking.results import Result
from aerl.types import Count, Positive

_COLUMNS = ("what", "n", "zero", "quartile_1", "median", "quartile_3")


def curvature(
    context: AnalysisContext,
    *,
    samples: Count = 500,
    loss: Literal["ce", "log_odds", "margin"] = "ce",
    step: Positive = 0.01,
) -> list[Result]:
    """The input gradient's L2 norm and the loss's curvature along it, at images that are classified rightly.

    The curvature is ||grad(x + step * u) - grad(x)||_2 / step with u the gradient's direction, `step` in pixels'
    range [0, 1]: how far a linear picture of the loss holds (Moosavi-Dezfooli et al. 2019, section 4.1). Where the
    gradient is exactly zero or not finite neither is defined; the share of such images is reported instead. Writes
    figures/curvature.png and tables/curvature.csv; returns a Result of each median. NotMade if no image is classified
    rightly.
    """
    images = context.right(samples)
    place = context.hardware.device
    norm, bend = [], []
    climb = getattr(losses, loss)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        point = x.detach().requires_grad_()
        return input_gradient(climb(context.model(point).float(), y), point)

    with attacking(context.model):
        for rows in torch.split(torch.arange(len(images)), context.batch_size):
            x, y = to_unit(images.images[rows].to(place)), images.labels[rows].to(place)
            here = gradient(x, y)
            there = gradient(x + step * ascent_direction(here, "L2"), y)
            norm.append(sizes(here, "L2").flatten().cpu())
            bend.append((sizes(there - here, "L2") / step).flatten().cpu())
    found = {"gradient_norm": torch.cat(norm).double().numpy(), "curvature": torch.cat(bend).double().numpy()}
    alive = (found["gradient_norm"] > 0) & np.isfinite(found["curvature"])
    zero = float(1 - alive.mean())
    found = {name: values[alive] for name, values in found.items()}
    quartiles = {name: [float(q) for q in _quartiles(values)] for name, values in found.items()}
    context.table("curvature", _COLUMNS, [[name, len(images), zero, *told] for name, told in quartiles.items()])
    context.draw(
        "curvature",
        _draw(found, loss, zero, trainer_colour(context.trainer)),
        f"norm of the input gradient and curvature at clean images, loss {loss}",
    )
    medians = {f"{name}_median": told[1] for name, told in quartiles.items()} | {"gradient_zero": zero}
    context.save(curvature={"n": len(images), "loss": loss, **medians})
    return context.log.log(medians, n=len(images), split="test", attack="curvature")


def _quartiles(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else np.full(3, np.nan)


def _draw(found: dict[str, np.ndarray], loss: str, zero: float, colour: str) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    labels = {
        "gradient_norm": "L2 norm of the input gradient",
        "curvature": "change of the gradient along itself",
    }
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, (name, values) in zip(figure.subplots(1, 2), found.items(), strict=True):
        positive = values[values > 0]
        if len(positive):
            low, high = np.log10(positive.min()), np.log10(positive.max())
            bins = np.logspace(low - 0.05, high + 0.05, 31)
            axis.hist(positive, bins=bins, weights=np.full(len(positive), 100 / len(values)), color=colour)
            median = float(np.median(values))
            axis.axvline(median, color="black", linestyle=":", label=f"median {median:.3g}")
            axis.set_xscale("log")
            axis.legend(frameon=False, title=f"n = {len(values)}; no gradient: {zero:.1%}")
        axis.set(xlabel=f"{labels[name]}, nats per {'unit' if name == 'gradient_norm' else 'unit squared'}")
        axis.set_ylabel("% of samples")
    figure.suptitle(f"The loss ({loss}) at clean images")
    return figure
