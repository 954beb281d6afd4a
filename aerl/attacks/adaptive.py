"""Attacks that adapt to the model: PGD with the remedy for what makes the model's gradients useless."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aerl.attacks.direct import noise_of
from aerl.attacks.losses import log_odds
from aerl.attacks.modes import NoGradient, attacking, input_gradient, warn
from aerl.attacks.pgd import pgd
from aerl.attacks.projections import ascent_direction, random_extreme, random_in_ball
from aerl.attacks.random import Noise, SampleGenerator, Seed
from aerl.attacks.straight_through import before_softmax, straight_through
from aerl.errors import first_line
from aerl.runtime.device import is_out_of_memory
from aerl.types import Count, NonNegative, Norm

_PASSES = 16  # that measure how much a randomised model's gradient varies
_DIRECTIONS = 16  # of finite differences
_PIXELS = (1, 2, 3)


@dataclass(frozen=True)
class Diagnosis:
    """What makes a model's gradients useless.

    repairs: the operations without gradient, with the number of their calls; see `straight_through`.
    passes: to average over, so that noise is at most half of the gradient's length; 1 if the model is deterministic.
    shattered: the share of images close to which the gradient points elsewhere.
    blind: the share of images whose loss rises more along random finite differences than along the gradient.
    """

    repairs: Counter[str] = field(default_factory=Counter)
    passes: int = 1
    shattered: float = 0.0
    blind: float = 0.0


def diagnose(model: nn.Module, x: Tensor, *, norm: Norm, eps: float, most_passes: int = 64) -> Diagnosis:
    """Examine the gradients of `model`, with the repairs of `straight_through`, at images x (B, C, H, W) in [0, 1]."""
    generator = SampleGenerator.for_images(x, 0, "diagnose")
    with attacking(model), torch.no_grad():
        logits = model(x)
        y, spread = logits.argmax(1), logits.amax(1) - logits.amin(1)
        randomised = bool(((model(x) - logits).abs().amax(1) > 0.01 * spread).any())
        repaired, repairs = _gradient(model, x, y)
        if not randomised and torch.equal(repaired, _gradient(model, x, y, repair=False)[0]):
            repairs.clear()  # inside an autograd.Function, which has a gradient of its own

        zero = repaired.abs().amax(_PIXELS) == 0
        if randomised:
            drawn = torch.stack([_gradient(model, x, y)[0] for _ in range(_PASSES)])
            noise = drawn.var(0).sum(_PIXELS)
            signal = (drawn.mean(0).square().sum(_PIXELS) - noise / _PASSES).clamp_min(0)
            needed = (4 * noise / signal).nan_to_num(1, most_passes, 1).median().item()
            # What follows cannot tell noise from roughness.
            return Diagnosis(repairs, min(most_passes, max(2, math.ceil(needed))), 0.0, zero.float().mean().item())

        def rise(step: Tensor) -> Tensor:
            """Of the loss along a step, (B,)."""
            return (log_odds(model((x + step).clamp(0, 1)), y) - log_odds(logits, y)).nan_to_num(0)

        step = ascent_direction(repaired, norm) * eps / 2
        random = torch.zeros_like(x)
        for _ in range(_DIRECTIONS):
            direction = random_extreme(x, norm, eps / 4, generator)
            random += direction * (rise(direction) - rise(-direction))[:, None, None, None]
        blind = rise(ascent_direction(random, norm) * eps / 2) > rise(step).clamp_min(0)
        near = (x + random_in_ball(x, norm, eps / 2, generator)).clamp(0, 1)
        turned = ascent_direction(repaired, "L2") * ascent_direction(_gradient(model, near, y)[0], "L2")
        shattered = (turned.sum(_PIXELS) < 0.5) & ~zero
        return Diagnosis(repairs, 1, shattered.float().mean().item(), blind.float().mean().item())


def _gradient(model: nn.Module, x: Tensor, y: Tensor, repair: bool = True) -> tuple[Tensor, Counter[str]]:
    """Of the log-odds at images x (B, C, H, W), zero if there is none; and the repairs that it took."""
    point = x.clone().requires_grad_()
    mode: AbstractContextManager[Counter[str]] = straight_through() if repair else nullcontext(Counter())
    try:
        with torch.enable_grad(), mode as repairs:
            output = model(point)
            logits = before_softmax(output)
            repairs["softmax"] += logits is not output
            value = log_odds(logits, y)
    except Exception as error:  # a model that knows nothing of function modes may raise anything
        if not repair or is_out_of_memory(error):
            raise
        warn(f"no straight-through gradients: the model fails with them ({first_line(error)})")
        return _gradient(model, x, y, repair=False)
    with torch.enable_grad():
        try:
            return input_gradient(value, point), +repairs
        except NoGradient:
            return torch.zeros_like(x), +repairs


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
        if found.shattered > 0.5:
            remedies["smoothed"] = {"jitter": 0.5, "eot": max(16, found.passes)}
        if found.blind > 0.1:
            remedies["finite_differences"] = {
                "gradient": "finite_differences",
                "directions": self.directions,
                "steps": math.ceil(self.steps / 2),  # they are dear, and half as many of twice the length do as well
                "step_size": self.eps / 5 if self.step_size is None else 2 * self.step_size,
            }
        return {name: partial(self._pgd, **settings | changes) for name, changes in remedies.items()}

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Seed = None) -> Tensor:
        """Attack images x (B, C, H, W) of classes y (B,) with all remedies that they show to be needed."""
        generator = noise_of(model, x, y, generator)
        found = x.clone()
        for attack in self.stages(model, x).values():
            with attacking(model), torch.no_grad():
                rows = (model(found).argmax(1) == y).nonzero().squeeze(1)
            if len(rows):
                found[rows] = attack(model, x[rows], y[rows], generator=generator[rows])
        return found

    def _pgd(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Noise, **settings: Any) -> Tensor:
        own = {"norm": self.norm, "eps": self.eps, "steps": self.steps, "step_size": self.step_size}
        return pgd(model, x, y, generator=generator, **own | settings)
