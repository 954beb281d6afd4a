"""The geometry of the threat models: L2 and Linf balls around an image, and the box [0, 1].

All tensors are batches (B, C, H, W); norms are per sample. Reductions run over three dimensions, because flattening
would copy a channels_last tensor.
"""

import math

import torch
from torch import Tensor

from aerl.attacks.random import Noise
from aerl.types import Norm

_PIXELS = (1, 2, 3)


def norms(t: Tensor, norm: Norm) -> Tensor:
    """Per-sample norm of t (B, C, H, W) as (B, 1, 1, 1), finite and positive unless t is zero.

    The L2 norm is max|t| * ||t / max|t|||, because the squares of a gradient of size 1e-25 are zero in float32.
    """
    peak = t.abs().amax(_PIXELS, keepdim=True)  # vector_norm with ord=inf takes ten times as long
    return peak if norm == "Linf" else peak * _l2(_scaled(t, peak))


def ascent_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """The step of unit norm along which a linear function with this gradient (B, C, H, W) grows most.

    The sign for Linf, the normalised gradient for L2; zero for a zero gradient.
    """
    if norm == "Linf":
        return gradient.sign()
    # Two divisions, because the norm itself may underflow or overflow.
    unit = _scaled(gradient, norms(gradient, "Linf"))
    return unit.div_(_l2(unit).clamp_min(1))


def _scaled(t: Tensor, peak: Tensor) -> Tensor:
    return t / peak.clamp_min(torch.finfo(t.dtype).tiny)  # 0 / 0 would be NaN


def _l2(t: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(t, 2, _PIXELS, keepdim=True)
    return length


def project(delta: Tensor, norm: Norm, eps: float) -> Tensor:
    """The point of the eps-ball around zero that is nearest to delta (B, C, H, W)."""
    if norm == "Linf":
        return delta.clamp(-eps, eps)
    size = norms(delta, norm)
    return delta * torch.where(size > eps, eps / size, torch.ones_like(size))


def clip(x: Tensor, delta: Tensor, norm: Norm, eps: float) -> Tensor:
    """x + delta (B, C, H, W), projected into the eps-ball around x, then into the box [0, 1].

    The result is in both: x is in the box, so the second projection only moves pixels towards x.
    """
    return project(delta, norm, eps).add_(x).clamp_(0, 1)


def random_in_ball(like: Tensor, norm: Norm, eps: float, generator: Noise) -> Tensor:
    """Points uniform in the eps-ball around zero, one for each sample of `like` (B, C, H, W).

    For L2 a normal direction and a radius of eps * U**(1/d), which makes the density uniform.
    """
    if norm == "Linf":
        return generator.uniform(like).mul_(2 * eps).sub_(eps)
    direction = random_extreme(like, norm, 1, generator)
    radius = generator.uniform(like[:, :1, :1, :1]) ** (1 / math.prod(like.shape[1:]))
    return direction.mul_(radius.mul_(eps))


def random_extreme(like: Tensor, norm: Norm, eps: float, generator: Noise) -> Tensor:
    """Points uniform on the eps-sphere (L2) or the corners of the eps-cube (Linf), one for each sample of `like`."""
    return ascent_direction(generator.normal(like), norm).mul_(eps)
