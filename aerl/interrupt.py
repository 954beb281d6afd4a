"""Ending early without losing anything: asked by a signal, a run finishes its step, saves, and leaves.

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
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger("aerl")

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again, and the same command goes on
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_heard: signal.Signals | None = None
_asked: signal.Signals | None = None
_former: dict[int, Any] = {}  # what each signal that is listened to did before, and will do again


class Stopped(SystemExit):
    """The run was asked to end, and has saved what it needs to go on; ends the process with code `REQUEUE`, or
    with that of the launcher who ends it."""

    def __init__(self, by: signal.Signals, code: Any = REQUEUE) -> None:
        super().__init__(code)
        self.by = by

    def __str__(self) -> str:
        return f"stopped by {self.by.name}; the same command goes on from here"


@contextmanager
def listening() -> Iterator[None]:
    """Note the signals instead of dying of them; a second one of the same kind does what it ever did."""
    global _heard, _asked
    ours = []
    if threading.current_thread() is threading.main_thread():  # None: a library's, beyond Python's reach
        ours = [one for one in _SIGNALS if signal.getsignal(one) not in (signal.SIG_IGN, None, _note)]
    if ours:
        _heard = _asked = None
    for one in ours:
        _former[one] = signal.signal(one, _note_once)
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, _former.pop(one))


def _note(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = signal.Signals(number)


def _note_once(number: int, frame: FrameType | None) -> None:
    _note(number, frame)
    signal.signal(number, _former[number])


def is_worker() -> bool:
    """Whether joblib hands jobs of a multirun to this process, one after the other."""
    return multiprocessing.current_process().name.startswith("Loky")


def work() -> None:
    """In a worker process of a multirun: note the signals from now on, also between its jobs.

    One that found nothing to save and killed the worker would make joblib kill the others too. The end of the
    process that waits for the workers is such a signal.
    """
    for one in _SIGNALS:
        signal.signal(one, _note)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def hand_on() -> None:
    """In the process that waits for such workers: tell them of a signal, and go on waiting."""
    for one in _SIGNALS:
        signal.signal(one, _hand_on)


def _hand_on(number: int, frame: FrameType | None) -> None:
    _note(number, frame)
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, number)


def heard() -> int:
    """The signal that has come, or 0."""
    return _heard or 0


def heed(heard: int) -> None:
    """If a signal was `heard`, the run shall save and end. Between two calls `asked` does not change."""
    global _asked
    if heard:
        _asked = signal.Signals(heard)


def asked() -> bool:
    """Whether the run shall save."""
    return _asked is not None


def check() -> None:
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
    signal.signal(by, _note_once)
