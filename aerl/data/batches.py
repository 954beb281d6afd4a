"""Batches of a split, on the device, in an order that depends on the generator alone."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from aerl.data.splits import Split
from aerl.runtime import ddp


def to_unit(images: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """uint8 (B, C, H, W) in 0..255, or floats in [0, 1] -> a new float32 in [0, 1], in the given memory format."""
    unit = images.to(torch.float32, memory_format=memory_format, copy=True)
    return unit if images.is_floating_point() else unit.div_(255)


class Batches:
    """Iterates over a split: `for images, labels in Batches(split, 256, device).epoch(generator)`.

    Images are uint8 (B, C, H, W), labels int64 (B,), both on `device`; `len` is the number of batches of an epoch.
    A split in memory moves to the device once if it fits in half of what is free there. A thread reads the batches of
    any other, one ahead.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        drop_last: bool = False,
        shared: bool = False,
    ) -> None:
        """`drop_last` leaves out an incomplete last batch, unless it is the only one.

        `shared`: of every batch, only the share of this process if there are several.
        """
        self.batch_size, self.device, self.shared = batch_size, torch.device(device), shared
        self.size = self.used = len(split)
        if drop_last and self.size >= batch_size:
            self.used -= self.size % batch_size
        self.images, self.labels = split.images, split.labels
        cuda = self.device.type == "cuda"
        fits = not cuda or split.images.nbytes <= torch.cuda.mem_get_info(self.device)[0] // 2
        self.resident = fits and not split.mapped
        if self.resident:
            self.images, self.labels = self.images.to(self.device), self.labels.to(self.device)

    def __len__(self) -> int:
        return -(-self.used // self.batch_size)

    def epoch(self, generator: torch.Generator | None = None, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass from batch `start` on, shuffled by a CPU generator, which is drawn from at once, or in order."""
        order = torch.arange(self.size) if generator is None else torch.randperm(self.size, generator=generator)
        order = order.to(self.labels.device)
        rank, processes = (ddp.rank(), ddp.world_size()) if self.shared else (0, 1)
        batches = []
        for first in range(start * self.batch_size, self.used, self.batch_size):
            size = min(self.batch_size, self.used - first)
            batches.append(order[first + rank * size // processes : first + (rank + 1) * size // processes])
        return map(self._select, batches) if self.resident else self._read_ahead(batches)

    def _select(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.index_select(0, rows), self.labels.index_select(0, rows)

    def _read_ahead(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        def read(rows: Tensor) -> tuple[Tensor, Tensor]:
            images, labels = self._select(rows)
            images = images.pin_memory() if self.device.type == "cuda" else images
            return images.to(self.device, non_blocking=True), labels.to(self.device)

        ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for rows in batches:
                ahead.append(pool.submit(read, rows))
                if len(ahead) == 2:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
