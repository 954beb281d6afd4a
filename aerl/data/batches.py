"""Batches of a split, on the device, in an order that depends on the generator alone."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from aerl.data.splits import Split
from aerl.runtime import ddp


def to_unit(images: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """uint8 (B, C, H, W) in 0..255 -> float32 in [0, 1], in one pass and in the given memory format."""
    return images.to(torch.float32, memory_format=memory_format).div_(255)


class Batches:
    """Iterates over a split: `for images, labels in Batches(split, 256, device).epoch(generator)`.

    Images come as uint8 (B, C, H, W), labels as int64 (B,), both on `device`; `len` is the number of batches
    of an epoch. Do not write to them: a batch in order is a view of the split itself.

    A split in memory moves to the device once if it fits in half of what is free there. A split that is mapped or
    larger stays where it is, and a thread reads the next batch. The order of the samples is the same.
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
        self.batch_size = batch_size
        self.device = torch.device(device)
        incomplete = len(split) % batch_size if drop_last and len(split) >= batch_size else 0
        self.size, self.used = len(split), len(split) - incomplete
        self.shared = shared
        self.resident = not split.mapped and _fits(split.images, self.device)
        self.images = split.images.to(self.device) if self.resident else split.images
        self.labels = split.labels.to(self.device) if self.resident else split.labels

    def __len__(self) -> int:
        return -(-self.used // self.batch_size)

    def epoch(self, generator: torch.Generator | None = None, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass, shuffled by a CPU generator, which is drawn from at once; in order without one.

        `start` leaves out that many batches at the beginning.
        """
        spans = [self._span(batch) for batch in range(start, len(self))]
        if self.resident and generator is None:
            return ((self.images[span], self.labels[span]) for span in spans)
        in_order = generator is None
        order = torch.arange(self.size) if in_order else torch.randperm(self.size, generator=generator)
        order = order.to(self.labels.device)
        rows = [order[span] for span in spans]
        return map(self._select, rows) if self.resident else self._read_ahead(rows)

    def _span(self, batch: int) -> slice:
        first = batch * self.batch_size
        size = min(self.batch_size, self.used - first)
        rank, processes = (ddp.rank(), ddp.world_size()) if self.shared else (0, 1)
        return slice(first + rank * size // processes, first + (rank + 1) * size // processes)

    def _select(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.index_select(0, rows), self.labels.index_select(0, rows)

    def _read_ahead(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches that are not on the device; the next one is read while one is used."""
        pin = self.device.type == "cuda"

        def read(rows: Tensor) -> tuple[Tensor, Tensor]:
            images, labels = self._select(rows)
            images = images.pin_memory() if pin else images
            return images.to(self.device, non_blocking=True), labels.to(self.device)

        with ThreadPoolExecutor(1) as pool:
            previous = None
            for rows in batches:
                current = pool.submit(read, rows)
                if previous is not None:
                    yield previous.result()
                previous = current
            if previous is not None:
                yield previous.result()


def _fits(images: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
