"""Accuracy under common corruptions, as CIFAR-10-C has them (Hendrycks & Dietterich 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aerl.analyses.context import AnalysisContext, Beside
from aerl.data import Split, subset
from aerl.errors import UserError
from aerl.evaluation.evaluate import predict
from aerl.evaluation.statistics import proportion
from aerl.report import figures
from aerl.runtime.progress import progress
from aerl.types import Count

SEVERITIES = 5
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
        found = [path.stem for path in place.glob("*.npy") if path.stem != "labels"]
        if missing := [name for name in self.names if name not in found]:
            raise UserError(f"{key}.names={missing}: not in {self.folder}; it has {', '.join(sorted(found))}")
        if not found:
            raise UserError(f"{key}.folder={self.folder}: has no corruption, NAME.npy, beside labels.npy")

    @cached_property
    def chosen(self) -> list[str]:
        found = {path.stem for path in Path(self.folder).expanduser().glob("*.npy")} - {"labels"}
        return self.names or sorted(found - set(_EXTRA)) or sorted(found)

    def __call__(self, context: AnalysisContext) -> None:
        subjects = self.subjects(context)
        place, shape = Path(self.folder).expanduser(), tuple(context.images.shape[1:])
        labels = _load(place / "labels.npy", 1)
        if len(labels) % SEVERITIES:
            raise UserError(
                f"{place / 'labels.npy'}: {len(labels)} labels; expected {SEVERITIES} times as many as images"
            )
        n = len(labels) // SEVERITIES
        rows: list[list[Any]] = []
        correct = np.zeros((len(subjects), len(self.chosen), len(self.severities)), int)
        with progress("corruptions", correct.size, "cells") as bar:
            for column, name in enumerate(self.chosen):
                pixels = _load(place / f"{name}.npy", None)
                for layer, severity in enumerate(self.severities):
                    part = slice((severity - 1) * n, severity * n)
                    split = _split(pixels, labels, part, shape, place / f"{name}.npy", len(context.class_names))
                    split = subset(split, self.samples)
                    for number, subject in enumerate(subjects):
                        clean = predict(subject.model, split, context.hardware, context.batch_size, examples=0)
                        right = int((clean.pred == split.labels.numpy()).sum())
                        correct[number, column, layer] = right
                        interval = proportion(right, len(split))
                        rows.append(
                            [subject.name, name, severity, *(interval[k] for k in ("value", "low", "high", "n"))]
                        )
                        bar.update(1)
        size = int(rows[0][-1])
        context.table("corruptions", ("model", "corruption", "severity", "accuracy", "low", "high", "n"), rows)
        errors = 1 - correct / size
        base = None if self.relative_to is None else errors[1 + self.runs.index(self.relative_to)]
        report = []
        for number, subject in enumerate(subjects):
            mean = float(correct[number].mean() / size)
            report.append({"model": subject.name, "accuracy": mean, "mce": mce(errors[number], base)})
        for column, name in enumerate(self.chosen):
            value = float(correct[0, column].mean() / size)
            context.log.log({"corruption_accuracy": value}, n=size, split="test", attack=name)
        summary = {"models": report, "relative_to": self.relative_to, "severities": self.severities, "n": size}
        context.save(corruptions=summary | {"names": self.chosen})
        figure = self._draw(subjects, 100 * correct / size)
        context.draw("corruptions", figure, f"accuracy under {len(self.chosen)} corruptions, {size} images per cell")

    def _draw(self, subjects: Sequence[Any], accuracy: np.ndarray) -> Any:
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


def _load(path: Path, dimensions: int | None) -> np.ndarray:
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
