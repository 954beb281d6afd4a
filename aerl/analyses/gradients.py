"""Gradient dynamics: how the input gradient changes from step to step of PGD, over all samples."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from aerl.analyses import AnalysisContext, Beside, NotMade, Subject
from aerl.attacks import SampleGenerator, pgd
from aerl.data import Split, to_unit
from aerl.report.figures import trainer_colour
from aerl.tracking.results import Result
from aerl.types import Count, Norm

# What is drawn: name in `Dynamics`, label of the axis.
_PANELS = (
    ("norm", "L2 norm of the gradient"),
    ("cosine", "cosine to the step before"),
    ("sign_agreement", "share of pixels, same sign as before"),
    ("direction_variance", "direction variance over samples"),
)
_GROUPS, _FLOATS = 8, 2 * 10**7


@dataclass(frozen=True)
class Dynamics:
    """Statistics of the gradients g_t at the iterates t = 0, 1, ... of one PGD.

    norm, cosine, sign_agreement, float32 (steps, n): ||g_t||_2; the cosine of g_t and g_{t-1}; the share of
    pixels in which the two have the same sign. NaN where undefined: at t = 0, and where one of the two is zero.
    sums float32 (groups, steps, pixels) and counts (groups, steps): the sum of g_t / ||g_t|| over the samples
    of each group whose gradient is not zero, and their number.
    """

    norm: Tensor
    cosine: Tensor
    sign_agreement: Tensor
    sums: Tensor
    counts: Tensor

    def curves(self) -> dict[str, np.ndarray]:
        """Of each statistic (3, steps): its mean over samples, and the ends of the mean's 95 % interval.

        Of the norm the geometric mean over the gradients that are not zero, since it spans orders of magnitude.
        """
        log_norm = torch.where(self.norm > 0, self.norm, torch.nan).double().log()
        means = {"norm": _interval(log_norm).exp()}
        means |= {name: _interval(getattr(self, name).double()) for name in ("cosine", "sign_agreement")}
        means["direction_variance"] = self._direction_variance()
        return {name: curve.numpy() for name, curve in means.items()}

    def _direction_variance(self) -> Tensor:
        """1 - ||mean of g / ||g|| ||: 0 if all gradients point one way, 1 if they cancel (Mardia & Jupp 2000,
        section 9.2); the interval is the jackknife's over groups of samples."""
        from scipy.stats import t

        def variance(sums: Tensor, counts: Tensor) -> Tensor:
            resultant: Tensor = torch.linalg.vector_norm(sums, dim=-1)
            return 1 - resultant / counts

        sums, counts, groups = self.sums.double(), self.counts.double(), len(self.sums)
        value = variance(sums.sum(0), counts.sum(0))
        left = variance(sums.sum(0) - sums, counts.sum(0) - counts)
        half = float(t.ppf(0.975, groups - 1)) * ((groups - 1) * left.var(0, correction=0)).sqrt()
        return torch.stack([value, (value - half).clamp(0), (value + half).clamp(max=1)])


def _interval(values: Tensor) -> Tensor:
    """(3, steps) of values (steps, n): the mean of those that are not NaN, and its normal 95 % interval."""
    n = values.isnan().logical_not().sum(1)
    mean = values.nanmean(1)
    spread = (values - mean[:, None]).square().nansum(1) / (n - 1).clamp_min(1)
    half = 1.96 * (spread / n).sqrt()
    return torch.stack([mean, mean - half, mean + half])


class Recorder:
    """`observe` of `aerl.attacks.pgd`: takes the statistics down, batch by batch, while PGD runs.

    `n` samples (B, C, H, W) of `pixels` = C * H * W and `steps` steps, none of which may drop a sample. The
    memory is bounded: fewer groups for large images.
    """

    def __init__(self, n: int, steps: int, pixels: int, device: torch.device) -> None:
        groups = max(4, min(_GROUPS, _FLOATS // (steps * pixels)))
        self.norm, self.cosine, self.sign_agreement = (
            torch.full((steps, n), torch.nan, device=device) for _ in range(3)
        )
        self.sums = torch.zeros(groups, steps, pixels, device=device)
        self.counts = torch.zeros(groups, steps, device=device)
        self._rows = torch.arange(0)
        self._before: tuple[Tensor, ...] = ()

    def batch(self, rows: Tensor) -> None:
        """The samples (b,), of all n, that the next PGD attacks."""
        self._rows = rows

    def __call__(self, step: int, index: Tensor, logits: Tensor, gradient: Tensor | None) -> None:
        """See `observe` of `aerl.attacks.pgd`."""
        if gradient is None:
            return
        flat = gradient.flatten(1)
        # Scaled by the peak first, as squares of small numbers underflow.
        peak = flat.abs().amax(1)
        scaled = flat / peak.clamp_min(torch.finfo(flat.dtype).tiny)[:, None]
        length = scaled.norm(dim=1)
        unit = scaled / length.clamp_min(1)[:, None]
        positive, alive = unit > 0, peak > 0
        self.norm[step, self._rows] = peak * length
        if step > 0:
            former, former_positive, former_alive = self._before
            both = alive & former_alive
            cosine = (unit * former).sum(1)
            same = (positive == former_positive).sum(1) / flat.shape[1]
            self.cosine[step, self._rows] = torch.where(both, cosine, torch.nan)
            self.sign_agreement[step, self._rows] = torch.where(both, same, torch.nan)
        group = self._rows % len(self.sums)
        self.sums[:, step].index_add_(0, group, unit)
        self.counts[:, step].index_add_(0, group, alive.float())
        self._before = (unit, positive, alive)

    def dynamics(self) -> Dynamics:
        """What has been taken down, on the CPU."""
        return Dynamics(*(
            t.cpu() for t in (self.norm, self.cosine, self.sign_agreement, self.sums, self.counts)
        ))  # fmt: skip


def gradient_dynamics(
    model: nn.Module,
    images: Split,
    *,
    norm: Norm,
    eps: float,
    steps: int,
    loss: Literal["log_odds", "ce", "rescaled_ce", "margin", "dlr"] = "ce",
    seed: int = 0,
    batch_size: int = 128,
    device: torch.device | None = None,
) -> Dynamics:
    """Run PGD (steps of eps / 10 from a random start, all of them on every sample), taking its gradients down."""
    device = device or torch.device("cpu")
    n, pixels = len(images), math.prod(images.images.shape[1:])
    recorder = Recorder(n, steps, pixels, device)
    for rows in torch.split(torch.arange(n), batch_size):
        x, y = to_unit(images.images[rows].to(device)), images.labels[rows].to(device)
        recorder.batch(rows.to(device))
        pgd(
            model, x, y, generator=SampleGenerator.for_images(x, seed, "gradients"), norm=norm, eps=eps,
            steps=steps, loss=loss, drop_fooled=False, keep="last", observe=recorder,
        )  # fmt: skip
    return recorder.dynamics()


@dataclass(frozen=True, kw_only=True)
class Gradients(Beside):
    """Gradient dynamics along PGD on `loss`, of this run's model and of those of other `runs`.

    On up to `samples` images that this run's model classifies rightly, always the same ones; PGD as in
    `gradient_dynamics`. Of every step: the gradient's norm, its cosine to and sign agreement with that of the
    step before, and how its direction varies over the samples, each with a 95 % interval (`Dynamics`).
    """

    samples: Count = 500
    steps: Count = 50
    loss: Literal["log_odds", "ce", "rescaled_ce", "margin", "dlr"] = "ce"

    def __call__(self, context: AnalysisContext) -> list[Result]:
        """Write figures/gradients.png, tables/gradients.csv (a line for each model and step), and `gradients` in
        summary.json; returns this run's means over all steps. NotMade if no image is classified rightly or eps is 0."""
        if context.eps == 0:
            raise NotMade("eps is 0")
        images = context.right(self.samples)
        subjects = self.subjects(context)
        found = [
            gradient_dynamics(
                subject.model, images, norm=context.norm, eps=context.eps, steps=self.steps, loss=self.loss,
                seed=context.seed, batch_size=context.batch_size, device=context.hardware.device,
            )
            for subject in subjects
        ]  # fmt: skip
        curves = [dynamics.curves() for dynamics in found]
        columns = ["model", "step", *(f"{name}{end}" for name, _ in _PANELS for end in ("", "_low", "_high"))]
        context.table("gradients", columns, [
            [subject.name, step, *(float(value) for name, _ in _PANELS for value in curve[name][:, step])]
            for subject, curve in zip(subjects, curves, strict=True)
            for step in range(self.steps)
        ])  # fmt: skip
        zero = [float((dynamics.norm == 0).float().mean()) for dynamics in found]
        title = f"PGD on {self.loss}, {context.norm} eps {context.eps:.4g}, n = {len(images)}"
        context.draw("gradients", _draw(subjects, curves, zero, title), title)
        mean = {name: curve[0][np.isfinite(curve[0])] for name, curve in curves[0].items()}
        means = {f"gradient_{name}": float(mean[name].mean()) for name, _ in _PANELS[1:] if len(mean[name])}
        means["gradient_zero_share"] = zero[0]
        context.save(gradients={"n": len(images), "loss": self.loss, "steps": self.steps, **means})
        return context.log.log(
            means, n=len(images), split="test", attack="gradients", norm=context.norm, eps=context.eps
        )


def _draw(subjects: list[Subject], curves: list[dict[str, np.ndarray]], zero: list[float], title: str) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    figure.suptitle(title)
    lines = ["-", "--", ":", "-."]
    for axis, (name, label) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for number, (subject, curve) in enumerate(zip(subjects, curves, strict=True)):
            colour, (mean, low, high) = trainer_colour(subject.trainer), curve[name]
            step = np.arange(len(mean))
            axis.fill_between(step, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(step, mean, lines[number % 4], color=colour, label=f"{subject.name}, {zero[number]:.1%} zero")
        axis.set(xlabel="step of PGD", ylabel=label)
        axis.grid(alpha=0.3)
        if name == "norm":
            axis.set_yscale("log")
            axis.legend(frameon=False, title="95 % intervals; gradients that are zero", fontsize=9)
    return figure
