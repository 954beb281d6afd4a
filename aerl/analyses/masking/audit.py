"""What the checks of the audit share: the samples, the metered model, plain PGD and the samples that it misses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from aerl.analyses import AnalysisContext
from aerl.analyses.gradients import loss_gradient
from aerl.attacks import SampleGenerator, losses, pgd, predictions
from aerl.attacks.projections import ascent_direction
from aerl.data import Split, subset, to_unit
from aerl.evaluation.statistics import right
from aerl.types import box_width

_VOTES = 9  # passes that decide on the prediction of a randomised model
_PIXELS = (1, 2, 3)


@dataclass(frozen=True)
class Finding:
    """A value, the sentence that explains it, its p if it may be chance, and whether a low value is the bad one."""

    value: float
    text: str
    p: float | None = None
    below: bool = False


class NotMeasured(Exception):
    """A check does not apply to this model or threat model; the message is the reason."""


@dataclass(frozen=True)
class Path:
    """Plain PGD: cross-entropy and "misclassified" of the iterates (n, steps + 1), and the last one (n, C, H, W)."""

    loss: Tensor
    wrong: Tensor
    last: Tensor


class Audit:
    """The n samples under audit, and what is computed from them once for several checks. Masks are bool (n,)."""

    def __init__(self, context: AnalysisContext, samples: int, steps: int, queries: int) -> None:
        correct = torch.from_numpy(right(context.outcomes)).nonzero().squeeze(1)
        self.rows = subset(Split(correct, context.labels[correct]), samples).images
        self.n, device = len(self.rows), context.hardware.device
        self.x = to_unit(context.images[self.rows].to(device), context.hardware.memory_format)
        self.y = context.labels[self.rows].to(device)
        self.model = Metered(context.model, context.batch_size)
        self.context, self.norm, self.eps = context, context.norm, context.eps
        self.steps, self.queries = steps, queries

    @cached_property
    def logits(self) -> Tensor:
        return self.model.forward(self.x)

    @cached_property
    def randomised(self) -> Tensor:
        """The samples whose logits differ between two passes by more than 1 % of their spread."""
        spread = self.logits.amax(1) - self.logits.amin(1)
        return (self.model.forward(self.x) - self.logits).abs().amax(1) > 0.01 * spread

    def require_deterministic(self) -> None:
        if self.randomised.any():
            raise NotMeasured("the model is randomised")

    def gradient(self, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """The gradient of a loss at images x (n, C, H, W), one for each sample, in the dtype of x."""
        return torch.cat([loss_gradient(self.model, loss, x[rows], self.y[rows]) for rows in self._batches()])

    @cached_property
    def margin_gradient(self) -> Tensor:
        return self.gradient(losses.margin, self.x)

    def _batches(self, among: Tensor | None = None, size: int | None = None) -> Sequence[Tensor]:
        rows = torch.arange(self.n, device=self.x.device) if among is None else among.nonzero().squeeze(1)
        return torch.split(rows, size or self.context.batch_size) if len(rows) else ()

    def noise(self, x: Tensor, salt: str) -> SampleGenerator:
        return SampleGenerator.for_images(x, self.context.seed, f"masking/{salt}")

    def attack(self, **changes: Any) -> Callable[..., Tensor]:
        """Plain PGD (Madry et al. 2018) with `changes`. One lucky pass of a randomised model does not end it."""
        settings: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "steps": self.steps, "loss": "ce"}
        if self.randomised.any():
            settings |= {"keep": "last", "drop_fooled": False}
        return partial(pgd, **settings | changes)

    @cached_property
    def plain(self) -> Path:
        if self.n == 0 or self.eps == 0:
            raise NotMeasured("eps is 0" if self.n else "no sample is classified correctly")
        parts = [self._path(self.x[rows], self.y[rows]) for rows in self._batches()]
        return Path(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _path(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        seen, last = [], x

        def observe(step: int, rows: Tensor, point: Tensor, logits: Tensor, gradient: Tensor | None) -> None:
            nonlocal last
            if not logits.isfinite().all():
                raise NotMeasured("the model returned NaN or infinite logits")
            last, wrong = point, predictions(logits) != y
            seen.append((losses.ce(logits, y), wrong))

        attack = self.attack(keep="worst", drop_fooled=False, observe=observe)
        attack(self.model, x, y, generator=self.noise(x, "plain"))
        return *(torch.stack(values, 1) for values in zip(*seen, strict=True)), last

    def wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether images x (B, C, H, W) are misclassified; by a randomised model in the majority of passes."""
        votes = [predictions(self.model(x)) != y for _ in range(_VOTES if self.randomised.any() else 1)]
        return torch.stack(votes).float().mean(0) > 0.5

    @cached_property
    def missed(self) -> Tensor:
        """The samples that plain PGD misses: at every iterate, or at the last of a randomised model."""
        return ~(self.wrong(self.plain.last, self.y) if self.randomised.any() else self.plain.wrong.any(1))

    def fooled(
        self, salt: str, attack: Callable[..., Any], among: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        """The samples that an attack fools, of those that plain PGD misses or of `among`; `salt` is of its noise."""
        fooled = torch.zeros_like(self.missed)
        for rows in self._batches(self.missed if among is None else among, batch_size):
            x, y = self.x[rows], self.y[rows]
            fooled[rows] = self.wrong(attack(self.model, x, y, generator=self.noise(x, salt)), y)
        return fooled

    def pgd(self, salt: str, among: Tensor | None = None, **changes: Any) -> Tensor:
        """The samples that plain PGD with `changes` fools, see `fooled`."""
        return self.fooled(salt, self.attack(**changes), among)

    @cached_property
    def again(self) -> Tensor:
        """The samples that plain PGD misses, and fools from a second start."""
        return self.pgd("again")

    @cached_property
    def unbounded(self) -> Tensor:
        """The samples that plain PGD fools in a ball that contains the box."""
        box = box_width(self.norm, self.x[0].numel())  # a random start would be outside the box
        return self.pgd("unbounded", torch.ones_like(self.missed), eps=box, step_size=box / 20, random_start=False)

    def share(self, mask: Tensor, text: str) -> Finding:
        """The share of samples in a mask."""
        count = int(mask.sum())
        return Finding(count / self.n, f"{text} on {count} of {self.n} samples")


class Metered(nn.Module):
    """The model with its cost in passes of one image: forward and backward 1, forward alone 1/3.

    Any number of images is split into batches, unless they need a gradient. Logits that do not depend differentiably on
    the images get a gradient of zero.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size, self.passes = model, batch_size, 0.0

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            self.passes += len(x) / 3
            return torch.cat([self.model(part) for part in torch.split(x, self.batch_size)])
        self.passes += len(x)
        logits: Tensor = self.model(x)
        return logits if logits.requires_grad else logits + 0 * x.sum(_PIXELS)[:, None]


def is_zero(gradient: Tensor) -> Tensor:
    return gradient.abs().amax(_PIXELS) == 0


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per sample; 0 where one of them is zero."""
    product: Tensor = (ascent_direction(a, "L2") * ascent_direction(b, "L2")).sum(_PIXELS)
    return product
