"""The learning rate over a training."""

import math
from dataclasses import dataclass, field
from typing import Literal

from aerl.errors import UserError

Kind = Literal["constant", "linear", "cosine", "one_cycle", "step"]


@dataclass(frozen=True)
class Schedule:
    """The factor on the optimizer's lr, which changes with every step, or once an epoch.

    warmup: the share of the training in which the factor rises from `start` to 1; linearly, or for one_cycle by half a
        cosine.
    kind: how it goes on. constant: stays; linear, cosine, one_cycle: falls to 0, but never below `floor`; step: is
        multiplied by `gamma` at each of the `milestones`, epochs counted from 0, as in torch's MultiStepLR.
    restarts: cosine starts again at 1 so many times, at equal distances (SGDR, Loshchilov & Hutter 2017).

    one_cycle with warmup=0.3, start=0.04, floor=4e-6 is torch's OneCycleLR. The triangle of fast adversarial training
    is linear with warmup=0.5.
    """

    kind: Kind = "constant"
    warmup: float = 0.0
    floor: float = 0.0
    per: Literal["step", "epoch"] = "step"
    start: float = 0.0
    restarts: int = 0
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1

    def check(self, epochs: int) -> None:
        """UserError for what is outside a training of so many epochs, or has no effect on this kind."""
        key = "trainer.schedule"
        if self.kind != "step" and self.milestones:
            raise UserError(f"{key}.milestones={self.milestones}: belong to {key}.kind=step, not {self.kind}")
        if self.kind == "step" and not self.milestones:
            raise UserError(f"{key}.milestones=[]: {key}.kind=step needs epochs, such as [{round(0.75 * epochs)}]")
        if late := [epoch for epoch in self.milestones if epoch > epochs]:
            fits = [int(epoch * epochs / (max(self.milestones) + 1)) for epoch in self.milestones]
            raise UserError(f"{key}.milestones={late}: after the last epoch; with trainer.epochs={epochs} try {fits}")
        if self.restarts and self.kind != "cosine":
            raise UserError(f"{key}.restarts={self.restarts}: belongs to {key}.kind=cosine, not {self.kind}")
        if self.kind == "one_cycle" and self.warmup == 0:
            raise UserError(f"{key}.warmup=0: {key}.kind=one_cycle rises first; try 0.3")

    def factor(self, epoch: int, step: int, steps: int, epochs: int) -> float:
        """At `step` of an `epoch` of `steps`, of `epochs`; epoch and step count from 0."""
        place, end = (epoch * steps + step, epochs * steps) if self.per == "step" else (epoch, epochs)
        warm = round(self.warmup * end)
        if place < warm:
            share = place / warm
            risen = 0.5 * (1 - math.cos(math.pi * share)) if self.kind == "one_cycle" else share
            return self.start + (1 - self.start) * risen
        if self.kind == "step":
            return max(self.floor, self.gamma ** sum(epoch >= milestone for milestone in self.milestones))
        if self.kind == "constant":
            return 1.0
        done = (place - warm) / max(1, end - warm)
        if self.kind == "linear":
            return max(self.floor, 1 - done)
        if self.restarts:
            done = done * (self.restarts + 1) % 1
        return max(self.floor, 0.5 * (1 + math.cos(math.pi * done)))
