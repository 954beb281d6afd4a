"""One run on several processes, one for each GPU, as `torchrun` starts them.

Each takes its share of every training batch and of the test images' batches, and is told what the others
found, so that all hold the same state and take the same way. The first alone writes, logs and reports.
Nothing of torch is imported before the processes meet.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aerl.runtime import signals
from aerl.runtime.signals import Stopped
from aerl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

T = TypeVar("T")

# How long a process waits for one that lives but does not answer: the first prepares data and does the analyses
# while the others wait. They need not wait for a dead one: torchrun ends them all, and they end with torchrun.
_PATIENCE = timedelta(hours=24)
# One that has failed waits this long for the others to fail likewise, and go on to the next run together; one that
# was asked to end waits shorter, because torchrun kills all of them 30 seconds after it has asked.
_SECONDS_TO_AGREE, _SECONDS_TO_STOP = 10, 3

_store: Any = None
_alone = False
_jobs = 0


@dataclass(frozen=True)
class Share:
    """The samples `first` to `last` (exclusive) of a batch of `whole`: those of one process."""

    first: int
    last: int
    whole: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)


def rank() -> int:
    """Which of the processes this is; 0 without torchrun."""
    return int(os.environ["RANK"]) if _started_by_torchrun() else 0


def world_size() -> int:
    """How many processes there are; 1 without torchrun, and while this one works alone."""
    return int(os.environ["WORLD_SIZE"]) if _started_by_torchrun() and not _alone else 1


@contextmanager
def main_process_only() -> Iterator[None]:
    """Work that only the first process does: nothing in it asks the others, who wait for the end of the run."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def local_rank() -> int:
    """Which of the processes of this machine this is."""
    return int(os.environ["LOCAL_RANK"]) if _started_by_torchrun() else 0


def is_main() -> bool:
    """Whether this is the process that writes, logs and reports."""
    return rank() == 0


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def init_process_group(device: str) -> None:
    """Let the processes of torchrun find each other, once for all runs of a multirun.

    `device` is the one of the configuration: on GPUs they talk by NCCL, else by gloo. Raises UserError where
    there is no torchrun.
    """
    global _store
    if not _started_by_torchrun():
        raise UserError(
            "hardware.distributed=true: needs a process for each GPU: "
            "torchrun --standalone --nproc-per-node=gpu launch.py hardware=ddp ..."
        )
    if _store is not None:
        return
    import torch
    from torch import distributed

    on_gpus = device != "cpu" and torch.cuda.is_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=_PATIENCE)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _store = distributed.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]


def share(whole: int) -> Share | None:
    """This process's samples of a batch of `whole`; None where it has them all."""
    number, count = rank(), world_size()
    return None if count == 1 else Share(number * whole // count, (number + 1) * whole // count, whole)


def gather(value: T) -> list[T]:
    """What each process has, in the order of their ranks; all of them must call it."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * world_size()
    with _waiting():
        distributed.all_gather_object(values, value)
    return values


def total(values: "Tensor") -> "Tensor":
    """The sum over the processes, in place; all of them must call it."""
    if world_size() > 1:
        from torch import distributed

        with _waiting():
            distributed.all_reduce(values)
    return values


@contextmanager
def _waiting() -> Iterator[None]:
    """Where a process has gone because it was asked to end, so was this one: that is no fault of its own."""
    try:
        yield
    except RuntimeError:
        if signals.received():
            raise Stopped(signal.Signals(signals.received())) from None
        raise


def average(tensors: Sequence["Tensor"], *, differing: bool = False) -> None:
    """Replace each by its mean over the processes; all of them must call it.

    `differing`: only values that differ. The mean of three times 0.1 is another number, and constants must stay.

    Without torch's DistributedDataParallel: a model stays one that an attack can differentiate, any of its
    parameters may be unused, and all gradients go in one message, short beside the step that made them.
    """
    if world_size() == 1 or not tensors:
        return
    import torch

    values = torch.cat([tensor.flatten() for tensor in tensors])
    means = total(values.clone()).div_(world_size())
    if differing:
        from torch import distributed

        low, high = values.clone(), values.clone()
        distributed.all_reduce(low, distributed.ReduceOp.MIN)
        distributed.all_reduce(high, distributed.ReduceOp.MAX)
        means = torch.where(low == high, values, means)
    lengths = [tensor.numel() for tensor in tensors]
    for tensor, mean in zip(tensors, torch.split(means, lengths), strict=True):
        tensor.copy_(mean.view(tensor.shape))


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, or the UserError or Stopped it raises, in all of them."""
    if world_size() == 1:
        return make()
    from torch import distributed

    made: list[Any] = [None, None]
    if is_main():
        try:
            made[0] = make()
        except (UserError, Stopped) as error:
            made[1] = error
    with _waiting():
        distributed.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return made[0]  # type: ignore[no-any-return]


def main_first(make: Callable[[], T]) -> T:
    """What `make` returns, in each process its own; the first leaves its files to the others."""
    made: list[T] = []
    broadcast_from_main(lambda: made.append(make()))
    return made[0] if made else make()


def broadcast_weights(model: "Module") -> None:
    """Give `model` the parameters and buffers that it has in the first process."""
    if world_size() > 1:
        from torch import distributed

        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.detach(), 0)


def prints_errors() -> bool:
    """Whether an error that all processes have is for this one to tell; until they have met, each tells it."""
    return is_main() or _store is None


def destroy_process_group() -> None:
    """To be called last: the others end after the first, because torchrun ends all as soon as one has failed."""
    if _store is None:
        return
    from torch import distributed

    if is_main():
        _store.set("left", "")
    else:
        _store.wait(["left"], _PATIENCE)
    distributed.destroy_process_group()


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """`folder` itself for the first process; for each of the others one that nobody reads, and soon gone."""
    if is_main():
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="aerl-") as place:
            yield Path(place)


@contextmanager
def end_together() -> Iterator[None]:
    """Let a run end alike in all processes: what made one of them fail, or stop, is the end of it for all.

    A process that fails while others wait for it in the midst of the run ends at once, and torchrun them.
    """
    try:
        yield
    except BaseException as error:
        _agree(error)
        raise
    else:
        _agree(None)


def _agree(error: BaseException | None) -> None:
    global _jobs
    if _store is None:
        return
    _jobs += 1
    keys = [f"end/{_jobs}/{number}" for number in range(world_size())]
    _store.set(keys[rank()], "" if error is None else f"{type(error).__name__}: {error}")
    seconds = _SECONDS_TO_STOP if isinstance(error, Stopped) else _SECONDS_TO_AGREE
    try:
        _store.wait(keys, _PATIENCE if error is None else timedelta(seconds=seconds))
    except RuntimeError:  # the others wait in the midst of the run, and cannot be reached
        if isinstance(error, Stopped):
            os._exit(signals.REQUEUE)
        print(f"error: process {rank()} of {world_size()}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    ends = [_store.get(key).decode() for key in keys]
    if error is None and (number := next((n for n, end in enumerate(ends) if end), None)) is not None:
        kind, _, told = ends[number].partition(": ")
        if kind == Stopped.__name__:
            raise Stopped(signal.SIGTERM)
        raise UserError(f"process {number} of {world_size()}: {told if kind == UserError.__name__ else ends[number]}")


def sync_stop_request() -> None:
    """Stop here, all of us, if one of us was told to; all of them must call it, at the same point."""
    heard = signals.received()
    if world_size() > 1:
        import torch
        from torch import distributed

        most = torch.tensor(heard)
        with _waiting():
            distributed.all_reduce(most, distributed.ReduceOp.MAX)
        heard = int(most)
    signals.request_stop(heard)
