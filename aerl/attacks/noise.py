"""Random points of the ball: what any attack should beat, and what needs no gradient."""

import torch
from torch import Tensor, nn

from aerl.attacks.direct import noise_of
from aerl.attacks.losses import margin
from aerl.attacks.modes import NOT_FINITE, attacking, predictions, warn
from aerl.attacks.projections import clip, random_extreme, random_in_ball
from aerl.attacks.random import Seed
from aerl.types import Count, NonNegative, Norm


def noise(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: Seed = None, norm: Norm = "L2", eps: NonNegative,
    draws: Count = 100,
) -> Tensor:  # fmt: skip
    """The worst of `draws` random points around each image, or the image itself if none is worse.

    For images x (B, C, H, W) in [0, 1] of classes y (B,). The points alternate between the sphere (L1, L2) or corners
    (Linf) of the ball and its inside. The worst has the highest margin max_{k != y} z_k - z_y; a sample leaves once
    it is fooled. Finding what a gradient-based attack does not is a sign of masked gradients (Athalye et al. 2018,
    section 3.1).
    """
    generator = noise_of(model, x, y, generator)
    worst = x.clone()
    if eps == 0:
        return worst
    with attacking(model), torch.no_grad():
        highest = torch.full(y.shape, -torch.inf, dtype=x.dtype, device=x.device)
        index, point = torch.arange(len(x), device=x.device), x  # the samples that are still right
        for draw in range(draws + 1):
            if len(index) == 0:
                break
            if draw > 0:
                sample = random_extreme if draw % 2 else random_in_ball
                point = clip(x[index], sample(x[index], norm, eps, generator[index]), norm, eps)
            logits = model(point).to(x.dtype)
            predicted = predictions(logits)
            if (predicted < 0).any():
                warn(NOT_FINITE)
            value, wrong = margin(logits, y[index]), predicted != y[index]
            better = (value > highest[index]) | wrong
            worst[index[better]], highest[index[better]] = point[better], value[better]
            index = index[~wrong]
    return worst
