"""What a prepared dataset is: three splits of uint8 images and int64 labels."""

from dataclasses import dataclass

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
