"""Training objectives, each one function, and how an action is drawn.

    objective(model, x, y, *, x_adv, generator) -> loss () or (B,), metrics {name: ()}

`x` (B, C, H, W) in [0, 1], labels `y` int64 (B,). `x_adv` are adversarial examples of x, None where
`trainer.adversary` is null or has not started. The metrics are averaged over an epoch and logged. An objective whose
signature has `act`, `weight` or `probability_floor` gets what the keys trainer.act, trainer.adversary.weight and
trainer.probability_floor say; all its other keywords are settings of trainer.objective. Any function that
`trainer.objective._target_` names will do.

A classifier is a policy: its action is a class, its reward is 1 if the class is right. Supervised learning is the
policy that always acts right: `policy_loss` is then exactly cross-entropy. Instead of a draw, the loss also takes the
distribution that actions would be drawn from: the gradient is then the expected one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl.attacks.losses import kl
from aerl.types import Probability

Act = Callable[[Tensor, Tensor, torch.Generator], Tensor]
Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def policy_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    x_adv: Tensor | None,
    generator: torch.Generator,
    act: Act,
    weight: float,
    probability_floor: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss on x, plus `weight` times the one on x_adv. One action is drawn per forward pass."""
    loss, metrics = _score(model(x), y, generator, act, probability_floor)
    if x_adv is None:
        return loss, metrics
    adversarial_loss, _ = _score(model(x_adv), y, generator, act, probability_floor)
    return loss + weight * adversarial_loss, metrics | {"adversarial_loss": adversarial_loss}


def adversarial_training(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    x_adv: Tensor | None,
    generator: torch.Generator,
    act: Act,
    probability_floor: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss on x_adv in place of x (Madry et al. 2018, equation 2.1)."""
    return _score(model(x if x_adv is None else x_adv), y, generator, act, probability_floor)


def trades(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    x_adv: Tensor | None,
    generator: torch.Generator,
    act: Act,
    weight: float,
    probability_floor: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss on x plus `weight` * KL(prediction on x || on x_adv) (TRADES, Zhang et al. 2019, equation 5)."""
    logits = model(x)
    loss, metrics = _score(logits, y, generator, act, probability_floor)
    if x_adv is None:
        return loss, metrics
    divergence = kl(model(x_adv), logits).mean()
    return loss + weight * divergence, metrics | {"adversarial_loss": divergence}


def _score(
    logits: Tensor, y: Tensor, generator: torch.Generator, act: Act, probability_floor: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean policy loss, and the mean reward and accuracy: 0 for a sample whose logits are not finite."""
    actions = act(logits.detach(), y, generator)
    finite = logits.detach().isfinite().all(1)
    metrics = {
        "reward": (reward(y, actions) * finite).mean(),
        "accuracy": ((logits.argmax(1) == y) & finite).float().mean(),
    }
    return policy_loss(logits, y, actions, probability_floor).mean(), metrics


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
