"""Ending early without losing anything: at a signal, a run finishes its step, saves, and exits with code 75.

Where nothing needs to be saved first (before the run, in an attack, in an analysis), a signal ends it at once. A second
one of the same kind, a second or more later, ends the process whatever it is doing.

A launcher that handles the signal itself, as submitit does in its Slurm jobs, is called once everything is saved, and
decides: it requeues the job, or lets it continue. The process that waits for joblib's workers forwards signals to them.
"""

import ctypes
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

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_ONE_SIGNAL_SECONDS = 1.0  # a launcher and its process group may both pass the same signal on


class Stopped(SystemExit):
    """The run was asked to end, and has saved what it needs to resume; the exit code is `REQUEUE` or the launcher's."""

    def __init__(self, by: signal.Signals, code: Any = REQUEUE) -> None:
        super().__init__(code)
        self.by = by

    def __str__(self) -> str:
        return f"stopped by {self.by.name}; the same command goes on from here"

    def __reduce__(self) -> tuple[Any, ...]:
        return Stopped, (self.by, self.code)


class _Signals:
    """The signals of this process. Python has one handler for each, so there is one object, below."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._requested: signal.Signals | None = None  # what all processes of the run have agreed on
        self._previous: dict[int, Any] = {}  # handlers from before `listening`
        self._immediate = False  # whether a signal ends the run at once
        self._in_run = False

    def install_handlers(self) -> None:
        """At the start of the process, before slow imports: until `listening`, a signal ends it at once with one line.

        A process that torchrun has started ends with torchrun.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _end_with_parent(signal.SIGKILL)
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._handle)
        self._immediate = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_exit_at_second_signal, args=(reader,), daemon=True).start()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals until `raise_if_stopped` or, in between, `stop_immediately`."""
        ours = []
        if threading.current_thread() is threading.main_thread():  # None: a library's handler, beyond Python's reach
            ours = [n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None, self._handle)]
        if ours:
            self._received = self._requested = None
        elif self._immediate and self._received is not None:  # somebody's bare except has swallowed the end of the run
            self._stop(self._received)
        for number in ours:
            self._previous[number] = signal.signal(number, self._handle)
        before, self._immediate, self._in_run = self._immediate, False, True
        try:
            yield
        finally:
            self._immediate, self._in_run = before, False
            for number in ours:
                signal.signal(number, self._previous.pop(number))
            if ours:
                self._received = self._requested = None

    @contextmanager
    def stop_immediately(self) -> Iterator[None]:
        """Around work that may be lost because it can be repeated: a signal raises Stopped right there.

        Where a launcher handles the signal, it is only noted.
        """
        before, self._immediate = self._immediate, True
        try:
            if self._received is not None:
                self._stop(self._received)
            yield
        finally:
            self._immediate = before

    def received(self) -> int:
        """The signal that has come, or 0."""
        return self._received or 0

    def request_stop(self, number: int) -> None:
        """Make the run save and end, if `number` is a signal. Only this changes `stop_requested`."""
        if number:
            self._requested = signal.Signals(number)

    def stop_requested(self) -> bool:
        """Whether the run must save."""
        return self._requested is not None

    def raise_if_stopped(self) -> None:
        """Raise Stopped if the run must end. Call it where everything is saved."""
        if self._requested is None:
            return
        launcher = self._previous.get(self._requested, signal.SIG_DFL)
        if launcher is signal.SIG_DFL:
            raise Stopped(self._requested)
        try:
            launcher(self._requested, None)
        except SystemExit as end:
            raise Stopped(self._requested, end.code) from end
        self._received = self._requested = None  # the launcher lets the run continue

    def defer_in_worker(self) -> None:
        """In a worker process of a multirun: note signals from now on, also between its jobs.

        A signal that killed the worker would make joblib kill the others too. The end of the parent is such a signal.
        """
        self._handle_all(self._handle)
        _end_with_parent(signal.SIGTERM)

    def forward_to_workers(self) -> None:
        """In the process that waits for such workers: forward signals to them, and keep waiting."""

        def forward(number: int, frame: FrameType | None) -> None:
            self._handle(number, frame)
            for worker in multiprocessing.active_children():
                if worker.pid is not None:
                    os.kill(worker.pid, number)

        self._immediate = False
        self._handle_all(forward)

    def _handle_all(self, handler: Any) -> None:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._received = self._received == number, signal.Signals(number)
        if callable(launcher := self._previous.get(number)):
            if again:
                launcher(number, frame)
        elif self._immediate:
            self._stop(self._received)

    def _stop(self, by: signal.Signals) -> None:
        if callable(self._previous.get(by)):
            return
        stopped = Stopped(by)
        if not (self._in_run or is_worker()) and os.environ.get("RANK", "0") == "0":  # else it is logged
            os.write(2, f"{stopped}\n".encode())
        raise stopped


def is_worker() -> bool:
    """Whether joblib gives jobs of a multirun to this process, one after the other."""
    return multiprocessing.current_process().name.startswith("Loky")


def _exit_at_second_signal(numbers: int) -> None:
    """In a thread: Python's handlers wait while the main one is in C, in a library or a file system."""
    first: dict[int, float] = {}
    while byte := os.read(numbers, 1):
        number, now = byte[0], time.monotonic()
        if number in _SIGNALS and now - first.setdefault(number, now) > _ONE_SIGNAL_SECONDS:
            os.write(2, f"ended at once by a second {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)


def _end_with_parent(number: signal.Signals) -> None:
    """On Linux, the kernel sends this signal when the parent has ended, however it ended."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        by_torchrun = parent == 1 and "TORCHELASTIC_RUN_ID" in os.environ
        orphaned = by_torchrun and b"torch" not in Path("/proc/1/cmdline").read_bytes()  # 1 may be torchrun itself
        if orphaned or os.getppid() != parent:  # it has ended meanwhile
            os.kill(os.getpid(), number)


_signals = _Signals()
install_handlers = _signals.install_handlers
listening = _signals.listening
stop_immediately = _signals.stop_immediately
received = _signals.received
request_stop = _signals.request_stop
stop_requested = _signals.stop_requested
raise_if_stopped = _signals.raise_if_stopped
defer_in_worker = _signals.defer_in_worker
forward_to_workers = _signals.forward_to_workers
