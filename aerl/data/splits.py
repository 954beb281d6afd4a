"""What a prepared dataset is: three splits of uint8 images and int64 labels."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W) and labels int64 (N,), in memory or backed by a memory map."""

    images: Tensor
    labels: Tensor
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSplits:
    """A dataset as the rest of aerl sees it; `mean` and `std` are the training images' own, per channel."""

    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels, height, width = self.test.images.shape[1:]
        return channels, height, width


def subset(split: Split, samples: int | None) -> Split:
    """`samples` images drawn once and for all: the same ones for every run, so that runs can be paired."""
    if samples is None or samples >= len(split):
        return split
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:samples].sort().values
    return Split(split.images[chosen], split.labels[chosen])
