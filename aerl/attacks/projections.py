"""The geometry of the threat models: L1, L2 and Linf balls around an image, and the box [0, 1].

All tensors are batches (B, C, H, W); norms are per sample. Reductions run over three dimensions, because flattening
would copy a channels_last tensor.
"""

import math

import torch
from torch import Tensor

from aerl.attacks.random import Noise
from aerl.types import Norm

_PIXELS = (1, 2, 3)
_SPARSE = 0.01  # share of the pixels that a step in L1 changes


def norms(t: Tensor, norm: Norm) -> Tensor:
    """Per-sample norm of t (B, C, H, W) as (B, 1, 1, 1), finite and positive unless t is zero.

    The L2 norm is max|t| * ||t / max|t|||, because the squares of a gradient of size 1e-25 are zero in float32.
    """
    if norm == "L1":
        return t.abs().sum(_PIXELS, keepdim=True)
    peak = t.abs().amax(_PIXELS, keepdim=True)  # vector_norm with ord=inf takes ten times as long
    return peak if norm == "Linf" else peak * _l2(_scaled(t, peak))


def ascent_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """A step of unit norm along which a linear function with this gradient (B, C, H, W) grows; zero for no gradient.

    It grows most along the sign for Linf, the normalised gradient for L2, and the largest component alone for L1. There
    a step is the sign of the largest 1 % of the components, of equal size (SLIDE, Tramer & Boneh 2019, section 4.2).
    """
    if norm == "Linf":
        return gradient.sign()
    if norm == "L1":
        flat = gradient.flatten(1)
        largest = flat.abs().topk(max(1, round(_SPARSE * flat.shape[1])), dim=1).indices
        sparse = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).view_as(gradient)
        return sparse / norms(sparse, "L1").clamp_min(1)
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
    if norm == "L1":
        return _shrunk(delta, eps, torch.full_like(delta, torch.inf))
    size = norms(delta, norm)
    return delta * torch.where(size > eps, eps / size, torch.ones_like(size))


def clip(x: Tensor, delta: Tensor, norm: Norm, eps: float) -> Tensor:
    """x + delta (B, C, H, W), projected into the eps-ball around x, then into the box [0, 1].

    The result is in both: x is in the box, so the second projection only moves pixels towards x. In L1 it is the
    nearest point of both: one projection after the other would leave most of the ball unused (Croce & Hein 2021).
    """
    if norm == "L1":
        return (x + _shrunk(delta, eps, torch.where(delta > 0, 1 - x, x))).clamp_(0, 1)
    return project(delta, norm, eps).add_(x).clamp_(0, 1)


def _shrunk(delta: Tensor, eps: float, room: Tensor) -> Tensor:
    """The nearest point to delta (B, C, H, W) of the L1 ball, whose components also are at most `room` (B, C, H, W).

    It is sign(delta) * min(max(|delta| - cut, 0), room) with the smallest cut >= 0 for which it is in the ball. The L1
    norm is piecewise linear in the cut: it bends where a component reaches its room or zero.
    """
    size, room = delta.abs().flatten(1).double(), room.flatten(1).clamp_min(0).double()  # of float32 little is left
    excess = (size - room).clamp_min(0)
    bends, order = torch.cat([size, excess], 1).sort(dim=1, descending=True)
    # From the largest bend down, each component adds its slope 1 from `size` to `excess`.
    slope = torch.where(order < size.shape[1], 1.0, -1.0).to(size).cumsum(1)
    lower = torch.cat([bends[:, 1:], torch.zeros_like(bends[:, :1])], 1)
    norm = (slope * (bends - lower)).cumsum(1)  # at the lower end of each piece
    piece = (norm <= eps).sum(1, keepdim=True).clamp_max(bends.shape[1] - 1)
    before = torch.where(piece > 0, norm.gather(1, (piece - 1).clamp_min(0)), 0)
    cut = bends.gather(1, piece) - (eps - before) / slope.gather(1, piece).clamp_min(1)
    cut = torch.where(norm[:, -1:] <= eps, 0, cut.clamp_min(0))
    kept = torch.minimum((size - cut).clamp_min(0), room)
    kept = kept * (eps / kept.sum(1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)).clamp_max(1)  # rounding
    return delta.sign() * kept.to(delta).view_as(delta)


def free(gradient: Tensor, point: Tensor) -> Tensor:
    """A gradient (B, C, H, W) without the components along which images `point` would leave [0, 1]."""
    blocked = ((point <= 0) & (gradient < 0)) | ((point >= 1) & (gradient > 0))
    return gradient.masked_fill(blocked, 0)


def random_in_ball(like: Tensor, norm: Norm, eps: float, generator: Noise) -> Tensor:
    """Points uniform in the eps-ball around zero, one for each sample of `like` (B, C, H, W).

    For L2 a normal direction, for L1 a Laplacian one, and a radius of eps * U**(1/d), which makes the density uniform.
    """
    if norm == "Linf":
        return generator.uniform(like).mul_(2 * eps).sub_(eps)
    direction = random_extreme(like, norm, 1, generator)
    radius = generator.uniform(like[:, :1, :1, :1]) ** (1 / math.prod(like.shape[1:]))
    return direction.mul_(radius.mul_(eps))


def random_extreme(like: Tensor, norm: Norm, eps: float, generator: Noise) -> Tensor:
    """Points uniform on the eps-sphere (L1, L2) or the corners of the eps-cube (Linf), one per sample of `like`."""
    if norm == "L1":
        draw = 2 * generator.uniform(like) - 1
        laplace = -draw.sign() * torch.log1p(-draw.abs().clamp_max(1 - 1e-7))
        return laplace.mul_(eps / norms(laplace, norm).clamp_min(torch.finfo(like.dtype).tiny))
    return ascent_direction(generator.normal(like), norm).mul_(eps)
