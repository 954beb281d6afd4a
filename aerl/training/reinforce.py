"""REINFORCE as it is varied: baselines, several draws of an action, an entropy bonus."""

from typing import Literal

import torch
from torch import Generator, Tensor, nn

from aerl.errors import UserError
from aerl.training.objectives import Act, Loss, reward
from aerl.types import Count, NonNegative, Probability


class Reinforce(nn.Module):
    """-(reward - baseline) * log pi(action), the mean over samples and `draws`, minus `entropy` * H(pi).

    baseline (Williams 1992): `none`; `batch`, the mean reward of the batch; `running`, the mean over earlier batches,
    which decays by `decay` a step; `leave_one_out`, the mean reward of the sample's other draws (Kool et al. 2019), for
    `draws` of 2 or more. H(pi) in nats, over all classes (Mnih et al. 2016, section 4).

    With baseline none, one draw and no bonus it is `policy_gradient` without a floor. The actions of an exploring act
    follow b and not pi, and are not reweighted, as in the paper. A wrong action then has the term
    baseline * log pi(action), which has no lower bound; under b it is drawn even when pi hardly ever would.

    Raises UserError for settings that do not fit.
    """

    average: Tensor

    def __init__(
        self, *, act: Act, weight: float, draws: Count = 1, entropy: NonNegative = 0.0, decay: Probability = 0.99,
        baseline: Literal["none", "batch", "running", "leave_one_out"] = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        if baseline == "leave_one_out" and draws < 2:
            raise UserError(f"baseline=leave_one_out: is the mean of the other draws; draws={draws}, try draws=2")
        if getattr(act, "expected", False):
            raise UserError("trainer.act.expected=true: draws nothing; use aerl.training.objectives.policy_gradient")
        self.act, self.weight, self.draws = act, weight, draws
        self.baseline, self.entropy, self.decay = baseline, entropy, decay
        self.register_buffer("average", torch.zeros(()))

    def forward(
        self, model: nn.Module, x: Tensor, y: Tensor, *, x_adv: Tensor | None, generator: Generator,
        act: Act | None = None,
    ) -> Loss:  # fmt: skip
        """As every objective; `act` is the one of this step if it is scheduled."""
        act = act or self.act
        loss, metrics = self._score(model(x), y, act, generator)
        if self.training:  # after its use: the baseline of a step does not depend on the step's actions
            self.average.lerp_(metrics["reward"], 1 - self.decay)
        if x_adv is None:
            return loss, metrics
        adversarial_loss, _ = self._score(model(x_adv), y, act, generator)
        return loss + self.weight * adversarial_loss, metrics | {"adversarial_loss": adversarial_loss}

    def _score(self, logits: Tensor, y: Tensor, act: Act, generator: Generator) -> Loss:
        actions = torch.stack([act(logits.detach(), y, generator) for _ in range(self.draws)])
        rewards = torch.stack([reward(y, each) for each in actions])  # (draws, B)
        log_policy = logits.log_softmax(1)
        scores = (rewards - self._baseline(rewards)) * log_policy.gather(1, actions.T).T
        entropy = -(log_policy.exp() * log_policy).sum(1).mean()
        metrics = {
            "reward": rewards.mean(),
            "accuracy": (logits.detach().argmax(1) == y).float().mean(),
            "policy_entropy": entropy.detach(),
        }
        return -scores.mean() - self.entropy * entropy, metrics

    def _baseline(self, rewards: Tensor) -> Tensor | float:
        """What is subtracted from the rewards (draws, B)."""
        if self.baseline == "batch":
            return rewards.mean()
        if self.baseline == "running":
            return self.average.clone()
        if self.baseline == "leave_one_out":
            return (rewards.sum(0) - rewards) / (self.draws - 1)
        return 0.0
