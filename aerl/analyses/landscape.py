"""The loss around images, on the plane of the adversarial and a random direction, and the classes there."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerl.analyses import AnalysisContext, Beside, NotMade, Subject, class_name
from aerl.attacks import SampleGenerator, attacking, pgd, predictions
from aerl.attacks.projections import norms
from aerl.data import Split, to_unit
from aerl.evaluation import evaluate
from aerl.report import figures
from aerl.runtime.files import save_arrays
from aerl.runtime.progress import progress
from aerl.tracking.results import Result
from aerl.types import Count, NonNegative, Norm, Positive, eps_text

# Every 16th point in both directions is always evaluated, and those half way between them.
_COARSEST = 16
_FLOATS = 2**24  # of logits held at a time


@dataclass(frozen=True)
class Plane:
    """A map of the plane x + eps * (a * first + b * second).

    `axis` (N,) are the values of a and of b; loss float32 (N, N) and classes int64 (N, N) have b along the first
    dimension and a along the second; where the logits are not finite the loss is NaN and the class -1. `adversarial`
    is the a of the adversarial example, whose b is 0; of the image itself and of the example, `loss_at` and
    `class_at` were evaluated directly. `evaluated` is the share of the points at which the model was asked.
    """

    axis: np.ndarray
    loss: np.ndarray
    classes: np.ndarray
    evaluated: float
    adversarial: float
    loss_at: tuple[float, float]
    class_at: tuple[int, int]


def survey(
    logits: Callable[[Tensor], Tensor], y: Tensor, axis: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """Cross-entropy (N, N) and class (N, N) at all points of a square grid, and the share of them evaluated.

    `logits` maps points (m, 2) of coordinates (a, b) to (m, K); y () is the true class; `axis` (N,) is evenly
    spaced. Every eighth point is evaluated. Between them logits are interpolated, which a network of piecewise
    linear layers nearly deserves; wherever an evaluated point shows interpolation to be off by more than
    tolerance * (1 + loss), or in the class, its neighbours are evaluated too, and so on down to single points.
    Smaller features than eight points may be missed; tolerance=0 evaluates everything. The logits are held for a
    part of the plane at a time, so that memory does not grow with the resolution but by the result.
    """
    n = len(axis)
    spacing = axis[1] - axis[0] if n > 1 else torch.ones(())
    probe = logits(torch.stack([axis[:1], axis[:1]], 1))
    width = max(1, (math.isqrt(_FLOATS // probe.shape[1]) - 1) // _COARSEST) * _COARSEST
    width = min(width, math.ceil((n - 1) / _COARSEST) * _COARSEST or _COARSEST)
    loss, classes = torch.zeros(n, n), torch.zeros(n, n, dtype=torch.long)
    asked = total = 0
    for top in range(0, max(n - 1, 1), width):
        for left in range(0, max(n - 1, 1), width):
            corner = axis[0] + spacing * torch.tensor([left, top])  # (a, b); a tile may reach beyond the plane
            values, count = _tile(logits, y, corner, spacing, width, tolerance)
            asked, total = asked + count, total + (width + 1) ** 2
            rows, columns = (slice(first, min(first + width + 1, n)) for first in (top, left))
            inside = values[: rows.stop - rows.start, : columns.stop - columns.start]
            loss[rows, columns] = _loss(inside, y)
            classes[rows, columns] = _classes(inside)
    return loss, classes, asked / total


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits (..., K) for one class; NaN where they are not finite."""
    flat = logits.flatten(0, -2)
    loss = F.cross_entropy(flat, y.expand(len(flat)), reduction="none")
    return loss.where(flat.isfinite().all(1), torch.nan).view(logits.shape[:-1])


def _classes(logits: Tensor) -> Tensor:
    """The class predicted from logits (..., K), -1 where they are not finite."""
    return predictions(logits.flatten(0, -2)).view(logits.shape[:-1])


def _tile(
    logits: Callable[[Tensor], Tensor],
    y: Tensor,
    corner: Tensor,
    spacing: Tensor,
    width: int,
    tolerance: float,
) -> tuple[Tensor, int]:
    """Logits (width + 1, width + 1, K) of a part of the plane, and how many of its points were evaluated."""

    def ask(mask: Tensor, stride: int) -> Tensor:
        rows, columns = mask.nonzero(as_tuple=True)
        return logits(corner + spacing * stride * torch.stack([columns, rows], 1))

    stride = _COARSEST if tolerance > 0 else 1
    side = width // stride + 1
    everywhere = torch.ones(side, side, dtype=torch.bool)
    values, asked = ask(everywhere, stride).view(side, side, -1), side * side
    rough = everywhere  # where interpolation is not to be trusted
    while stride > 1:
        stride //= 2
        side = 2 * side - 1
        finer = values.new_empty(side, side, values.shape[-1])
        finer[::2, ::2] = values
        finer[1::2, ::2] = (values[:-1] + values[1:]) / 2
        finer[:, 1::2] = (finer[:, :-1:2] + finer[:, 2::2]) / 2
        values = finer
        near = torch.zeros(1, 1, side, side)
        near[0, 0, ::2, ::2] = rough.float()
        wanted = F.max_pool2d(near, 5, stride=1, padding=2)[0, 0].bool()
        wanted[::2, ::2] = False
        rough = torch.zeros(side, side, dtype=torch.bool)
        if wanted.any():
            true, guess = ask(wanted, stride), values[wanted]
            loss = _loss(true, y)
            off = ~((_loss(guess, y) - loss).abs() <= tolerance * (1 + loss))
            rough[wanted] = off | (_classes(guess) != _classes(true))
            values[wanted] = true
            asked += len(true)
    return values, asked


def plane(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm,
    eps: float,
    span: float = 3.0,
    resolution: int = 300,
    tolerance: float = 0.01,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 512,
) -> Plane:
    """The plane through one image x (C, H, W) in [0, 1] of class y (): a and b from -span to span.

    The first direction leads to the adversarial example that PGD finds with `steps` steps, the second is random
    and orthogonal to it (in the usual inner product); both have length 1 in `norm`. Points are not clipped into
    [0, 1]. `tolerance`: see `survey`. eps must be positive.
    """
    with attacking(model), torch.no_grad():
        image = x[None]
        noise = SampleGenerator.for_images(image, seed, "landscape")
        x_adv = pgd(model, image, y[None], generator=noise, norm=norm, eps=eps, steps=steps)
        delta = x_adv - image
        length = float(norms(delta, norm))
        if length == 0:  # no attack moved the image: any direction is as good
            delta, length = noise.normal(image), eps
        other = noise.normal(image)
        other -= (other * delta).sum() / delta.square().sum() * delta
        first, second = (direction / norms(direction, norm) * eps for direction in (delta, other))

        def logits(points: Tensor) -> Tensor:
            parts = []
            for part in torch.split(points.to(x), batch_size):
                a, b = part[:, 0, None, None, None], part[:, 1, None, None, None]
                parts.append(model(image + a * first + b * second).float())
            return torch.cat(parts).cpu()

        axis = torch.linspace(-span, span, resolution)
        label = y.cpu()
        loss, classes, evaluated = survey(logits, label, axis, tolerance)
        direct = logits(torch.tensor([[0.0, 0.0], [length / eps, 0.0]]))
    losses, said = _loss(direct, label).tolist(), _classes(direct).tolist()
    return Plane(axis.numpy(), loss.numpy(), classes.numpy(), evaluated, length / eps, tuple(losses), tuple(said))


@dataclass(frozen=True, kw_only=True)
class Landscape(Beside):
    """Loss landscape and decision map around `samples` images, of this run's model and of those of other `runs`.

    The images are always the same ones, such that all models classify them rightly, or as many as possible; each
    model has the plane of its own adversarial example (see `plane`; `resolution` points a side, +- `span` eps), and all
    losses of the figure have one colour scale.
    """

    samples: Count = 3
    resolution: Count = 300
    span: Positive = 3.0
    tolerance: NonNegative = 0.01
    steps: Count = 50

    def __call__(self, context: AnalysisContext) -> list[Result]:
        """Write figures/landscape.png and, beside it, landscape.npz (for each model m and image i, `<m>_<i>_loss` and
        `_classes`; `axis`), and `landscape` in summary.json. NotMade if no image is classified rightly."""
        if context.eps == 0:
            raise NotMade("eps is 0")
        place = context.hardware.device
        subjects = self.subjects(context)
        images = _shown(context, [subject.model for subject in subjects[1:]], self.samples)
        planes: list[list[Plane]] = []
        with progress("landscape", len(subjects) * len(images), "planes") as bar:
            for subject in subjects:
                row = []
                for image, label in zip(images.images, images.labels, strict=True):
                    row.append(plane(
                        subject.model, to_unit(image[None].to(place))[0], label.to(place), norm=context.norm,
                        eps=context.eps, span=self.span, resolution=self.resolution, tolerance=self.tolerance,
                        steps=self.steps, seed=context.seed, batch_size=context.batch_size,
                    ))  # fmt: skip
                    bar.update(1)
                planes.append(row)
        arrays = {"axis": planes[0][0].axis}
        for subject, row in zip(subjects, planes, strict=True):
            for number, one in enumerate(row):
                name = subject.name.removesuffix(" (this run)")
                arrays |= {f"{name}_{number}_loss": one.loss, f"{name}_{number}_classes": one.classes}
        labels = [int(label) for label in images.labels]
        share = float(np.mean([one.evaluated for row in planes for one in row]))
        title = (
            f"Cross-entropy and predicted class around images (o) and their adversarial examples (x), "
            f"{context.norm} eps {eps_text(context.eps)}; "
            f"{self.resolution}x{self.resolution} points, {share:.0%} evaluated"
        )
        figure = _draw(subjects, planes, labels, context.class_names, context.norm, title)
        context.draw("landscape", figure, title)
        save_arrays(context.figures / "landscape.npz", arrays)
        told = [
            {
                "model": subject.name,
                "image": number,
                "loss": one.loss_at[0],
                "adversarial_loss": one.loss_at[1],
                "adversarial_distance_in_eps": one.adversarial,
                "evaluated": one.evaluated,
            }
            for subject, row in zip(subjects, planes, strict=True)
            for number, one in enumerate(row)
        ]
        context.save(landscape=told)
        return []


def _shown(context: AnalysisContext, others: list[nn.Module], samples: int) -> Split:
    """Images that this run's model classifies rightly; those on which the others agree come first."""
    split = context.right(len(context.images))
    agreed = torch.zeros(len(split), dtype=torch.long)
    for model in others:
        pred = evaluate.predict(model, split, context.hardware, context.batch_size, examples=0).pred
        agreed += torch.from_numpy(pred) == split.labels
    rows = agreed.argsort(descending=True, stable=True)[:samples]
    return Split(split.images[rows], split.labels[rows])


def _draw(
    subjects: list[Subject],
    planes: list[list[Plane]],
    labels: list[int],
    names: tuple[str, ...],
    norm: str,
    title: str,
) -> Any:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # without pyplot: no window system, no state shared with others
    from matplotlib.patches import Circle, Patch

    # One model: losses above classes. Several: a row each, with the two side by side.
    alone, k = len(subjects) == 1, len(labels)
    rows, columns = (2, k) if alone else (len(subjects), 2 * k)
    figure = Figure(figsize=(1.4 + 2.7 * columns, 1.0 + 2.9 * rows), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    finite = [one.loss[np.isfinite(one.loss)] for row in planes for one in row]
    highest = max(float(loss.max(initial=0)) for loss in finite) or 1.0
    scale = PowerNorm(0.5, 0, highest)  # near the image the loss is small, and that is where to look
    highest_class = max(int(one.classes.max()) for row in planes for one in row)
    colours = _class_colours(planes, labels, max(len(names), highest_class + 1))
    for number, (subject, row) in enumerate(zip(subjects, planes, strict=True)):
        for column, (one, label) in enumerate(zip(row, labels, strict=True)):
            upper, lower = axes[:, column] if alone else axes[number, 2 * column : 2 * column + 2]
            extent = (one.axis[0], one.axis[-1], one.axis[0], one.axis[-1])
            image = upper.imshow(one.loss, origin="lower", extent=extent, cmap="cividis", norm=scale, rasterized=True)
            lower.imshow(colours[one.classes], origin="lower", extent=extent, rasterized=True)
            own = one.classes == label
            if own.any() and not own.all():
                upper.contour(one.axis, one.axis, own, [0.5], colors="white", linewidths=0.8)
            for axis, ink in ((upper, "white"), (lower, "black")):
                axis.plot(0, 0, "o", color=ink, markersize=5, markerfacecolor="none")
                axis.plot(one.adversarial, 0, "x", color=ink, markersize=6)
                if norm == "L2":  # a plane cuts an L2 ball in a circle
                    axis.add_patch(Circle((0, 0), 1, fill=False, edgecolor=ink, linestyle=":", linewidth=1))
            true = names[label]
            upper.set_title(f"{subject.name}\ntrue class: {true}", fontsize=9, color=_dark(subject.trainer))
            present = [int(value) for value in np.unique(one.classes)]
            by_area = sorted(present, key=lambda value: -(one.classes == value).sum())[:5]
            handles = [Patch(color=colours[value], label=class_name(names, value)[:16]) for value in by_area]
            lower.legend(handles=handles, fontsize=7, loc="upper left", framealpha=0.85)
    for axis in axes[:, 0]:
        axis.set_ylabel("random direction, eps")
    for axis in axes[-1]:
        axis.set_xlabel("adversarial direction, eps")
    figure.colorbar(image, ax=axes, label="cross-entropy, nats", shrink=0.6)
    return figure


def _dark(trainer: str) -> str:
    return figures.trainer_colour(trainer) if trainer != "trades" else "black"  # yellow is no ink


def _class_colours(planes: list[list[Plane]], labels: list[int], k: int) -> np.ndarray:
    """(K + 1, 3): distinct colours for the classes that take the most room, greys for the rest; white for none, -1."""
    from matplotlib.colors import to_rgb

    classes = np.concatenate([one.classes.ravel() for row in planes for one in row])
    area = np.bincount(classes[classes >= 0], minlength=k)
    area[labels] += area.max() + 1  # the true classes come first
    palette = (
        "#9ecae1",
        "#fdae6b",
        "#a1d99b",
        "#dadaeb",
        "#f0e442",
        "#cc79a7",
        "#d55e00",
        "#0072b2",
        "#009e73",
    )
    colours = np.tile(np.array(to_rgb("#bdbdbd")), (k + 1, 1))
    colours[-1] = 1
    for colour, index in zip(palette, np.argsort(-area, kind="stable"), strict=False):
        colours[index] = to_rgb(colour)
    return colours
