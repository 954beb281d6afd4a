"""The attack of *Can Exploration Save Us from Adversarial Attacks?* as its code runs it, for reproduction only."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerl.attacks.direct import noise_of
from aerl.attacks.modes import NOT_FINITE, attacking, input_gradient, predictions, warn
from aerl.attacks.projections import random_in_ball
from aerl.attacks.random import Seed
from aerl.types import Count, NonNegative


@dataclass(frozen=True, kw_only=True)
class PaperPGD:
    """PGD to the letter of cleverhans 4 (`projected_gradient_descent` around `fast_gradient_method`).

    Unlike `pgd`, it may leave [0, 1]; its loss is a mean over the batch, and a gradient whose norm is then under 1e-6
    gives a shorter step, so that a confident network looks robust; and it returns the last iterate. So it never counts
    in a worst case.

    step_size: None means eps / 10.
    batch_size: what the summed cross-entropy is divided by, also if fewer images are attacked together.
    box: clip every iterate to [0, 1], which the paper does not. It then still does not count.
    """

    counts: ClassVar[bool] = False

    norm: Literal["L2", "Linf"] = "L2"
    eps: NonNegative
    steps: Count = 100
    step_size: NonNegative | None = None
    batch_size: Count = 256
    box: bool = False

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Seed = None) -> Tensor:
        """Images within eps of x (B, C, H, W), from a start uniform in [-eps, eps] projected into the ball.

        Non-finite gradients are not followed, which is a warning. NoGradient for logits without one.
        """
        generator = noise_of(model, x, y, generator)
        if len(x) == 0 or self.eps == 0:
            return x.clone()
        step_size = self.eps / 10 if self.step_size is None else self.step_size
        with attacking(model):
            sound = torch.ones((), dtype=torch.bool, device=x.device)
            point = x + self._project(random_in_ball(x, "Linf", self.eps, generator))
            for _ in range(self.steps):
                point.requires_grad_()
                logits = model(point).to(x.dtype)
                sound &= (predictions(logits) >= 0).all()
                loss = F.cross_entropy(logits, y, reduction="sum") / self.batch_size
                gradient = input_gradient(loss, point, sound)
                step = gradient.sign() if self.norm == "Linf" else gradient / _length(gradient)
                point = x + self._project(point.detach() + step * step_size - x)
                point = point.clamp(0, 1) if self.box else point
        if not sound:
            warn(NOT_FINITE)
        return point

    def _project(self, delta: Tensor) -> Tensor:
        if self.norm == "Linf":
            return delta.clamp(-self.eps, self.eps)
        return delta * (self.eps / _length(delta)).clamp(max=1)


def _length(t: Tensor) -> Tensor:
    """cleverhans' L2 norm of t (B, C, H, W) as (B, 1, 1, 1): at least 1e-6."""
    return t.square().sum((1, 2, 3), keepdim=True).clamp(min=1e-12).sqrt()
