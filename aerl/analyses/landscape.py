"""Loss landscapes: around images along an adversarial and a random direction, and around the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from aerl.analyses.context import AnalysisContext, Beside, NotMade, Subject, class_name
from aerl.attacks import SampleGenerator, attacking, pgd, predictions
from aerl.attacks.projections import norms
from aerl.data import Split, subset, to_unit
from aerl.evaluation import evaluate
from aerl.report import figures
from aerl.runtime.device import seed_from
from aerl.runtime.files import save_arrays
from aerl.runtime.progress import progress
from aerl.runtime.terminal import eps_text
from aerl.tracking.results import Result
from aerl.types import Count, Norm, Positive

_CLASS_COLOURS = (
    "#9ecae1", "#fdae6b", "#a1d99b", "#dadaeb", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#009e73",
)  # fmt: skip


def evaluate_grid(function: Callable[[Tensor], Tensor], axis: Tensor, batch_size: int) -> Tensor:
    """`function` on all points of a square grid: (N, N, ...), with b along the first dimension and a along the second.

    It maps points (m, 2) of coordinates (a, b), m <= batch_size, to (m, ...).
    """
    points = torch.cartesian_prod(axis, axis).flip(1)
    values = torch.cat([function(part) for part in torch.split(points, batch_size)])
    return values.view(len(axis), len(axis), *values.shape[1:])


@dataclass(frozen=True)
class Plane:
    """A map of the plane x + eps * (a * first + b * second).

    axis: (N,), the values of a and of b.
    loss, classes: float32 and int64 (N, N), b along the first dimension; NaN and -1 where logits are not finite.
    adversarial: the a of the adversarial example; its b is 0.
    loss_at: the loss at the image and at the adversarial example.
    """

    axis: np.ndarray
    loss: np.ndarray
    classes: np.ndarray
    adversarial: float
    loss_at: tuple[float, float]


def plane(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm,
    eps: float,
    span: float = 3.0,
    resolution: int = 101,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 512,
) -> Plane:
    """Cross-entropy and class around one image x (C, H, W) of class y (), from -span to span times eps.

    `first` points to the adversarial example that PGD finds within eps > 0; `second` is random and orthogonal to it
    in the usual inner product. Both have length 1 in `norm`. Points are not clipped into [0, 1].
    """
    with attacking(model), torch.no_grad():
        image = x[None]
        noise = SampleGenerator.for_images(image, seed, "landscape")
        delta = pgd(model, image, y[None], generator=noise, norm=norm, eps=eps, steps=steps) - image
        length = float(norms(delta, norm))
        if length == 0:  # the attack did not move the image: take any direction
            delta, length = noise.normal(image), eps
        other = noise.normal(image)
        other -= (other * delta).sum() / delta.square().sum() * delta
        first, second = (direction / norms(direction, norm) * eps for direction in (delta, other))

        def measure(points: Tensor) -> Tensor:
            a, b = points.to(x).view(-1, 2, 1, 1, 1).unbind(1)
            logits = model(image + a * first + b * second).float()
            loss = F.cross_entropy(logits, y.expand(len(logits)), reduction="none")
            loss = loss.where(logits.isfinite().all(1), torch.nan)
            return torch.stack([loss, predictions(logits).float()], 1).cpu()

        axis = torch.linspace(-span, span, resolution)
        loss, classes = evaluate_grid(measure, axis, batch_size).unbind(2)
        clean, adversarial = measure(torch.tensor([[0.0, 0.0], [length / eps, 0.0]]))[:, 0].tolist()
    return Plane(axis.numpy(), loss.numpy(), classes.long().numpy(), length / eps, (clean, adversarial))


@dataclass(frozen=True, kw_only=True)
class Landscape(Beside):
    """Loss and predicted class around `samples` images, of this run's model and of those of other `runs`.

    The images are always the same ones, if possible such that all models classify them correctly. Each model has the
    plane of its own adversarial example (see `plane`), and all losses of the figure have one colour scale.
    """

    samples: Count = 3
    resolution: Count = 101
    span: Positive = 3.0
    steps: Count = 50

    def __call__(self, context: AnalysisContext) -> list[Result]:
        """Write figures/landscape.png, landscape.npz (`axis` and, for model m and image i, `<m>_<i>_loss` and
        `<m>_<i>_classes`), and `landscape` in summary.json. NotMade if no image is classified correctly or eps is 0."""
        if context.eps == 0:
            raise NotMade("eps is 0")
        subjects, place = self.subjects(context), context.hardware.device
        images = _shown(context, [subject.model for subject in subjects[1:]], self.samples)
        planes: list[list[Plane]] = [[] for _ in subjects]
        with progress("landscape", len(subjects) * len(images), "planes") as bar:
            for subject, row in zip(subjects, planes, strict=True):
                for image, label in zip(images.images, images.labels, strict=True):
                    row.append(plane(
                        subject.model, to_unit(image[None].to(place))[0], label.to(place), norm=context.norm,
                        eps=context.eps, span=self.span, resolution=self.resolution, steps=self.steps,
                        seed=context.seed, batch_size=context.batch_size,
                    ))  # fmt: skip
                    bar.update(1)
        title = (
            f"Cross-entropy and predicted class around images (o) and their adversarial examples (x), "
            f"{context.norm} eps {eps_text(context.eps)}, {self.resolution}x{self.resolution} points"
        )
        figure = _draw_planes(context, subjects, planes, images.labels.tolist(), title)
        context.draw("landscape", figure, title)
        arrays, rows = {"axis": planes[0][0].axis}, []
        for subject, row in zip(subjects, planes, strict=True):
            for number, each in enumerate(row):
                name = f"{subject.name.removesuffix(' (this run)')}_{number}"
                arrays |= {f"{name}_loss": each.loss, f"{name}_classes": each.classes}
                rows.append({
                    "model": subject.name, "image": number, "loss": each.loss_at[0],
                    "adversarial_loss": each.loss_at[1], "adversarial_distance_in_eps": each.adversarial,
                })  # fmt: skip
        save_arrays(context.figures / "landscape.npz", arrays)
        context.save(landscape=rows)
        return []


def _shown(context: AnalysisContext, others: list[nn.Module], samples: int) -> Split:
    """Images that this run's model classifies correctly; those on which the others agree come first."""
    split = context.right(len(context.images))
    agreed = torch.zeros(len(split), dtype=torch.long)
    for model in others:
        pred = evaluate.predict(model, split, context.hardware, context.batch_size, examples=0).pred
        agreed += torch.from_numpy(pred) == split.labels
    rows = agreed.argsort(descending=True, stable=True)[:samples]
    return Split(split.images[rows], split.labels[rows])


def filter_normalised(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A random direction in weight space: each filter has the norm of the model's own (Li et al. 2018, section 4).

    A filter is a slice of a weight along its first dimension. Parameters with one dimension (biases, normalisation
    layers) do not move: the direction is zero.
    """
    direction = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            direction[name] = torch.zeros_like(weight)
            continue
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        length = weight.detach().flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
        direction[name] = drawn * length.view(-1, *[1] * (weight.dim() - 1))
    return direction


@dataclass(frozen=True, kw_only=True)
class WeightLandscape(Beside):
    """Mean cross-entropy of `samples` test images at weights + a * first + b * second, a and b from -span to span.

    The images are always the same ones; the statistics of BatchNorm stay as trained. Each of resolution**2 points is a
    pass over the images. `runs` are other runs to show beside this one, on one colour scale.
    """

    samples: Count = 256
    resolution: Count = 25
    span: Positive = 1.0

    def __call__(self, context: AnalysisContext) -> list[Result]:
        """Write figures/weight_landscape.png and, of this run, weight_landscape.npz (`axis`, `loss` with b along the
        first dimension)."""
        images = subset(Split(context.images, context.labels), self.samples)
        axis = torch.from_numpy(np.linspace(-self.span, self.span, self.resolution))
        subjects = self.subjects(context)
        with progress("weight_landscape", len(subjects) * len(axis) ** 2, "points") as bar:
            losses = [_around_weights(context, subject.model, images, axis, bar) for subject in subjects]
        caption = f"mean cross-entropy around the weights, n = {len(images)}"
        figure = _draw_weights(axis.numpy(), losses, [subject.name for subject in subjects], caption)
        context.draw("weight_landscape", figure, caption)
        save_arrays(context.figures / "weight_landscape.npz", {"axis": axis.numpy(), "loss": losses[0]})
        return []


def _around_weights(context: AnalysisContext, model: nn.Module, images: Split, axis: Tensor, bar: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed_from(context.seed, "weight_landscape"))
    first, second = (filter_normalised(model, generator) for _ in range(2))
    trained = {name: weight.detach() for name, weight in model.named_parameters()}

    def mean_loss(points: Tensor) -> Tensor:
        a, b = points[0].tolist()
        moved = {name: w + a * first[name] + b * second[name] for name, w in trained.items()}
        total = 0.0
        for rows in torch.split(torch.arange(len(images)), context.batch_size):
            x, y = evaluate.batch(images, rows, context.hardware)
            total += float(F.cross_entropy(functional_call(model, moved, (x,)).float(), y, reduction="sum"))
        bar.update(1)
        return torch.tensor([total / len(images)], dtype=torch.float64)

    with attacking(model), torch.no_grad():
        loss: np.ndarray = evaluate_grid(mean_loss, axis, batch_size=1).numpy()
    return loss


def _draw_map(axes: Any, axis: np.ndarray, values: np.ndarray, ink: str, **options: Any) -> Any:
    """Draw `values` (N, N) or colours (N, N, 3) over the plane, and a circle at its centre."""
    half = (axis[-1] - axis[0]) / max(len(axis) - 1, 1) / 2 or 0.5  # each point is the centre of its pixel
    extent = (axis[0] - half, axis[-1] + half) * 2
    axes.plot(0, 0, "o", color=ink, markersize=5, markerfacecolor="none")
    return axes.imshow(
        values, origin="lower", extent=extent, cmap="cividis", interpolation="nearest", rasterized=True, **options
    )


def _draw_planes(
    context: AnalysisContext, subjects: list[Subject], planes: list[list[Plane]], labels: list[int], title: str
) -> Any:
    """One model: losses above classes. Several: a row for each, with loss and classes side by side."""
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Circle, Patch

    alone, names = len(subjects) == 1, context.class_names
    rows, columns = (2, len(labels)) if alone else (len(subjects), 2 * len(labels))
    size = (1.4 + 2.7 * columns, 1.0 + 2.9 * rows)
    figure, axes = figures.subplots(rows, columns, figsize=size, sharex=True, sharey=True)
    figure.suptitle(title, fontsize=10)
    losses = np.concatenate([each.loss[np.isfinite(each.loss)] for row in planes for each in row])
    scale = PowerNorm(0.5, 0, losses.max(initial=0) or 1.0)  # shows detail where the loss is small
    colours = _class_colours(planes, labels, len(names))
    for number, column in np.ndindex(len(subjects), len(labels)):
        subject, each, label = subjects[number], planes[number][column], labels[column]
        upper, lower = axes[:, column] if alone else axes[number, 2 * column : 2 * column + 2]
        image = _draw_map(upper, each.axis, each.loss, "white", norm=scale)
        _draw_map(lower, each.axis, colours[each.classes], "black")
        own = each.classes == label
        if own.any() and not own.all():
            upper.contour(each.axis, each.axis, own, [0.5], colors="white", linewidths=0.8)
        for axis, ink in ((upper, "white"), (lower, "black")):
            axis.plot(each.adversarial, 0, "x", color=ink, markersize=6)
            if context.norm == "L2":  # a plane cuts an L2 ball in a circle
                axis.add_patch(Circle((0, 0), 1, fill=False, edgecolor=ink, linestyle=":", linewidth=1))
        ink = "black" if subject.trainer == "trades" else figures.trainer_colour(subject.trainer)  # not yellow
        upper.set_title(f"{subject.name}\ntrue class: {names[label]}", fontsize=9, color=ink)
        classes, counts = np.unique(each.classes, return_counts=True)
        largest = classes[np.argsort(-counts, kind="stable")][:5].tolist()
        handles = [Patch(color=colours[value], label=class_name(names, value)[:16]) for value in largest]
        lower.legend(handles=handles, fontsize=7, loc="upper left", framealpha=0.85)
    for axis in axes[:, 0]:
        axis.set_ylabel("random direction, eps")
    for axis in axes[-1]:
        axis.set_xlabel("adversarial direction, eps")
    figure.colorbar(image, ax=axes, label="cross-entropy, nats", shrink=0.6)
    return figure


def _class_colours(planes: list[list[Plane]], labels: list[int], k: int) -> np.ndarray:
    """(K + 1, 3): distinct colours for the true and the largest classes, grey for the others, white for -1."""
    from matplotlib.colors import to_rgb, to_rgba_array

    classes = np.concatenate([each.classes.ravel() for row in planes for each in row])
    area = np.bincount(classes[classes >= 0], minlength=k)
    area[labels] += area.max() + 1
    colours = np.tile(to_rgb("#bdbdbd"), (len(area) + 1, 1))
    colours[-1] = 1
    largest = np.argsort(-area, kind="stable")[: len(_CLASS_COLOURS)]
    colours[largest] = to_rgba_array(_CLASS_COLOURS)[: len(largest), :3]
    return colours


def _draw_weights(axis: np.ndarray, losses: list[np.ndarray], names: list[str], title: str) -> Any:
    from matplotlib.colors import LogNorm

    figure, (row,) = figures.subplots(1, len(losses), figsize=(1.4 + 5 * len(losses), 5))
    top = max(np.max(loss[np.isfinite(loss)], initial=1e-6) for loss in losses)
    # A logarithmic scale has no zero.
    drawn = [np.maximum(np.nan_to_num(loss, nan=top, posinf=top), 1e-6) for loss in losses]
    low, high = min(each.min() for each in drawn), max(each.max() for each in drawn)
    for axes, each, name in zip(row, drawn, names, strict=True):
        image = _draw_map(axes, axis, each, "white", norm=LogNorm(low, max(high, low * 1.01)))
        if len(axis) > 1 and each.max() > each.min():
            levels = np.geomspace(each.min(), each.max(), 12)[1:-1]
            axes.contour(axis, axis, each, levels, colors="white", linewidths=0.5)
        axes.set_xlabel("first direction, filter norms")
        axes.set_ylabel("second direction, filter norms")
        axes.set_title(title if len(losses) == 1 else name, fontsize=11)
    figure.colorbar(image, ax=row, label="cross-entropy, nats", shrink=0.8)
    return figure
