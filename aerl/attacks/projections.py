"""The geometry of the threat models: the L2 and the Linf ball around an image, and the box [0, 1].

All tensors are batches (B, C, H, W) and every norm is taken per sample. The reductions run over three
dimensions rather than over a flattened view, which would copy a channels_last tensor.
"""

import math

import torch
from torch import Tensor

from aerl.attacks.random import Noise
from aerl.types import Norm

_PIXELS = (1, 2, 3)


def norms(t: Tensor, norm: Norm) -> Tensor:
    """Per-sample norm of t (B, C, H, W) as (B, 1, 1, 1), finite and positive unless t is zero.

    The L2 norm is max|t| * ||t / max|t|||: squares of a gradient of size 1e-25 are zero in float32, and
    an attack that divides by such a norm stands still or flies off.
    """
    peak = t.abs().amax(_PIXELS, keepdim=True)  # vector_norm with ord=inf takes ten times as long
    if norm == "Linf":
        return peak
    # Clamped to the smallest normal number: 0 / 0 would be NaN where t is zero.
    scaled = t / peak.clamp_min(torch.finfo(t.dtype).tiny)
    length: Tensor = torch.linalg.vector_norm(scaled, 2, _PIXELS, keepdim=True)
    return peak * length


def ascent_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """The step of unit norm along which a linear function with this gradient (B, C, H, W) grows most.

    The sign for Linf, the normalised gradient for L2. A zero gradient gives a zero step.
    """
    if norm == "Linf":
        return gradient.sign()
    peak = norms(gradient, "Linf")
    # Two divisions, since the norm itself may underflow or overflow where direction and peak do not.
    unit = gradient / peak.clamp_min(torch.finfo(gradient.dtype).tiny)
    length: Tensor = torch.linalg.vector_norm(unit, 2, _PIXELS, keepdim=True)
    return unit.div_(length.clamp_min(1))


def project(delta: Tensor, norm: Norm, eps: float) -> Tensor:
    """The point of the eps-ball around zero that is nearest to delta (B, C, H, W)."""
    if norm == "Linf":
        return delta.clamp(-eps, eps)
    size = norms(delta, norm)
    return delta * torch.where(size > eps, eps / size, torch.ones_like(size))


def random_in_ball(like: Tensor, norm: Norm, eps: float, generator: Noise) -> Tensor:
    """Points uniform in the eps-ball around zero, one for each sample of `like` (B, C, H, W).

    For L2 a normal direction, at a radius eps * U**(1/d), which gives every part of the ball its share
    of volume.
    """
    if norm == "Linf":
        return generator.uniform(like).mul_(2 * eps).sub_(eps)
    direction = random_extreme(like, norm, 1, generator)
    radius = generator.uniform(like[:, :1, :1, :1]) ** (1 / math.prod(like.shape[1:]))
    return direction.mul_(radius.mul_(eps))


def random_extreme(like: Tensor, norm: Norm, eps: float, generator: Noise) -> Tensor:
    """Points uniform on the eps-sphere (L2) or the corners of the eps-cube (Linf), like `random_in_ball`."""
    return ascent_direction(generator.normal(like), norm).mul_(eps)


def clip(x: Tensor, delta: Tensor, norm: Norm, eps: float) -> Tensor:
    """x + delta (B, C, H, W) brought into the eps-ball around x, then into the box [0, 1].

    In this order the result is in both: x itself is in the box, so clipping to it only moves a pixel
    back towards x, and never makes the perturbation larger. (The other order may leave the box.)
    """
    return project(delta, norm, eps).add_(x).clamp_(0, 1)
