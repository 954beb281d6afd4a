"""Per-sample metrics: `metric(logits (B, K), labels (B,)) -> (B,)`, of clean and of attacked images.

The group `metric` of the configuration adds any such function by its `_target_`: see `margin`.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from aerl.errors import UserError, foreign_code

Metric = Callable[[Tensor, Tensor], Tensor]


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    """The softmax's probability of the label."""
    return logits.softmax(1).gather(1, labels[:, None]).squeeze(1)


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """The softmax's largest probability."""
    return logits.softmax(1).amax(1)


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The entropy of the softmax, in bits."""
    nats: Tensor = torch.special.entr(logits.softmax(1)).sum(1)
    return nats / math.log(2)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the label's logit exceeds the largest other one; negative where misclassified."""
    own = F.one_hot(labels, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).amax(1)


BUILT_IN: Mapping[str, Metric] = {"p": probability, "confidence": confidence, "entropy": entropy}


def measure(metrics: Mapping[str, Metric], logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """float32 (B,) by each metric's name, of logits (B, K) and labels (B,); 0 where a logit is not finite.

    UserError about metric.NAME for what a metric raises, or if it does not return one finite number for each sample.
    """
    finite, found = logits.isfinite().all(1), {}
    for name, metric in metrics.items():
        key = f"metric.{name}"
        with foreign_code(key, metric):
            values = metric(logits.clone(), labels.clone())
        if not isinstance(values, Tensor) or values.shape != labels.shape or values.is_complex():
            form = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise UserError(f"{key}: returned {form}: expected a number for each sample, {tuple(labels.shape)}")
        found[name] = torch.where(finite, values.to(logits), 0)
        if not found[name].isfinite().all():
            raise UserError(f"{key}: returned NaN or infinity for finite logits")
    return found
