"""The losses that attacks maximise: functions of logits (B, K) and labels (B,), one value per sample."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy -log p_y (Madry et al. 2018, section 2).

    In float32 its gradient is zero once logit y leads by about 100, and loses its main term from a lead of about 17:
    a confident network then looks robust because nothing moves.
    """
    return F.cross_entropy(logits, y, reduction="none")


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """log((1 - p_y) / p_y). Cross-entropy is its softplus: the same gradient direction, but without saturation."""
    return _others(logits, y).logsumexp(1) - _own(logits, y)


def rescaled_ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the logits scaled to max|z| = 10, with the scale as a constant.

    Computed from `log_odds`: leads up to 20 are possible, where `ce` loses part of its gradient.
    """
    peak = logits.detach().abs().amax(1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
    return F.softplus(log_odds(logits / peak * 10, y))


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y, positive where misclassified (Carlini & Wagner 2017, section V)."""
    return _others(logits, y).amax(1) - _own(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, section 4): margin / (z_(1) - z_(3)). Needs three classes.

    Invariant to shift and scale of the logits.
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(torch.finfo(logits.dtype).tiny)


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) for reference logits (B, K) (TRADES, Zhang et al. 2019, eq. 5).

    At the reference both the loss and its gradient are zero.
    """
    p = reference.log_softmax(1)
    return (p.exp() * (p - logits.log_softmax(1))).sum(1)


def _own(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf)
