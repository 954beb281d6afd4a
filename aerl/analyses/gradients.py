"""Gradient dynamics: how the input gradient changes from step to step of PGD, over all samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from aerl.analyses import AnalysisContext, Beside, NotMade, Subject
from aerl.attacks import SampleGenerator, pgd
from aerl.attacks.modes import input_gradient
from aerl.attacks.projections import ascent_direction, norms
from aerl.data import Split, to_unit
from aerl.report.figures import trainer_colour
from aerl.tracking.results import Result
from aerl.types import Count, Norm

Loss = Literal["log_odds", "ce", "rescaled_ce", "margin", "dlr"]

# Statistic: label of its axis.
_PANELS = {
    "norm": "L2 norm of the gradient",
    "cosine": "cosine to the step before",
    "sign_agreement": "share of pixels, same sign as before",
    "direction_variance": "direction variance over samples",
}


def loss_gradient(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The gradient (B, C, H, W) of a function of `aerl.attacks.losses` at images x (B, C, H, W), in their dtype."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return input_gradient(loss(model(x).to(x.dtype), y), x)


@dataclass(frozen=True)
class Dynamics:
    """Statistics of the gradients g_t of n samples at the iterates t = 0, 1, ... of one PGD.

    norm, cosine, sign_agreement: (steps, n); ||g_t||_2, the cosine of g_t and g_{t-1}, and the share of pixels in which
        these two have the same sign. NaN where undefined: at t = 0, and where one of the two is zero.
    sums: (groups, steps, pixels), of g_t / ||g_t|| over each group of samples; counts: (groups, steps), of the
        gradients in it that are not zero.
    """

    norm: Tensor
    cosine: Tensor
    sign_agreement: Tensor
    sums: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, n: int, steps: int, pixels: int, device: torch.device) -> "Dynamics":
        groups = max(4, min(8, 2 * 10**7 // (steps * pixels)))  # which bounds the memory
        nan = torch.full((steps, n), torch.nan, device=device)
        sums = torch.zeros(groups, steps, pixels, device=device)
        return cls(nan, nan.clone(), nan.clone(), sums, sums[..., 0].clone())

    def observer(self, rows: Tensor) -> Callable[..., None]:
        """`observe` of a PGD that attacks the samples `rows` (b,) of the n, without dropping any."""
        previous: tuple[Tensor, Tensor] | None = None

        def observe(step: int, index: Tensor, point: Tensor, logits: Tensor, gradient: Tensor) -> None:
            nonlocal previous
            unit, length = ascent_direction(gradient, "L2").flatten(1), norms(gradient, "L2").flatten()
            alive = length > 0
            self.norm[step, rows] = length
            if previous is not None:
                both, same = alive & previous[1], (unit > 0) == (previous[0] > 0)
                self.cosine[step, rows] = torch.where(both, (unit * previous[0]).sum(1), torch.nan)
                self.sign_agreement[step, rows] = torch.where(both, same.float().mean(1), torch.nan)
            group = rows % len(self.sums)
            self.sums[:, step].index_add_(0, group, unit)
            self.counts[:, step].index_add_(0, group, alive.float())
            previous = unit, alive

        return observe

    def curves(self) -> dict[str, np.ndarray]:
        """Of each statistic (3, steps): its mean over samples, and the ends of the mean's 95 % interval.

        Of the norm the geometric mean over the gradients that are not zero, since it spans orders of magnitude.
        """
        curves = {
            "norm": _mean(torch.where(self.norm > 0, self.norm, torch.nan).double().log()).exp(),
            "cosine": _mean(self.cosine.double()),
            "sign_agreement": _mean(self.sign_agreement.double()),
            "direction_variance": self._direction_variance(),
        }
        return {name: curve.cpu().numpy() for name, curve in curves.items()}

    def _direction_variance(self) -> Tensor:
        """1 - ||mean of g / ||g|| ||: 0 if all gradients point one way, 1 if they cancel (Mardia & Jupp 2000,
        section 9.2); the interval is the jackknife's over groups of samples."""
        from scipy.stats import t

        sums, counts, groups = self.sums.double(), self.counts.double(), len(self.sums)
        value = 1 - sums.sum(0).norm(dim=-1) / counts.sum(0)
        without = 1 - (sums.sum(0) - sums).norm(dim=-1) / (counts.sum(0) - counts)
        half = float(t.ppf(0.975, groups - 1)) * ((groups - 1) * without.var(0, correction=0)).sqrt()
        return torch.stack([value, (value - half).clamp(0), (value + half).clamp(max=1)])


def _mean(values: Tensor) -> Tensor:
    """(3, steps): the mean of values (steps, n) without NaN, and the ends of its normal 95 % interval."""
    n = values.isnan().logical_not().sum(1)
    mean = values.nanmean(1)
    variance = (values - mean[:, None]).square().nansum(1) / (n - 1).clamp_min(1)
    half = 1.96 * (variance / n).sqrt()
    return torch.stack([mean, mean - half, mean + half])


def gradient_dynamics(
    model: nn.Module,
    images: Split,
    *,
    norm: Norm,
    eps: float,
    steps: int,
    loss: Loss = "ce",
    seed: int = 0,
    batch_size: int = 128,
    device: torch.device | None = None,
) -> Dynamics:
    """The statistics along PGD (steps of eps / 10 from a random start, all of them for every sample)."""
    device = device or torch.device("cpu")
    dynamics = Dynamics.empty(len(images), steps, math.prod(images.images.shape[1:]), device)
    for rows in torch.split(torch.arange(len(images)), batch_size):
        x, y = to_unit(images.images[rows].to(device)), images.labels[rows].to(device)
        pgd(
            model, x, y, generator=SampleGenerator.for_images(x, seed, "gradients"), norm=norm, eps=eps, steps=steps,
            loss=loss, drop_fooled=False, keep="last", observe=dynamics.observer(rows.to(device)),
        )  # fmt: skip
    return dynamics


@dataclass(frozen=True, kw_only=True)
class Gradients(Beside):
    """Gradient dynamics along PGD on `loss`, of this run's model and of those of other `runs`.

    On up to `samples` correctly classified images, the same ones in every run. Writes figures/gradients.png,
    tables/gradients.csv (a line for each model and step), `gradients` in summary.json, and this run's means over all
    steps as Results. NotMade if no image is classified correctly or eps is 0.
    """

    samples: Count = 500
    steps: Count = 50
    loss: Loss = "ce"

    def __call__(self, context: AnalysisContext) -> list[Result]:
        if context.eps == 0:
            raise NotMade("eps is 0")
        images, subjects = context.right(self.samples), self.subjects(context)
        found = [
            gradient_dynamics(
                subject.model, images, norm=context.norm, eps=context.eps, steps=self.steps, loss=self.loss,
                seed=context.seed, batch_size=context.batch_size, device=context.hardware.device,
            )
            for subject in subjects
        ]  # fmt: skip
        curves = [dynamics.curves() for dynamics in found]
        columns = ["model", "step", *(f"{name}{end}" for name in _PANELS for end in ("", "_low", "_high"))]
        context.table("gradients", columns, [
            [subject.name, step, *(float(value) for name in _PANELS for value in curve[name][:, step])]
            for subject, curve in zip(subjects, curves, strict=True)
            for step in range(self.steps)
        ])  # fmt: skip
        zero = [float((dynamics.norm == 0).float().mean()) for dynamics in found]
        title = f"PGD on {self.loss}, {context.norm} eps {context.eps:.4g}, n = {len(images)}"
        context.draw("gradients", _draw(subjects, curves, zero, title), title)
        finite = {name: curve[0][np.isfinite(curve[0])] for name, curve in curves[0].items() if name != "norm"}
        means = {f"gradient_{name}": float(mean.mean()) for name, mean in finite.items() if len(mean)}
        means["gradient_zero_share"] = zero[0]
        context.save(gradients={"n": len(images), "loss": self.loss, "steps": self.steps, **means})
        return context.log.log(
            means, n=len(images), split="test", attack="gradients", norm=context.norm, eps=context.eps
        )


def _draw(subjects: list[Subject], curves: list[dict[str, np.ndarray]], zero: list[float], title: str) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    figure.suptitle(title)
    for axis, (name, label) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        for number, (subject, curve) in enumerate(zip(subjects, curves, strict=True)):
            colour, (mean, low, high) = trainer_colour(subject.trainer), curve[name]
            none = f", {zero[number]:.1%} of the gradients are zero" if zero[number] else ""
            line = ("-", "--", ":", "-.")[number % 4]
            axis.fill_between(range(len(mean)), low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(mean, line, color=colour, label=subject.name + none)
        axis.set(xlabel="step of PGD", ylabel=label)
        axis.grid(alpha=0.3)
        if name == "norm":
            axis.set_yscale("log")
            axis.legend(frameon=False, title="mean, 95 % interval", fontsize=9)
    return figure
