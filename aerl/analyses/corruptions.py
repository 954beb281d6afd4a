"""Accuracy under common corruptions, as CIFAR-10-C has them (Hendrycks & Dietterich 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aerl.analyses.context import AnalysisContext, Beside, Subject
from aerl.data import Split, subset
from aerl.errors import UserError
from aerl.evaluation.evaluate import predict
from aerl.evaluation.statistics import proportion
from aerl.report import figures
from aerl.runtime.progress import progress
from aerl.types import Count

SEVERITIES = 5
_INTERVAL = ("value", "low", "high", "n")
_EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # of Hendrycks & Dietterich, outside their means


@dataclass(frozen=True, kw_only=True)
class Corruptions(Beside):
    """Accuracy of this run's model, and those of other `runs`, on every corruption at every severity.

    folder: NAME.npy for each corruption, uint8 (5 n, H, W, C) or (5 n, H, W), the n test images at severities 1 to 5
        one after the other, and labels.npy (5 n,), as the files of CIFAR-10-C and CIFAR-100-C.
    names: the corruptions; empty: all files but the four extra ones of CIFAR-10-C.
    severities: of 1 to 5.
    samples: images of each severity, always the same ones; None: all.
    relative_to: one of `runs`, by which errors are divided.

    The mean corruption error (mCE) is the mean over the corruptions of the error summed over the severities, divided by
    the same of the model `relative_to` (Hendrycks & Dietterich 2019, section 4.1), or by the number of severities.
    Writes tables/corruptions.csv, figures/corruptions.png, `corruptions` in summary.json and a Result for each
    corruption. Raises UserError for a folder, name or severity that is not there.
    """

    folder: str
    names: list[str] = field(default_factory=list)
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    samples: Count | None = None
    relative_to: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "analysis.corruptions"
        if wrong := [s for s in self.severities if not 1 <= s <= SEVERITIES]:
            raise UserError(f"{key}.severities={wrong}: expected 1 to {SEVERITIES}")
        if not self.severities:
            raise UserError(f"{key}.severities=[]: expected some of 1 to {SEVERITIES}")
        if self.relative_to is not None and self.relative_to not in self.runs:
            raise UserError(f"{key}.relative_to={self.relative_to}: expected one of {key}.runs={self.runs}")
        place = Path(self.folder).expanduser()
        if not (place / "labels.npy").is_file():
            raise UserError(f"{key}.folder={self.folder}: has no labels.npy; expected the files of CIFAR-10-C")
        if missing := [name for name in self.names if name not in self._found]:
            raise UserError(f"{key}.names={missing}: not in {self.folder}; it has {', '.join(sorted(self._found))}")
        if not self._found:
            raise UserError(f"{key}.folder={self.folder}: has no corruption, NAME.npy, beside labels.npy")

    @cached_property
    def _found(self) -> set[str]:
        return {path.stem for path in Path(self.folder).expanduser().glob("*.npy")} - {"labels"}

    @cached_property
    def chosen(self) -> list[str]:
        return self.names or sorted(self._found - set(_EXTRA)) or sorted(self._found)

    def __call__(self, context: AnalysisContext) -> None:
        subjects = self.subjects(context)
        correct, size = self._count(context, subjects)
        accuracy = correct / size
        rows: list[list[Any]] = []
        for column, layer, number in np.ndindex(len(self.chosen), len(self.severities), len(subjects)):
            interval = proportion(int(correct[number, column, layer]), size)
            where = [subjects[number].name, self.chosen[column], self.severities[layer]]
            rows.append([*where, *(interval[key] for key in _INTERVAL)])
        context.table("corruptions", ("model", "corruption", "severity", "accuracy", *_INTERVAL[1:]), rows)
        for name, value in zip(self.chosen, accuracy[0].mean(1), strict=True):
            context.log.log({"corruption_accuracy": float(value)}, n=size, split="test", attack=name)
        base = None if self.relative_to is None else 1 - accuracy[1 + self.runs.index(self.relative_to)]
        models = [
            {"model": subject.name, "accuracy": float(own.mean()), "mce": mce(1 - own, base)}
            for subject, own in zip(subjects, accuracy, strict=True)
        ]
        summary = {"models": models, "relative_to": self.relative_to, "severities": self.severities, "n": size}
        context.save(corruptions=summary | {"names": self.chosen})
        caption = f"accuracy under {len(self.chosen)} corruptions, {size} images per cell"
        context.draw("corruptions", self._draw(subjects, 100 * accuracy), caption)

    def _count(self, context: AnalysisContext, subjects: Sequence[Subject]) -> tuple[np.ndarray, int]:
        """How many of the images of each cell are right: (models, corruptions, severities), and of how many."""
        place, shape = Path(self.folder).expanduser(), tuple(context.images.shape[1:])
        labels = _load(place / "labels.npy", 1)
        if len(labels) % SEVERITIES:
            raise UserError(
                f"{place / 'labels.npy'}: {len(labels)} labels; expected {SEVERITIES} times as many as images"
            )
        n, size = len(labels) // SEVERITIES, 0
        correct = np.zeros((len(subjects), len(self.chosen), len(self.severities)), int)
        with progress("corruptions", correct.size, "cells") as bar:
            for column, layer in np.ndindex(correct.shape[1:]):
                path, severity = place / f"{self.chosen[column]}.npy", self.severities[layer]
                part = slice((severity - 1) * n, severity * n)
                split = subset(_split(_load(path), labels, part, shape, path, len(context.class_names)), self.samples)
                size = len(split)
                for number, subject in enumerate(subjects):
                    found = predict(subject.model, split, context.hardware, context.batch_size, examples=0)
                    correct[number, column, layer] = (found.pred == split.labels.numpy()).sum()
                    bar.update(1)
        return correct, size

    def _draw(self, subjects: Sequence[Subject], accuracy: np.ndarray) -> Any:
        """accuracy (models, corruptions, severities) in %."""
        figure, axes = figures.subplots(1, 2, figsize=(5 + 0.5 * len(self.chosen), 4.2), width_ratios=[1, 1.6])
        left, right = axes[0]
        places = np.arange(len(self.chosen))
        width = 0.8 / len(subjects)
        for number, subject in enumerate(subjects):
            colour = figures.trainer_colour(subject.trainer)
            alpha = 1 - 0.6 * number / len(subjects)
            left.plot(self.severities, accuracy[number].mean(0), "o-", color=colour, alpha=alpha, label=subject.name)
            offset = (number - (len(subjects) - 1) / 2) * width
            right.bar(places + offset, accuracy[number].mean(1), width, color=colour, alpha=alpha)
        left.set(
            xlabel="severity", ylabel="accuracy, mean of the corruptions, %", ylim=(0, 100), xticks=self.severities
        )
        right.set(ylabel="accuracy, mean of the severities, %", ylim=(0, 100))
        right.set_xticks(places, self.chosen, rotation=60, ha="right")
        left.legend(frameon=False)
        return figure


def mce(errors: np.ndarray, baseline: np.ndarray | None = None) -> float:
    """The mean corruption error of errors (corruptions, severities) in [0, 1]; NaN where a baseline has no error."""
    if baseline is None:
        return float(errors.mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        return float((errors.sum(1) / baseline.sum(1)).mean())


def _load(path: Path, dimensions: int | None = None) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as .npy ({error})") from error
    if dimensions is not None and (array.ndim != dimensions or array.dtype.kind not in "iu"):
        raise UserError(f"{path}: {array.dtype} {array.shape}; expected whole numbers (5 n,)")
    return array


def _split(
    pixels: np.ndarray, labels: np.ndarray, part: slice, shape: tuple[int, ...], path: Path, classes: int
) -> Split:
    channels, height, width = shape
    full = (len(labels), height, width, channels)
    if pixels.dtype != np.uint8 or pixels.shape not in (full, full[: 4 - (channels == 1)]):
        raise UserError(f"{path}: {pixels.dtype} {pixels.shape}; expected uint8 {full}, as this run's images")
    numbers = torch.from_numpy(labels[part].astype(np.int64))
    if numbers.min() < 0 or numbers.max() >= classes:
        raise UserError(f"{path.with_name('labels.npy')}: labels up to {numbers.max()}; this run has {classes} classes")
    images = torch.from_numpy(pixels[part].copy()).view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()
    return Split(images, numbers)
