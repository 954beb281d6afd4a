"""The loss around the weights, on a plane of two filter-normalised random directions (Li et al. 2018)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from aerl.analyses import AnalysisContext
from aerl.attacks import attacking
from aerl.data import Split, subset, to_unit
from aerl.runtime.device import seed_from
from aerl.runtime.files import save_arrays
from aerl.runtime.progress import progress
from aerl.tracking.results import Result
from aerl.types import Count, Positive


def filter_normalised(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A random direction in the space of weights: each filter as long as the model's own (Li et al. 2018, section 4).

    A filter is a slice of a weight along its first dimension; biases and the weights of normalisation layers,
    which have one dimension, stay as they are (zero in the direction).
    """
    direction = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            direction[name] = torch.zeros_like(weight)
            continue
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        length = weight.detach().flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
        direction[name] = drawn * length.view(-1, *[1] * (weight.dim() - 1))
    return direction


def weight_landscape(
    context: AnalysisContext, *, samples: Count = 256, resolution: Count = 25, span: Positive = 1.0
) -> list[Result]:
    """Mean cross-entropy of `samples` test images at weights + a * first + b * second, a and b from -span to span.

    The images are always the same ones, right or wrong; the batch statistics of BatchNorm stay as trained.
    `resolution` points a side, each of which costs a pass over the images. Writes figures/weight_landscape.png and,
    beside it, weight_landscape.npz (`axis`, `loss` with b along the first dimension).
    """
    images = subset(Split(context.images, context.labels), samples)
    generator = torch.Generator().manual_seed(seed_from(context.seed, "weight_landscape"))
    model, place = context.model, context.hardware.device
    axis = np.linspace(-span, span, resolution)
    loss = np.zeros((resolution, resolution))
    first, second = (filter_normalised(model, generator) for _ in range(2))
    with attacking(model), torch.no_grad(), progress("weight_landscape", resolution, "rows") as bar:
        trained = {name: weight.detach() for name, weight in model.named_parameters()}
        for row, b in enumerate(axis):
            for column, a in enumerate(axis):
                moved = {name: w + a * first[name] + b * second[name] for name, w in trained.items()}
                total = 0.0
                for rows in torch.split(torch.arange(len(images)), context.batch_size):
                    x, y = to_unit(images.images[rows].to(place)), images.labels[rows].to(place)
                    logits = functional_call(model, moved, (x,)).float()
                    total += float(F.cross_entropy(logits, y, reduction="sum"))
                loss[row, column] = total / len(images)
            bar.update(1)
    caption = f"mean cross-entropy around the weights, n = {len(images)}"
    context.draw("weight_landscape", _draw(axis, loss, caption), caption)
    save_arrays(context.figures / "weight_landscape.npz", {"axis": axis, "loss": loss})
    return []


def _draw(axis: np.ndarray, loss: np.ndarray, title: str) -> Any:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    top = np.max(loss[np.isfinite(loss)], initial=1e-6)
    drawn = np.nan_to_num(loss, nan=top, posinf=top)
    drawn = np.maximum(drawn, 1e-6)  # a logarithm knows no zero
    scale = LogNorm(drawn.min(), max(drawn.max(), drawn.min() * 1.01))
    extent = (axis[0], axis[-1], axis[0], axis[-1])
    image = axes.imshow(drawn, origin="lower", extent=extent, cmap="cividis", norm=scale, interpolation="nearest")
    if min(drawn.shape) > 1:
        levels = np.geomspace(drawn.min(), drawn.max(), 12)[1:-1]
        axes.contour(axis, axis, drawn, levels, colors="white", linewidths=0.5)
    axes.plot(0, 0, "o", color="white", markersize=5, markerfacecolor="none")
    axes.set(xlabel="first direction, filter norms", ylabel="second direction, filter norms", title=title)
    figure.colorbar(image, ax=axes, label="cross-entropy, nats")
    return figure
