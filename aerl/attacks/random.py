"""Where attacks get their random numbers: one stream per image, or one per batch for training."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """What an attack asks of its `generator`."""

    @property
    def seed(self) -> int:
        """An integer for libraries that seed themselves."""

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype, device and layout of `like` (B, ...)."""

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) with the shape, dtype, device and layout of `like` (B, ...)."""

    def __getitem__(self, index: Tensor) -> "Noise":
        """The streams of the samples that `index`, boolean (B,) or integer, picks; they go on, not anew."""


class SampleGenerator:
    """An independent random stream for every image of a batch.

    A stream is keyed by (seed, salt, the image's own pixels), so the noise an image gets depends neither
    on the batch size, nor on its neighbours, nor on what ran before. Numbers are drawn on the CPU in
    float32 and then moved, so every device and dtype gets the same ones. Two equal images in a batch get
    equal noise; two unequal images share a stream with probability 2**-32.
    """

    def __init__(self, streams: list[torch.Generator], seed: int) -> None:
        self.streams = streams
        self.seed = seed

    @classmethod
    def for_images(cls, images: Tensor, seed: int, salt: str = "") -> "SampleGenerator":
        """One stream for each of `images` (B, C, H, W), uint8 or float in [0, 1].

        Float images are keyed as rounded to 8 bits: an image has the same stream before and after its
        conversion, whichever device divided it by 255. `salt` gives the same image another stream, for
        instance one per attack.
        """
        if images.is_floating_point():
            images = images.mul(255).round().clamp(0, 255).to(torch.uint8)
        prefix = f"{seed}\0{salt}\0".encode()
        keys = (
            blake2b(prefix + image.tobytes(), digest_size=8).digest() for image in images.contiguous().cpu().numpy()
        )
        streams = [torch.Generator().manual_seed(int.from_bytes(key, "little")) for key in keys]
        return cls(streams, seed)

    def normal(self, like: Tensor) -> Tensor:
        """See `Noise.normal`."""
        return self._fill(like, "normal_")

    def uniform(self, like: Tensor) -> Tensor:
        """See `Noise.uniform`."""
        return self._fill(like, "uniform_")

    def _fill(self, like: Tensor, distribution: str) -> Tensor:
        noise = torch.empty(like.shape)
        for row, stream in zip(noise, self.streams, strict=True):
            getattr(row, distribution)(generator=stream)
        return torch.empty_like(like).copy_(noise)

    def __getitem__(self, index: Tensor) -> "SampleGenerator":
        """See `Noise.__getitem__`."""
        picked = torch.arange(len(self.streams))[index.cpu()].tolist()
        return SampleGenerator([self.streams[i] for i in picked], self.seed)


class BatchGenerator:
    """The same interface on one `torch.Generator`: a single draw per batch, on the generator's device.

    For training, where speed matters and a sample's noise need not outlive its batch. Every draw is made for the
    whole batch, of which the calls get some rows: the numbers of a sample depend neither on which others are
    still attacked nor on how many processes share the batch.
    """

    def __init__(self, generator: torch.Generator, size: int, rows: Tensor | None = None) -> None:
        """`size` is that of the whole batch; `rows` (b,), integer: the samples that are asked for; None: all."""
        self.generator, self.size, self.rows = generator, size, rows

    @property
    def seed(self) -> int:
        """The seed the torch generator was given."""
        return self.generator.initial_seed()

    def normal(self, like: Tensor) -> Tensor:
        """See `Noise.normal`."""
        return self._fill(like, Tensor.normal_)

    def uniform(self, like: Tensor) -> Tensor:
        """See `Noise.uniform`."""
        return self._fill(like, Tensor.uniform_)

    def _fill(self, like: Tensor, distribution: Callable[..., Tensor]) -> Tensor:
        noise = like.new_empty((self.size, *like.shape[1:]), device=self.generator.device)
        distribution(noise, generator=self.generator)
        return torch.empty_like(like).copy_(noise if self.rows is None else noise[self.rows])

    def __getitem__(self, index: Tensor) -> "BatchGenerator":
        """See `Noise.__getitem__`."""
        device = self.generator.device
        rows = torch.arange(self.size, device=device) if self.rows is None else self.rows
        return BatchGenerator(self.generator, self.size, rows[index.to(device)])
