"""How an action is drawn, and the loss that scores it.

A classifier is a policy: its action is a class, its reward is 1 if the class is right. Supervised
learning is the policy that always acts right: `policy_loss` is then exactly cross-entropy. Instead of a
draw, the loss also takes the distribution that actions would be drawn from: the gradient is then the
expected one.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from aerl.types import Probability


def policy_loss(logits: Tensor, labels: Tensor, actions: Tensor, probability_floor: float = 0.0) -> Tensor:
    """REINFORCE with reward 1(action = label): -reward * log pi(action), per sample (B,).

    logits (B, K) float32, labels int64 (B,). Williams 1992, without a baseline. `actions` are int64 (B,), or
    the distribution b (B, K) of the actions, detached: the all-action gradient (Sutton et al. 2000, theorem 1),
    in which b(label) takes the reward's place. Only the rewarded action is ever scored, and that is the label.
    `probability_floor` clamps pi before the logarithm, as the paper's code does at 1e-6: a sample whose
    pi(action) lies below it has no gradient. 0 leaves pi as it is.
    """
    if probability_floor > 0:
        log_policy = logits.softmax(dim=1).clamp(min=probability_floor).log()
        scores = F.nll_loss(log_policy, labels, reduction="none")
    else:
        scores = F.cross_entropy(logits, labels, reduction="none")
    return reward(labels, actions) * scores


def reward(labels: Tensor, actions: Tensor) -> Tensor:
    """1 for the right class, 0 for another (B,); its expectation where `actions` are distributions (B, K)."""
    if actions.dim() == 2:
        return actions.gather(1, labels[:, None]).squeeze(1)
    return (actions == labels).float()


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
    `expected=True` gives that gradient itself: b in place of a draw, so that what remains is the objective
    without the noise of sampling it.
    """

    exploration: Probability = 0.1
    coin: Literal["sample", "batch"] = "sample"
    expected: bool = False

    def __call__(self, logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """logits (B, K), detached -> actions int64 (B,), or their distribution b float32 (B, K)."""
        policy = logits.softmax(dim=1)
        explore: Tensor | float = self.exploration
        if self.coin == "batch":
            explore = (torch.rand((), device=logits.device, generator=generator) < self.exploration).float()
        behaviour = (1 - explore) * policy + explore / logits.shape[1]
        if self.expected:
            return behaviour
        # An exponential race: what torch.multinomial draws, to the bit, without its check for NaN. That waits for
        # the GPU at every step, and dies of logits that are not finite; `aerl.training.loop` reports those.
        return (behaviour / torch.empty_like(behaviour).exponential_(generator=generator)).argmax(1)
