"""The attack of *Can Exploration Save Us from Adversarial Attacks?* as its code runs it, for reproduction only."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerl.attacks.modes import NOT_FINITE, attacking, input_gradient, predictions, warn
from aerl.attacks.projections import random_in_ball
from aerl.attacks.random import Noise
from aerl.types import Count, NonNegative, Norm


@dataclass(frozen=True, kw_only=True)
class PaperPGD:
    """PGD to the letter of cleverhans 4 (`projected_gradient_descent` around `fast_gradient_method`).

    It differs from `pgd` in what makes a number unreliable: its images may leave [0, 1]; the loss is the mean over
    a batch, and a gradient whose norm is then under 1e-6 is not brought to full length, so that a confident network
    looks robust; the last iterate counts, even if an earlier one had fooled the model. So its outcome is never part
    of a worst case (`counts`).

    eps, step_size: lengths in units of the images' range; a step_size of None means eps / 10.
    batch_size: what the summed cross-entropy is divided by, also where fewer images are attacked together, so
        that no outcome depends on the rest of the batch.
    """

    counts: ClassVar[bool] = False

    norm: Norm = "L2"
    eps: NonNegative
    steps: Count = 100
    step_size: NonNegative | None = None
    batch_size: Count = 256

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Noise) -> Tensor:
        """Attack images x (B, C, H, W) in [0, 1] of classes y (B,), from pixels uniform in [-eps, eps] around
        them, brought into the ball. Returns images like x, within eps of it but not always within [0, 1].

        What is not finite in a gradient is not followed, which is reported. NoGradient for logits that do not
        depend differentiably on the images.
        """
        if len(x) == 0 or self.eps == 0:
            return x.clone()
        length = self.eps / 10 if self.step_size is None else self.step_size
        with attacking(model):
            point = x + self._project(random_in_ball(x, "Linf", self.eps, generator))
            sound = torch.ones((), dtype=torch.bool, device=x.device)
            for _ in range(self.steps):
                point.requires_grad_()
                logits = model(point).to(x.dtype)
                sound &= (predictions(logits) >= 0).all()
                loss = F.cross_entropy(logits, y, reduction="sum") / self.batch_size
                step = self._direction(input_gradient(loss, point, sound)).mul_(length)
                point = x + self._project(point.detach() + step - x)
        if not sound:
            warn(NOT_FINITE)
        return point

    def _direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.norm == "Linf" else gradient / _length(gradient)

    def _project(self, delta: Tensor) -> Tensor:
        if self.norm == "Linf":
            return delta.clamp(-self.eps, self.eps)
        return delta * (self.eps / _length(delta)).clamp(max=1)


def _length(t: Tensor) -> Tensor:
    """cleverhans' L2 norm of t (B, C, H, W) as (B, 1, 1, 1): never under 1e-6."""
    return t.square().sum((1, 2, 3), keepdim=True).clamp(min=1e-12).sqrt()
