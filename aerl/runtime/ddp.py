"""One run on several processes, one for each GPU, as `torchrun` starts them.

Each takes its share of every training batch, whose gradients torch's DistributedDataParallel averages, and of the
test images' batches. All hold the same state and reach the same point. The first alone writes, logs and reports.
A dead process ends the others at once, by way of torchrun; one that hangs ends them after `_ANSWER`.
Nothing of torch is imported before the processes connect.
"""

import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aerl.errors import UserError
from aerl.runtime import signals
from aerl.runtime.signals import Stopped

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

T = TypeVar("T")

# How long a process waits for one that lives but does not answer.
_ANSWER = timedelta(hours=1)
# The same while the first prepares data or does the analyses.
_ANSWER_FROM_MAIN = timedelta(hours=24)
# One that has failed waits this long for the others to fail likewise, and go on to the next run together; one that
# was asked to end waits shorter, because torchrun kills all of them 30 seconds after it has asked.
_SECONDS_TO_AGREE, _SECONDS_TO_STOP = 10, 3

_main_only: ContextVar[bool] = ContextVar("_main_only", default=False)


def rank() -> int:
    """Which of the processes this is; 0 without torchrun."""
    return int(os.environ["RANK"]) if _started_by_torchrun() else 0


def world_size() -> int:
    """How many processes there are; 1 without torchrun, and in `main_process_only`."""
    return int(os.environ["WORLD_SIZE"]) if _started_by_torchrun() and not _main_only.get() else 1


@contextmanager
def main_process_only() -> Iterator[None]:
    """Work that only the first process does: nothing in it asks the others, who wait for the end of the run."""
    token = _main_only.set(True)
    try:
        yield
    finally:
        _main_only.reset(token)


def local_rank() -> int:
    """Which of the processes of this machine this is."""
    return int(os.environ["LOCAL_RANK"]) if _started_by_torchrun() else 0


def is_main() -> bool:
    """Whether this is the process that writes, logs and reports."""
    return rank() == 0


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _connected() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def init_process_group(device: str) -> None:
    """Connect the processes of torchrun, once for all runs of a multirun.

    `device` is the one of the configuration: on GPUs they use NCCL, else gloo. Raises UserError where there is no
    torchrun.
    """
    if not _started_by_torchrun():
        raise UserError(
            "hardware.distributed=true: needs a process for each GPU: "
            "torchrun --standalone --nproc-per-node=gpu launch.py hardware=ddp ..."
        )
    if _connected():
        return
    import torch
    from torch import distributed

    on_gpus = device != "cpu" and torch.cuda.is_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=_ANSWER)
    _store()


@cache
def _store() -> Any:
    """A connection of our own to torchrun's store: a long wait on torch's would block NCCL's watchdog."""
    from torch import distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]


def data_parallel(module: "Module") -> "Module":
    """`module`, whose gradients are averaged over the processes, with parameters and buffers of the first."""
    if world_size() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    warnings.filterwarnings("ignore", message=".*did not find any unused parameters")  # a user's model may have some
    return DistributedDataParallel(module, find_unused_parameters=True)


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
    """If another process has ended because both were asked to, this is no fault of its own."""
    try:
        yield
    except RuntimeError:
        if signals.received():
            raise Stopped(signal.Signals(signals.received())) from None
        raise


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, or the UserError or Stopped it raises, in all of them."""
    if world_size() == 1:
        return make()
    from torch import distributed

    result: list[Any] = [None, None]
    if is_main():
        try:
            result[0] = make()
        except (UserError, Stopped) as error:
            result[1] = error
    with _waiting():
        distributed.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]  # type: ignore[no-any-return]


def main_first(make: Callable[[], T]) -> T:
    """What `make` returns, in each process its own, after the first has done it, which may take long."""
    if world_size() == 1:
        return make()
    key = f"main first {_store().add(f'main first by {rank()}', 1)}"
    result: list[T] = []

    def first() -> None:
        try:
            result.append(make())
        finally:
            _store().set(key, "")

    if not is_main():
        _store().wait([key], _ANSWER_FROM_MAIN)
    broadcast_from_main(first)
    return result[0] if result else make()


def broadcast_weights(model: "Module") -> None:
    """Give `model` the parameters and buffers that it has in the first process."""
    if world_size() > 1:
        from torch import distributed

        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.detach(), 0)


def prints_errors() -> bool:
    """Whether this process prints an error that all have; until they are connected, each prints its own."""
    return is_main() or not _connected()


def destroy_process_group() -> None:
    """To be called last: the others end after the first, because torchrun ends all as soon as one has failed."""
    if not _connected():
        return
    from torch import distributed

    if is_main():
        _store().set("ended", "")
    else:
        _store().wait(["ended"], _ANSWER_FROM_MAIN)
    distributed.destroy_process_group()


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """`folder` itself for the first process; for each of the others a temporary one."""
    if is_main():
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="aerl-") as place:
            yield Path(place)


@contextmanager
def end_together() -> Iterator[None]:
    """End a run alike in all processes: what made one of them fail, or stop, ends it for all.

    A process that fails while others wait for it in the midst of the run exits at once, and torchrun ends them.
    """
    try:
        yield
    except BaseException as error:
        _agree(error)
        raise
    else:
        _agree(None)


def _agree(error: BaseException | None) -> None:
    if not _connected():
        return
    store, processes = _store(), world_size()
    run = store.add(f"runs of {rank()}", 1)
    keys = [f"end of run {run} in {number}" for number in range(processes)]
    store.set(keys[rank()], "" if error is None else f"{type(error).__name__}: {error}")
    seconds = _SECONDS_TO_STOP if isinstance(error, Stopped) else _SECONDS_TO_AGREE
    try:
        store.wait(keys, _ANSWER_FROM_MAIN if error is None else timedelta(seconds=seconds))
    except RuntimeError:  # the others wait in the midst of the run, and cannot be reached
        if isinstance(error, Stopped):
            os._exit(signals.REQUEUE)
        print(f"error: process {rank()} of {processes}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    ends = [store.get(key).decode() for key in keys]
    if error is None and (number := next((n for n, end in enumerate(ends) if end), None)) is not None:
        kind, _, text = ends[number].partition(": ")
        if kind == Stopped.__name__:
            raise Stopped(signal.SIGTERM)
        raise UserError(f"process {number} of {processes}: {text if kind == UserError.__name__ else ends[number]}")


def sync_stop_request() -> None:
    """Note a signal that any of the processes has received; all of them must call it, at the same point."""
    received = signals.received()
    if world_size() > 1:
        import torch
        from torch import distributed

        most = torch.tensor(received)
        with _waiting():
            distributed.all_reduce(most, distributed.ReduceOp.MAX)
        received = int(most)
    signals.request_stop(received)
