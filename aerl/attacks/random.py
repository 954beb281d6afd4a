"""Where attacks get their random numbers: one stream per image, or one per batch for training."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from aerl.distributed import Share


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
            blake2b(prefix + image.tobytes(), digest_size=8).digest()
            for image in images.contiguous().cpu().numpy()
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

    For training, where speed matters and a sample's noise need not outlive its batch. Of a batch of which
    this process has a `share`, the noise is drawn for all, so that each sample gets what it would get alone.
    """

    def __init__(self, generator: torch.Generator, share: Share | None = None) -> None:
        self.generator, self.share = generator, share

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
        share, rows = self.share, slice(None)
        if share is not None and 0 < len(like) == share.last - share.first:
            like, rows = torch.cat([like[:1]] * share.whole), share.rows
        noise = torch.empty_like(like, device=self.generator.device)
        return distribution(noise, generator=self.generator)[rows].to(like.device)

    def __getitem__(self, index: Tensor) -> "BatchGenerator":
        """Itself: the one stream serves whichever samples are left."""
        return self
