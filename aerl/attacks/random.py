"""Random numbers for attacks: one stream per image, or one per batch for training."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor


class Noise(ABC):
    """The `generator` of an attack. `seed` is for libraries that seed themselves."""

    seed: int

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype, device and layout of `like` (B, ...)."""
        return torch.empty_like(like).copy_(self._draw(like, Tensor.normal_))

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) with the shape, dtype, device and layout of `like` (B, ...)."""
        return torch.empty_like(like).copy_(self._draw(like, Tensor.uniform_))

    @abstractmethod
    def _draw(self, like: Tensor, fill: Callable[..., Tensor]) -> Tensor:
        """Numbers of the shape of `like`, by `fill(tensor, generator=...)`."""

    @abstractmethod
    def __getitem__(self, index: Tensor) -> "Noise":
        """The streams, in their current state, of the samples that `index` (boolean (B,) or integer) selects."""


Seed = Noise | torch.Generator | int | None  # what an attack takes as its `generator`


class SampleGenerator(Noise):
    """An independent random stream for every image of a batch.

    A stream is keyed by (seed, salt, pixels), so the noise of an image depends neither on the batch size, nor on
    its neighbours, nor on what ran before. Numbers are drawn on the CPU in float32: every device gets the same.
    """

    def __init__(self, streams: list[torch.Generator], seed: int) -> None:
        self.streams, self.seed = streams, seed

    @classmethod
    def for_images(cls, images: Tensor, seed: int, salt: str = "") -> "SampleGenerator":
        """One stream for each of `images` (B, C, H, W), uint8 or float in [0, 1]; `salt` distinguishes attacks.

        Float images are keyed by their rounding to 8 bits, because devices divide by 255 differently.
        """
        if images.is_floating_point():
            images = images.mul(255).round().clamp(0, 255).to(torch.uint8)
        prefix, pixels = f"{seed}\0{salt}\0".encode(), images.contiguous().cpu().numpy()
        keys = (blake2b(prefix + image.tobytes(), digest_size=8).digest() for image in pixels)
        return cls([torch.Generator().manual_seed(int.from_bytes(key, "little")) for key in keys], seed)

    def _draw(self, like: Tensor, fill: Callable[..., Tensor]) -> Tensor:
        numbers = torch.empty(like.shape)
        for row, stream in zip(numbers, self.streams, strict=True):
            fill(row, generator=stream)
        return numbers

    def __getitem__(self, index: Tensor) -> "SampleGenerator":
        rows = torch.arange(len(self.streams))[index.cpu()].tolist()
        return SampleGenerator([self.streams[row] for row in rows], self.seed)


class BatchGenerator(Noise):
    """For training: one fast draw per batch from one `torch.Generator`, on its device.

    Each draw is for all `size` samples of the batch, of which `rows` (b,) are returned (None: all), so the numbers
    of a sample depend neither on which others are still attacked nor on how many processes share the batch.
    """

    def __init__(self, generator: torch.Generator, size: int, rows: Tensor | None = None) -> None:
        self.generator, self.size, self.rows = generator, size, rows
        self.seed = generator.initial_seed()

    def _draw(self, like: Tensor, fill: Callable[..., Tensor]) -> Tensor:
        numbers = like.new_empty((self.size, *like.shape[1:]), device=self.generator.device)
        fill(numbers, generator=self.generator)
        return numbers if self.rows is None else numbers[self.rows]

    def __getitem__(self, index: Tensor) -> "BatchGenerator":
        device = self.generator.device
        rows = torch.arange(self.size, device=device) if self.rows is None else self.rows
        return BatchGenerator(self.generator, self.size, rows[index.to(device)])
