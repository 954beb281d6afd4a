"""Ending early without losing anything: on SIGTERM or SIGUSR1 a run finishes its step, saves, and leaves."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("aerl")

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again, and the same command goes on
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_heard: signal.Signals | None = None
_asked: signal.Signals | None = None


class Stopped(SystemExit):
    """The run was asked to end, and has saved what it needs to go on; ends the process with code `REQUEUE`."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(REQUEUE)
        self.by = by

    def __str__(self) -> str:
        return f"stopped by {self.by.name}; the same command goes on from here"


@contextmanager
def listening() -> Iterator[None]:
    """Note the signals instead of dying of them; a second one of the same kind kills as ever.

    A signal that somebody else listens to, such as a launcher that requeues its jobs, is left to him.
    """
    global _heard, _asked
    _heard = _asked = None
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [one for one in _SIGNALS if signal.getsignal(one) is signal.SIG_DFL]
    for one in ours:
        signal.signal(one, _note)
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = signal.Signals(number)
    signal.signal(number, signal.SIG_DFL)


def heard() -> int:
    """The signal that has come, or 0."""
    return _heard or 0


def heed(heard: int) -> None:
    """If a signal was `heard`, the run shall save and end. Between two calls `asked` does not change."""
    global _asked
    if heard:
        _asked = signal.Signals(heard)


def asked() -> bool:
    """Whether the run shall save and end."""
    return _asked is not None


def check() -> None:
    """To be called where everything is saved: raises Stopped if the run shall end."""
    if _asked is not None:
        raise Stopped(_asked)
