"""Batches of a split, on the device, in an order that depends on the generator alone."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from aerl.data.splits import Split
from aerl.runtime import ddp

Item = TypeVar("Item")
Made = TypeVar("Made")


def to_unit(images: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """uint8 (B, C, H, W) in 0..255 -> float32 in [0, 1], in one pass and in the given memory format."""
    return images.to(torch.float32, memory_format=memory_format).div_(255)


class Batches:
    """Iterates over a split: `for images, labels in Batches(split, 256, device).epoch(generator)`.

    Images come as uint8 (B, C, H, W), labels as int64 (B,), both on `device`; `len` is the number of batches
    of an epoch. They are to be read only: a batch in order is a view of the split itself.

    A split in memory moves to the device once, if it fits in half of what is free there. One that is mapped,
    or too large for that, is read ahead by a thread. The order of the samples is the same either way.
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

        `shared`: of every batch, only the share of this process, where there are several.
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
        return map(self._select, rows) if self.resident else ahead(self._read, rows)

    def _span(self, batch: int) -> slice:
        first = batch * self.batch_size
        size = min(self.batch_size, self.used - first)
        rank, processes = (ddp.rank(), ddp.world_size()) if self.shared else (0, 1)
        return slice(first + rank * size // processes, first + (rank + 1) * size // processes)

    def _select(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.index_select(0, rows), self.labels.index_select(0, rows)

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same from a map, in ascending order of the rows because that is how a disk is read fastest."""
        images = torch.empty(
            (len(rows), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        for place in rows.argsort().tolist():
            images[place].copy_(self.images[int(rows[place])])
        labels = self.labels.index_select(0, rows)
        return images.to(self.device, non_blocking=True), labels.to(self.device)


def _fits(images: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2


def ahead(make: Callable[[Item], Made], items: Iterable[Item], *, workers: int = 1) -> Iterator[Made]:
    """`map` in order, with the next items already made by threads: two more than there are threads.

    An exception of `make` is raised here, where its result was due. The threads end with the iterator, also
    when its consumer stops early.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="aerl-ahead")
    pending: deque[Future[Made]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
