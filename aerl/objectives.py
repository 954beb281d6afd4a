"""How an action is drawn, and the loss that scores it.

A classifier is a policy: its action is a class, its reward is 1 if the class is right. Supervised
learning is the policy that always acts right: `policy_loss` is then exactly cross-entropy.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from aerl.types import Probability


def policy_loss(logits: Tensor, labels: Tensor, actions: Tensor, probability_floor: float = 0.0) -> Tensor:
    """REINFORCE with reward 1(action = label): -reward * log pi(action), per sample (B,).

    logits (B, K) float32, labels and actions int64 (B,). Williams 1992, without a baseline.
    `probability_floor` clamps pi before the logarithm, as the paper's code does at 1e-6: a sample whose
    pi(action) lies below it has no gradient. 0 leaves pi as it is.
    """
    if probability_floor > 0:
        log_policy = logits.softmax(dim=1).clamp(min=probability_floor).log()
        scores = F.nll_loss(log_policy, actions, reduction="none")
    else:
        scores = F.cross_entropy(logits, actions, reduction="none")
    return (actions == labels) * scores


@dataclass(frozen=True)
class Labels:
    """Supervised learning: the action is the label."""

    def __call__(self, logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return labels


@dataclass(frozen=True)
class EpsilonGreedy:
    """Draw from the policy, or with probability `exploration` uniformly from all classes.

    The coin is thrown per sample; `coin="batch"` throws one for the whole batch, as the paper's code does.
    With one coin a sample, actions follow b = (1 - exploration) pi + exploration / K, and the expected
    gradient of `policy_loss` is that of (1 - exploration)(1 - pi_y) + (exploration / K) cross-entropy.
    """

    exploration: Probability = 0.1
    coin: Literal["sample", "batch"] = "sample"

    def __call__(self, logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """logits (B, K), detached -> actions int64 (B,)."""
        policy = logits.softmax(dim=1)
        explore: Tensor | float = self.exploration
        if self.coin == "batch":
            explore = (torch.rand((), device=logits.device, generator=generator) < self.exploration).float()
        behaviour = (1 - explore) * policy + explore / logits.shape[1]
        return torch.multinomial(behaviour, 1, generator=generator).squeeze(1)
