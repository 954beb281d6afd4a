"""Attacks that adapt to the model: PGD with the remedy for what makes the model's gradients useless."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aerl.attacks.losses import log_odds
from aerl.attacks.modes import NoGradient, attacking, input_gradient
from aerl.attacks.pgd import pgd
from aerl.attacks.projections import ascent_direction, random_in_ball
from aerl.attacks.random import Noise, SampleGenerator
from aerl.attacks.straight_through import straight_through
from aerl.types import Count, NonNegative, Norm

_PASSES = 16  # that measure how much a randomised model's gradient varies
_SHARE = 0.1  # of the images, from which on a sign counts
_PIXELS = (1, 2, 3)


@dataclass(frozen=True)
class Diagnosis:
    """What makes a model's gradients useless.

    repairs: the operations without gradient, with the number of their calls; see `straight_through`.
    passes: to average over, so that noise is at most half of the gradient's length; 1 if the model is deterministic.
    shattered: the share of images near which the gradient is another one.
    blind: the share of images with a gradient of zero, or with one that does not predict how the loss changes.
    """

    repairs: Counter[str] = field(default_factory=Counter)
    passes: int = 1
    shattered: float = 0.0
    blind: float = 0.0


def diagnose(model: nn.Module, x: Tensor, *, norm: Norm, eps: float, most_passes: int = 64) -> Diagnosis:
    """Examine the gradients of `model` at images x (B, C, H, W) in [0, 1], in 30 to 60 passes."""
    with attacking(model), torch.no_grad():
        logits = model(x)
        y = logits.argmax(1)
        spread = logits.amax(1) - logits.amin(1)
        randomised = ((model(x) - logits).abs().amax(1) > 0.01 * spread).any().item()
        with torch.enable_grad(), straight_through() as repairs:
            model(x.clone().requires_grad_())

        def gradient(at: Tensor) -> Tensor:
            point = at.clone().requires_grad_()
            with torch.enable_grad(), straight_through():
                value = log_odds(model(point), y)
            try:
                return input_gradient(value, point)
            except NoGradient:
                return torch.zeros_like(at)

        passes = 1
        if randomised:
            drawn = torch.stack([gradient(x) for _ in range(_PASSES)])
            noise = drawn.var(0).sum(_PIXELS)
            signal = (drawn.mean(0).square().sum(_PIXELS) - noise / _PASSES).clamp_min(0)
            needed = (4 * noise / signal).nan_to_num(1, most_passes, 1).median().item()
            passes = min(most_passes, max(2, math.ceil(needed)))
        at_image = sum((gradient(x) for _ in range(passes)), torch.zeros_like(x))
        zero = at_image.abs().amax(_PIXELS) == 0
        if randomised:  # what follows cannot tell noise from roughness
            return Diagnosis(repairs, passes, 0.0, zero.float().mean().item())
        generator = SampleGenerator.for_images(x, 0, "diagnose")
        turned = [
            (ascent_direction(at_image, "L2") * ascent_direction(gradient(near), "L2")).sum(_PIXELS)
            for near in (x + random_in_ball(x, norm, eps / 2, generator) for _ in range(2))
        ]
        shattered = (torch.stack(turned).mean(0) < 0.5) & ~zero
        blind = zero if repairs else zero | _does_not_predict(model, x, y, at_image, norm, eps)
        return Diagnosis(repairs, passes, shattered.float().mean().item(), blind.float().mean().item())


def _does_not_predict(model: nn.Module, x: Tensor, y: Tensor, gradient: Tensor, norm: Norm, eps: float) -> Tensor:
    """bool (B,): central differences along the gradient, over a fiftieth of the ball, deviate from it by more than
    half."""
    step = ascent_direction(gradient, norm) * (eps / 50)
    ahead, behind = (log_odds(model(x + side).double(), y) for side in (step, -step))
    return ~(((ahead - behind) / (2 * (step * gradient).sum(_PIXELS)) - 1).abs() <= 0.5)  # NaN counts


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """PGD with every remedy that the model needs (Athalye et al. 2018, section 4), one after the other.

    - `straight_through`, if operations without gradient are on the path of the image.
    - `averaged` gradients over several passes, if the model is randomised; the other remedies then average, too.
    - `smoothed` gradients from a small ball around the iterate, if they are shattered.
    - `finite_differences`, if gradients are zero, or do not predict how the loss changes.

    Each attacks the samples that withstood the ones before. The remedies are chosen by `diagnose` on the first images.
    An ordinary deterministic model needs none: its samples are left to the other attacks.

    norm, eps, steps, step_size: as for `pgd`.
    directions: of finite differences, each of two forward passes per step.
    most_passes: to average over.
    """

    norm: Norm = "L2"
    eps: NonNegative
    steps: Count = 100
    step_size: NonNegative | None = None
    directions: Count = 32
    most_passes: Count = 64

    def stages(self, model: nn.Module, x: Tensor) -> Mapping[str, Callable[..., Tensor]]:
        """The remedies by name, for a model whose first images are x (B, C, H, W)."""
        if len(x) == 0 or self.eps == 0:
            return {}
        found = diagnose(model, x, norm=self.norm, eps=self.eps, most_passes=self.most_passes)
        settings: dict[str, Any] = {"eot": found.passes}
        if found.passes > 1:  # one lucky pass proves nothing
            settings |= {"drop_fooled": False, "keep": "last"}
        if found.repairs:
            settings |= {"gradient": "straight_through"}
        remedies: dict[str, dict[str, Any]] = {}
        if found.repairs:
            remedies["straight_through"] = {}
        elif found.passes > 1:
            remedies["averaged"] = {}
        if found.shattered > _SHARE:
            remedies["smoothed"] = {"jitter": 0.5, "eot": max(16, found.passes)}
        if found.blind > _SHARE:
            remedies["finite_differences"] = {"gradient": "finite_differences", "directions": self.directions}
        return {name: partial(self._pgd, **settings | changes) for name, changes in remedies.items()}

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Noise) -> Tensor:
        """Attack images x (B, C, H, W) of classes y (B,) with all remedies that they show to be needed."""
        found = x.clone()
        for attack in self.stages(model, x).values():
            with attacking(model), torch.no_grad():
                rows = (model(found).argmax(1) == y).nonzero().squeeze(1)
            if len(rows):
                found[rows] = attack(model, x[rows], y[rows], generator=generator[rows])
        return found

    def _pgd(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Noise, **settings: Any) -> Tensor:
        return pgd(
            model, x, y, generator=generator,
            norm=self.norm, eps=self.eps, steps=self.steps, step_size=self.step_size, **settings,
        )  # fmt: skip
