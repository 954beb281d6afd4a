"""Ending early without losing anything: asked by a signal, a run finishes its step, saves, and leaves.

Where nothing needs to be saved first (before the run, in an attack, in an analysis), a signal ends it on the spot.
A second one of the same kind, a second or more later, ends the process at once, whatever it is doing.

Where a launcher listens to the signal, as submitit does in its Slurm jobs, he is told once everything is saved,
and decides: he requeues the job, or lets it go on until it is killed. The process that waits for joblib's workers
hands a signal on to them, and ends when they have saved.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

log = logging.getLogger("aerl")

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again, and the same command goes on
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
# A launcher and its process group may both hand the same signal on: within this time it is one.
_SECONDS_OF_ONE_SIGNAL = 1.0
_heard: signal.Signals | None = None
_asked: signal.Signals | None = None
_former: dict[int, Any] = {}  # what each signal that is listened to did before, and will do again
_immediate = False  # whether a signal ends the run on the spot
_in_run = False


class Stopped(SystemExit):
    """The run was asked to end, and has saved what it needs to go on; ends the process with code `REQUEUE`, or
    with that of the launcher who ends it."""

    def __init__(self, by: signal.Signals, code: Any = REQUEUE) -> None:
        super().__init__(code)
        self.by = by

    def __str__(self) -> str:
        return f"stopped by {self.by.name}; the same command goes on from here"

    def __reduce__(self) -> tuple[Any, ...]:
        return Stopped, (self.by, self.code)


def install_handlers() -> None:
    """At the start of the process, before anything slow is imported: end it on the spot at a signal, in one line
    and with code `REQUEUE`, until `listening` begins. One that torchrun has started ends with torchrun."""
    global _immediate
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent(signal.SIGKILL)
    for one in _SIGNALS:
        if signal.getsignal(one) is signal.SIG_DFL:
            signal.signal(one, _note)
    _immediate = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_a_second_signal, args=(reader,), daemon=True).start()


def _end_at_a_second_signal(numbers: int) -> None:
    """In a thread: Python's handlers have to wait where the main one is in C, for a library or a file system."""
    first: dict[int, float] = {}
    while byte := os.read(numbers, 1):
        number, now = byte[0], time.monotonic()
        if number in _SIGNALS and now - first.setdefault(number, now) > _SECONDS_OF_ONE_SIGNAL:
            os.write(2, f"ended at once by a second {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)


def _end_with_parent(number: signal.Signals) -> None:
    """On Linux, the kernel sends this signal when the parent has ended, however it ended."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        by_torchrun = parent == 1 and "TORCHELASTIC_RUN_ID" in os.environ
        adopted = by_torchrun and b"torch" not in Path("/proc/1/cmdline").read_bytes()  # which may be torchrun itself
        if adopted or os.getppid() != parent:  # it has ended meanwhile
            os.kill(os.getpid(), number)


@contextmanager
def listening() -> Iterator[None]:
    """Note the signals instead of dying of them, until `raise_if_stopped` or, in between, `stop_immediately`."""
    global _heard, _asked, _immediate, _in_run
    ours = []
    if threading.current_thread() is threading.main_thread():  # None: a library's, beyond Python's reach
        ours = [one for one in _SIGNALS if signal.getsignal(one) not in (signal.SIG_IGN, None, _note)]
    if ours:
        _heard = _asked = None
    elif _immediate and _heard is not None:  # somebody's bare except has swallowed the end of the run
        _stop(_heard)
    for one in ours:
        _former[one] = signal.signal(one, _note)
    before, _immediate, _in_run = _immediate, False, True
    try:
        yield
    finally:
        _immediate, _in_run = before, False
        for one in ours:
            signal.signal(one, _former.pop(one))
        if ours:
            _heard = _asked = None


@contextmanager
def stop_immediately() -> Iterator[None]:
    """Around work that may be lost, because it is repeated to the same end: a signal raises Stopped right there.

    Where a launcher listens to it, it is noted as ever.
    """
    global _immediate
    before, _immediate = _immediate, True
    try:
        if _heard is not None:
            _stop(_heard)
        yield
    finally:
        _immediate = before


def _note(number: int, frame: FrameType | None) -> None:
    global _heard
    again, _heard = _heard == number, signal.Signals(number)
    if callable(launcher := _former.get(number)):
        if again:
            launcher(number, frame)
    elif _immediate:
        _stop(_heard)


def _stop(by: signal.Signals) -> None:
    if callable(_former.get(by)):
        return
    stopped = Stopped(by)
    if not (_in_run or is_worker()) and os.environ.get("RANK", "0") == "0":  # else it is logged
        os.write(2, f"{stopped}\n".encode())
    raise stopped


def is_worker() -> bool:
    """Whether joblib hands jobs of a multirun to this process, one after the other."""
    return multiprocessing.current_process().name.startswith("Loky")


def defer_in_worker() -> None:
    """In a worker process of a multirun: note the signals from now on, also between its jobs.

    One that found nothing to save and killed the worker would make joblib kill the others too. The end of the
    process that waits for the workers is such a signal.
    """
    for one in _SIGNALS:
        if signal.getsignal(one) is not signal.SIG_IGN:
            signal.signal(one, _note)
    _end_with_parent(signal.SIGTERM)


def forward_to_workers() -> None:
    """In the process that waits for such workers: tell them of a signal, and go on waiting."""
    global _immediate
    _immediate = False
    for one in _SIGNALS:
        if signal.getsignal(one) is not signal.SIG_IGN:
            signal.signal(one, _hand_on)


def _hand_on(number: int, frame: FrameType | None) -> None:
    _note(number, frame)
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, number)


def received() -> int:
    """The signal that has come, or 0."""
    return _heard or 0


def request_stop(heard: int) -> None:
    """If a signal was `received`, the run shall save and end. Between two calls `stop_requested` does not change."""
    global _asked
    if heard:
        _asked = signal.Signals(heard)


def stop_requested() -> bool:
    """Whether the run shall save."""
    return _asked is not None


def raise_if_stopped() -> None:
    """To be called where everything is saved: raises Stopped if the run shall end."""
    global _heard, _asked
    if _asked is None:
        return
    by, launcher = _asked, _former.get(_asked, signal.SIG_DFL)
    if launcher is signal.SIG_DFL:
        raise Stopped(by)
    try:
        launcher(by, None)
    except SystemExit as end:
        raise Stopped(by, end.code) from end
    _heard = _asked = None  # he lets the run go on
