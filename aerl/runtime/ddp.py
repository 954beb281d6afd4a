"""One run on several processes of torchrun, one per GPU.

The processes share every training batch (DistributedDataParallel) and the batches of test images. The first alone
writes, logs and reports. If one dies, torchrun ends the others. torch is imported when they connect, not before.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
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

# How long a process waits for the others: in a collective operation; while the first prepares data or does analyses;
# and if it has failed, for them to fail, too.
_TIMEOUT, _TIMEOUT_OF_MAIN, _TIMEOUT_OF_FAILURE = timedelta(hours=1), timedelta(hours=24), timedelta(seconds=10)

_main_only: ContextVar[bool] = ContextVar("_main_only", default=False)


def rank() -> int:
    """The number of this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if _started_by_torchrun() else 0


def world_size() -> int:
    """The number of processes; 1 without torchrun, and in `main_process_only`."""
    return int(os.environ["WORLD_SIZE"]) if _started_by_torchrun() and not _main_only.get() else 1


def is_main() -> bool:
    """Whether this process writes, logs and reports."""
    return rank() == 0


def prints_errors() -> bool:
    """Whether this process prints an error that all have; until they are connected, each prints its own."""
    return is_main() or not _connected()


@contextmanager
def main_process_only() -> Iterator[None]:
    """Around work of the first process, during which the others wait for the end of the run."""
    token = _main_only.set(True)
    try:
        yield
    finally:
        _main_only.reset(token)


def _started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _connected() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def init_process_group(device: str) -> None:
    """Connect the processes, once for all runs of a multirun; UserError without torchrun. `device`: auto, cpu, cuda."""
    if not _started_by_torchrun():
        raise UserError(
            "hardware.distributed=true: needs a process for each GPU: "
            "torchrun --standalone --nproc-per-node=gpu launch.py hardware=ddp ..."
        )
    if not _connected():
        import torch

        on_gpus = device != "cpu" and torch.cuda.is_available()
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=_TIMEOUT)


def destroy_process_group() -> None:
    """To be called last. The others end after the first, because torchrun ends all as soon as one has failed."""
    if _connected():
        _wait_for([0], "exit")
        sys.modules["torch.distributed"].destroy_process_group()


def _collective(name: str, *arguments: Any) -> None:
    """Call an operation of torch.distributed; Stopped if the others have ended because all were asked to."""
    try:
        getattr(sys.modules["torch.distributed"], name)(*arguments)
    except RuntimeError:
        if signals.received():
            raise Stopped(signal.Signals(signals.received())) from None
        raise


def gather(value: T) -> list[T]:
    """The `value` of each process, in the order of their ranks; all of them must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    _collective("all_gather_object", values, value)
    return values


def total(values: "Tensor") -> "Tensor":
    """The sum over the processes, in place; all of them must call it."""
    if world_size() > 1:
        _collective("all_reduce", values)
    return values


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, or the UserError or Stopped it raises, in all of them."""
    try:
        result: Any = make() if is_main() else None
    except (UserError, Stopped) as error:
        result = error
    result = gather(result)[0]
    if isinstance(result, UserError | Stopped):
        raise result
    return result  # type: ignore[no-any-return]


def broadcast_weights(model: "Module") -> None:
    """Give `model` the parameters and buffers that it has in the first process."""
    if world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            _collective("broadcast", tensor.detach(), 0)


def sync_stop_request() -> None:
    """Request a stop if any process has received a signal; all of them must call it, at the same point."""
    received = signals.received()
    if world_size() > 1:
        import torch

        highest = torch.tensor(received)
        _collective("all_reduce", highest, torch.distributed.ReduceOp.MAX)
        received = int(highest)
    signals.request_stop(received)


def main_first(make: Callable[[], T]) -> T:
    """What `make` returns, in each process its own; the first process calls it before the others, which wait."""
    try:
        if not is_main():
            _wait_for([0], "main first")
        return make()
    finally:
        if is_main():
            _wait_for([0], "main first")


@contextmanager
def end_together() -> Iterator[None]:
    """Around a run. If all processes fail or stop, each raises its exception, and a multirun continues.

    A process that fails alone, while the others wait for it, exits, and torchrun ends them.
    """
    try:
        yield
    except BaseException as error:
        try:
            _wait_for(range(world_size()), "end of run", _TIMEOUT_OF_FAILURE)
        except RuntimeError:
            if isinstance(error, Stopped):
                os._exit(signals.REQUEUE)
            print(f"error: process {rank()} of {world_size()}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        raise
    _wait_for(range(world_size()), "end of run")


def _wait_for(ranks: Iterable[int], place: str, timeout: timedelta = _TIMEOUT_OF_MAIN) -> None:
    """Wait until these processes have come to the same place as this one; RuntimeError after `timeout`."""
    if _connected():
        visit = _store().add(f"{place}: visits of {rank()}", 1)
        _store().set(f"{place} {visit}: {rank()}", "")
        _store().wait([f"{place} {visit}: {other}" for other in ranks], timeout)


@cache
def _store() -> Any:
    """Our own connection to torchrun's store: a long wait on torch's would block NCCL's watchdog."""
    store = sys.modules["torch.distributed"].TCPStore
    return store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def data_parallel(module: "Module") -> "Module":
    """`module` with gradients averaged over the processes, and with the parameters and buffers of the first."""
    if world_size() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(module, find_unused_parameters=True)  # a user's model may have some


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """`folder` itself for the first process; a temporary one for each of the others."""
    if is_main():
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="aerl-") as place:
            yield Path(place)
