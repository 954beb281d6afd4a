"""Stop without losing anything: at a signal, a run finishes its step, saves and exits with code 75.

Where nothing must be saved first (imports, a batch of an attack, an analysis), a signal ends the run at once; a second
one ends the process. A launcher with its own handler (submitit in Slurm jobs) is called when everything is saved: it
requeues the job or lets it continue. The parent of joblib's workers forwards signals to them.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ONE_SIGNAL_SECONDS = 1.0  # a launcher and its process group may both send the same signal


class Stopped(SystemExit):
    """The run was asked to end and has saved its state; `code` is `REQUEUE` or the launcher's exit code."""

    def __init__(self, by: signal.Signals, code: Any = REQUEUE) -> None:
        self.by, self.code = by, code

    def __str__(self) -> str:
        return f"stopped by {self.by.name}; the same command resumes"


@dataclass
class _State:
    """The signals of this process."""

    received: signal.Signals | None = None
    received_at: float = 0.0
    requested: signal.Signals | None = None  # all processes of the run have agreed on this one
    launcher: dict[int, Any] = field(default_factory=dict)  # the handlers that `listening` replaces
    immediate: bool = False  # whether a signal ends the run at once
    in_run: bool = False


_state = _State()


def install_handlers() -> None:
    """At the start of the process: until `listening`, a signal ends it with one line. It also ends with torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGKILL)
    _handle_all(_handle)
    _state.immediate = True


@contextmanager
def listening() -> Iterator[None]:
    """During a run: record signals until `raise_if_stopped` or, in between, `stop_immediately`."""
    before = {n: handler for n in _SIGNALS if (handler := signal.getsignal(n)) is not None}
    _state.launcher = {n: handler for n, handler in before.items() if callable(handler) and handler is not _handle}
    _handle_all(_handle)
    immediate, _state.immediate, _state.in_run = _state.immediate, False, True
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _handle not in before.values():
            _state.received = _state.requested = None
        _state.launcher, _state.immediate, _state.in_run = {}, immediate, False


@contextmanager
def stop_immediately() -> Iterator[None]:
    """Around work that can be repeated: a signal raises Stopped right there, unless a launcher handles it."""
    before, _state.immediate = _state.immediate, True
    try:
        if _state.received is not None:
            _stop(_state.received)
        yield
    finally:
        _state.immediate = before


def received() -> int:
    """The signal that was received, or 0."""
    return _state.received or 0


def request_stop(number: int) -> None:
    """Make the run save and end if `number` is a signal; only this changes `stop_requested`."""
    if number:
        _state.requested = signal.Signals(number)


def stop_requested() -> bool:
    """Whether the run must save."""
    return _state.requested is not None


def raise_if_stopped() -> None:
    """Raise Stopped if the run must end. Call it where everything is saved."""
    if (by := _state.requested) is None:
        return
    if by not in _state.launcher:
        raise Stopped(by)
    try:
        _state.launcher[by](by, None)
    except SystemExit as end:
        raise Stopped(by, end.code) from end
    _state.received = _state.requested = None  # the launcher lets the run continue


def is_worker() -> bool:
    """Whether this process is a worker of joblib, which runs several jobs of a multirun."""
    return multiprocessing.current_process().name.startswith("Loky")


def defer_in_worker() -> None:
    """Record signals from now on, also between jobs: if one killed this worker, joblib would kill the others too."""
    _handle_all(_handle)
    end_with_parent(signal.SIGTERM)


def forward_to_workers() -> None:
    """In the parent of such workers: forward signals to them, and keep waiting for them."""

    def forward(number: int, frame: FrameType | None) -> None:
        _handle(number, frame)
        for worker in multiprocessing.active_children():
            if worker.pid is not None:
                os.kill(worker.pid, number)

    _state.immediate = False
    _handle_all(forward)


def end_with_parent(number: signal.Signals) -> None:
    """On Linux, the kernel sends this signal when the parent has ended, however it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
        # It may have ended already. In a container, process 1 may be torchrun itself.
        if os.getppid() == 1 and number == signal.SIGKILL and b"torch" not in Path("/proc/1/cmdline").read_bytes():
            os._exit(1)


def _handle_all(handler: Any) -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup; a handler of a C library
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    by, now = signal.Signals(number), time.monotonic()
    if _state.received is not by:
        _state.received, _state.received_at = by, now
    elif now - _state.received_at > _ONE_SIGNAL_SECONDS and number not in _state.launcher:
        os._exit(128 + number)
    if _state.immediate:
        _stop(by)


def _stop(by: signal.Signals) -> None:
    if by in _state.launcher:
        return
    stopped = Stopped(by)
    if not (_state.in_run or is_worker()) and os.environ.get("RANK", "0") == "0":  # else it is logged
        os.write(2, f"{stopped}\n".encode())
    raise stopped
