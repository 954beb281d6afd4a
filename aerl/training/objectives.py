"""Training objectives, each one function, and how an action is drawn.

    objective(model, x, y, *, x_adv, generator) -> loss () or (B,), metrics {name: ()}

`x` (B, C, H, W) in [0, 1], labels `y` int64 (B,), or with CutMix and MixUp their shares float32 (B, K); `x_adv` are
adversarial examples of x, None if trainer.adversary is null or has not started. The metrics are averaged over an epoch
and logged. Keywords named `act`, `weight` or `probability_floor` are set from trainer.act, trainer.adversary.weight and
trainer.probability_floor. An act that has a method `at` is replaced in each step by `act.at(progress)`, where
`progress` is the share of all steps that is done.

A classifier is a policy: its action is a class, its reward is 1 if the class is right. In supervised learning the
action is the label, and `policy_loss` is cross-entropy. It also takes the distribution of the actions in place of a
draw; its gradient is then the expected one. So each act gives cross-entropy another weight per sample: 1 (`Labels`),
p_y^q (`GeneralizedCrossEntropy`), and (1 - e) p_y + e/K in expectation (`EpsilonGreedy`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from aerl.attacks.losses import kl
from aerl.types import Probability

Act = Callable[[Tensor, Tensor, Generator], Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]
Objective = Callable[..., Loss]


def policy_gradient(
    model: nn.Module, x: Tensor, y: Tensor, *, x_adv: Tensor | None, generator: Generator,
    act: Act, weight: float, probability_floor: float,
) -> Loss:  # fmt: skip
    """The policy loss on x, plus `weight` times the one on x_adv. One action is drawn per forward pass."""
    loss, metrics = _score(model(x), y, generator, act, probability_floor)
    if x_adv is None:
        return loss, metrics
    adversarial_loss, _ = _score(model(x_adv), y, generator, act, probability_floor)
    return loss + weight * adversarial_loss, metrics | {"adversarial_loss": adversarial_loss}


def adversarial_training(
    model: nn.Module, x: Tensor, y: Tensor, *, x_adv: Tensor | None, generator: Generator,
    act: Act, probability_floor: float,
) -> Loss:  # fmt: skip
    """The policy loss on x_adv in place of x (Madry et al. 2018, equation 2.1)."""
    return _score(model(x if x_adv is None else x_adv), y, generator, act, probability_floor)


def trades(
    model: nn.Module, x: Tensor, y: Tensor, *, x_adv: Tensor | None, generator: Generator,
    act: Act, weight: float, probability_floor: float,
) -> Loss:  # fmt: skip
    """The policy loss on x plus `weight` * KL(prediction on x || on x_adv) (TRADES, Zhang et al. 2019, equation 5)."""
    logits = model(x)
    loss, metrics = _score(logits, y, generator, act, probability_floor)
    if x_adv is None:
        return loss, metrics
    divergence = kl(model(x_adv), logits).mean()
    return loss + weight * divergence, metrics | {"adversarial_loss": divergence}


def label_smoothing(
    model: nn.Module, x: Tensor, y: Tensor, *, x_adv: Tensor | None, generator: Generator,
    weight: float, smoothing: Probability,
) -> Loss:  # fmt: skip
    """Cross-entropy with the label's share `smoothing` spread over all classes (Szegedy et al. 2016, section 7), on x
    plus `weight` times the one on x_adv."""
    logits = model(x)
    loss = F.cross_entropy(logits, y, label_smoothing=smoothing)
    metrics = {"accuracy": (logits.detach().argmax(1) == largest(y)).float().mean()}
    if x_adv is None:
        return loss, metrics
    adversarial_loss = F.cross_entropy(model(x_adv), y, label_smoothing=smoothing)
    return loss + weight * adversarial_loss, metrics | {"adversarial_loss": adversarial_loss}


def _score(logits: Tensor, y: Tensor, generator: Generator, act: Act, probability_floor: float) -> Loss:
    """The mean policy loss, reward and accuracy; a sample whose logits are not finite earns 0."""
    actions = act(logits.detach(), y, generator)
    finite = logits.detach().isfinite().all(1)
    metrics = {
        "reward": (reward(y, actions) * finite).mean(),
        "accuracy": ((logits.argmax(1) == largest(y)) & finite).float().mean(),
    }
    return policy_loss(logits, y, actions, probability_floor).mean(), metrics


def policy_loss(logits: Tensor, labels: Tensor, actions: Tensor, probability_floor: float = 0.0) -> Tensor:
    """REINFORCE with reward 1(action = label), without a baseline (Williams 1992): -reward * log pi(action), (B,).

    logits (B, K), labels int64 (B,). `actions` are int64 (B,), or their distribution b (B, K), detached: the
    all-action gradient (Sutton et al. 2000, theorem 1), in which b(label) takes the reward's place. Only the label is
    ever rewarded, so it alone is scored. `probability_floor` is added to pi twice, before and after a second
    normalisation, as in the paper's code (rl_train/agent/policy_gradient_epsilon.py, 1e-6): a sample with pi(label) far
    below it has hardly a gradient. Shares of mixed labels (B, K) give cross-entropy with them, whatever the actions.
    """
    if probability_floor > 0:
        policy = (logits.softmax(dim=1) + probability_floor) / (1 + logits.shape[1] * probability_floor)
        log_policy = (policy + probability_floor).log()
        if labels.dim() == 2:
            return -(labels * log_policy).sum(1)
        return reward(labels, actions) * F.nll_loss(log_policy, labels, reduction="none")
    return reward(labels, actions) * F.cross_entropy(logits, labels, reduction="none")


def largest(labels: Tensor) -> Tensor:
    """The labels (B,) of which an image has the largest share, if they are shares (B, K)."""
    return labels.argmax(1) if labels.dim() == 2 else labels


def takes_mixed_labels(objective: Objective, act: Act) -> bool:
    """Whether an objective is defined for labels that are shares of classes; other people's may be."""
    return isinstance(act, Labels) and (not isinstance(objective, nn.Module) or hasattr(objective, "mixed_labels"))


def reward(labels: Tensor, actions: Tensor) -> Tensor:
    """1 for the right class, else 0 (B,); its expectation if `actions` are distributions (B, K). 1 for mixed labels."""
    if labels.dim() == 2:
        return labels.sum(1)
    if actions.dim() == 2:
        return actions.gather(1, labels[:, None]).squeeze(1)
    return (actions == labels).float()


@dataclass(frozen=True)
class Labels:
    """Supervised learning: the action is the label."""

    def __call__(self, logits: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return labels


@dataclass(frozen=True)
class GeneralizedCrossEntropy:
    """(1 - p_y^q) / q (Zhang & Sabuncu 2018, equation 6), whose gradient is that of cross-entropy times p_y^q.

    q=0 is cross-entropy, q=1 the expected reward without exploration: the distribution that it returns has p_y^q in
    place of b(label). The loss that is logged is p_y^q times cross-entropy.
    """

    q: Probability = 0.7

    def __call__(self, logits: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return logits.softmax(dim=1).pow(self.q)


@dataclass(frozen=True)
class EpsilonGreedy:
    """Draw from the policy, or with probability `exploration` uniformly from all classes.

    The coin is thrown for each sample, or with `coin="batch"` once for the batch, as in the paper's code. Per sample,
    actions follow b = (1 - exploration) pi + exploration / K, and the expected gradient of `policy_loss` is that of
    (1 - exploration)(1 - pi_y) + (exploration / K) cross-entropy. `expected=True` returns b instead of a draw: the
    same objective without the noise of sampling. `exploration` changes linearly to `final_exploration`, if that is set.
    """

    exploration: Probability = 0.1
    coin: Literal["sample", "batch"] = "sample"
    expected: bool = False
    final_exploration: Probability | None = None

    def at(self, progress: float) -> "EpsilonGreedy":
        """What it is after a share `progress` in [0, 1] of the training."""
        if self.final_exploration is None:
            return self
        exploration = self.exploration + progress * (self.final_exploration - self.exploration)
        return replace(self, exploration=exploration, final_exploration=None)

    def __call__(self, logits: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """logits (B, K), detached -> actions int64 (B,), or their distribution b float32 (B, K)."""
        explore: Tensor | float = self.exploration
        if self.coin == "batch":
            explore = (torch.rand((), device=logits.device, generator=generator) < self.exploration).float()
        behaviour = (1 - explore) * logits.softmax(dim=1) + explore / logits.shape[1]
        if self.expected:
            return behaviour
        # An exponential race: the draws of torch.multinomial to the bit, without its check for NaN, which waits for
        # the GPU at every step. The training loop reports logits that are not finite.
        return (behaviour / torch.empty_like(behaviour).exponential_(generator=generator)).argmax(1)
