"""FMN: the smallest adversarial perturbation of each image."""

import math
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from aerl.attacks.direct import noise_of
from aerl.attacks.losses import margin
from aerl.attacks.modes import NOT_FINITE, attacking, input_gradient, predictions, warn
from aerl.attacks.projections import ascent_direction, norms
from aerl.attacks.random import Seed
from aerl.attacks.straight_through import before_softmax, straight_through
from aerl.types import Count, NonNegative, Positive, Probability

_PIXELS = (1, 2, 3)


def fmn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: Seed = None,
    norm: Literal["L2", "Linf"] = "L2",
    eps: NonNegative | None = None,
    steps: Count = 50,
    step_size: Positive | None = None,
    gamma: Probability = 0.05,
    gradient: Literal["backprop", "straight_through"] = "backprop",
) -> Tensor:
    """Fast minimum-norm attack (Pintor et al. 2021, algorithm 1): PGD on the margin in a ball whose radius adapts.

    Images x (B, C, H, W) in [0, 1] of classes y (B,). The ball shrinks by a factor of 1 - gamma where the iterate is
    misclassified, else it grows by 1 + gamma. As long as no iterate was misclassified, it also reaches beyond the
    boundary that the gradient predicts. gamma falls to 1e-4, the length of the steps to a hundredth, along a cosine.

    eps: images whose smallest perturbation is larger, or that no iterate fools, are returned unchanged; None: no limit.
    step_size: the L2 length of the first step; None means 1 for L2 and 10 for Linf, as in the paper.
    gradient: as for `pgd`.

    Uses no random numbers. Raises NoGradient for logits that do not depend on the images.
    """
    noise_of(model, x, y, generator)  # checks the images
    best, found = torch.full(y.shape, torch.inf, dtype=x.dtype, device=x.device), x.clone()
    if len(x) == 0:
        return found
    first = step_size or (1.0 if norm == "L2" else 10.0)
    radius, delta = torch.zeros_like(best), torch.zeros_like(x)
    with attacking(model), torch.no_grad():
        for step in range(steps + 1):
            annealed = (1 + math.cos(math.pi * step / steps)) / 2
            shrink = 1e-4 + (gamma - 1e-4) * annealed
            point = (x + delta).requires_grad_()
            with torch.enable_grad():
                with straight_through() if gradient == "straight_through" else nullcontext():
                    logits = before_softmax(model(point)).to(x.dtype)
                    lead = -margin(logits, y)
                slope = input_gradient(-lead, point)
            predicted = predictions(logits.detach())
            if (predicted < 0).any():
                warn(NOT_FINITE)
            wrong, size = predicted != y, norms(delta, norm).flatten()
            better = wrong & (size < best)
            best = torch.where(better, size, best)
            found[better] = point.detach()[better]
            if step == steps:
                break
            dual = slope.abs().sum(_PIXELS) if norm == "Linf" else norms(slope, "L2").flatten()
            boundary = size + lead.detach().clamp_min(0) / dual.clamp_min(torch.finfo(x.dtype).tiny)
            grown = torch.where(best < torch.inf, radius, torch.maximum(radius, boundary)) * (1 + shrink)
            radius = torch.where(wrong, torch.minimum(radius, best) * (1 - shrink), grown)
            delta = delta + ascent_direction(slope, "L2") * (first * (0.01 + 0.99 * annealed))
            limit = radius.view(-1, 1, 1, 1)
            if norm == "Linf":
                delta = torch.maximum(torch.minimum(delta, limit), -limit)
            else:
                delta = delta * (limit / norms(delta, "L2").clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)
            delta = (x + delta).clamp_(0, 1) - x
    if eps is not None:
        return torch.where((best <= eps).view(-1, 1, 1, 1), found, x)
    return found
