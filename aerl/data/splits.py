"""What a prepared dataset is: three splits of uint8 images and int64 labels."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aerl.errors import UserError

log = logging.getLogger("aerl")


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W), or float32 in [0, 1], and labels int64 (N,), in memory or backed by a memory map."""

    images: Tensor
    labels: Tensor
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSplits:
    """A dataset as the rest of aerl sees it; `mean` and `std` are the training images' own, per channel.

    `digest` is a SHA-256 of all pixels, labels and class names: the same wherever and whenever they are prepared.
    `test_only`: the dataset has no training images; all splits are its test images, for evaluation.
    """

    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str = ""
    test_only: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def facts(self) -> dict[str, list[Any]]:
        """What a network of these images is built for, for summary.json."""
        return {"image_shape": list(self.image_shape), "class_names": list(self.class_names)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels, height, width = self.test.images.shape[1:]
        return channels, height, width


def rows(total: int, samples: int | None) -> Tensor:
    """`samples` of `total` rows, int64 and rising; all for None. They are the same in every run, to pair runs."""
    if samples is None or samples >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:samples].sort().values


def subset(split: Split, samples: int | None) -> Split:
    """The `rows` of a split; the split itself where that is all of them."""
    if samples is None or samples >= len(split):
        return split
    chosen = rows(len(split), samples)
    return Split(split.images[chosen], split.labels[chosen])


def limit_training(data: DataSplits, samples: int | None) -> DataSplits:
    """The same data with `samples` of its training images; UserError if they are of fewer than two classes."""
    if samples is None:
        return data
    if samples > len(data.train):
        raise UserError(f"dataset.train_samples={samples}: the training split has {len(data.train)} images")
    train = subset(data.train, samples)
    present = int((torch.bincount(train.labels) > 0).sum())
    if present < 2:
        raise UserError(f"dataset.train_samples={samples}: are all of one class; expected images of at least two")
    if present < data.num_classes:
        log.warning("dataset.train_samples=%d: have images of %d of %d classes", samples, present, data.num_classes)
    return replace(data, train=train)
