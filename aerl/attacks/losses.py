"""What an attack climbs: functions of logits (B, K) and labels (B,), one value each, to be maximised."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy -log p_y (Madry et al. 2018, section 2).

    Its gradient has a factor 1 - p_y, which is zero in float32 once logit y leads by about 17 (the other
    terms vanish at 104): a confident network then looks robust because nothing moves.
    """
    return F.cross_entropy(logits, y, reduction="none")


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """log((1 - p_y) / p_y), cross-entropy without its saturation.

    Cross-entropy is softplus of this, so both rank points alike and their gradients have the same
    direction in exact arithmetic; but this one's gradient does not vanish however confident the network.
    """
    return _others(logits, y).logsumexp(1) - _own(logits, y)


def rescaled_ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the logits brought to max|z| = 10, the factor taken as a constant of the moment.

    Invariant to the scale of the logits, not to a shift. Written by way of `log_odds`, since a lead of 17 to 20
    is possible and `ce` would then lose the part of the gradient that lowers logit y.
    """
    peak = logits.detach().abs().amax(1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)
    return F.softplus(log_odds(logits / peak * 10, y))


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y, positive where misclassified (Carlini & Wagner 2017, section V)."""
    return _others(logits, y).amax(1) - _own(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, section 4): the margin over z_(1) - z_(3).

    Invariant to shift and scale of the logits. Needs three classes or more.
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(torch.finfo(logits.dtype).tiny)


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)): how far a prediction (B, K) is from that of the clean image
    (B, K), whatever the label (TRADES, Zhang et al. 2019, equation 5). Zero, and so is its gradient, at the
    clean image."""
    p = reference.log_softmax(1)
    return (p.exp() * (p - logits.log_softmax(1))).sum(1)


def _own(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).squeeze(1)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf)
