"""How far a run is: a live bar on a terminal, now and then a plain line in a file. All of it on stderr."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

from aerl.runtime.ddp import is_main

_LIVE_SECONDS = 0.2  # between two redrawings of the bar
_PLAIN_SECONDS = 10.0  # between two plain lines
label = ""  # before each plain line, where several processes share the terminal, which then has no bar


class Meter:
    """What `progress` yields: count with `update`, as often as convenient; it draws only now and then."""

    def __init__(self, description: str, total: int, unit: str, start: int) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = start
        self._start, self._began = start, time.monotonic()
        self._postfix: dict[str, Any] = {}
        self._bar: Any = None
        self._every = _PLAIN_SECONDS
        self._next = self._began + self._every

    def _attach(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task(self.description, total=self.total, completed=self.done, detail="")
        self._every = _LIVE_SECONDS
        self._next = self._began

    def update(self, advance: int = 0, **postfix: Any) -> None:
        """Count `advance` more units; `postfix` (acc=0.97, loss=0.08, epoch="3/40") is kept until replaced.

        A number, or a tensor holding one, is read only when it is drawn, so that a GPU is not waited for
        at every step; names that begin with "acc" are shown in percent.
        """
        self.done += advance
        self._postfix.update(postfix)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every
            self._draw()

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, detail=self._detail())
        else:
            share = f"{100 * self.done / self.total:.0f} %" if self.total else f"{self.done:,}"
            _tell(f"{self.description}: {share}  {self._detail()}")

    def _detail(self) -> str:
        rate = (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)
        shown = [f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"]
        return "  ".join(shown + [f"{name} {_number(name, value)}" for name, value in self._postfix.items()])

    def _closing(self) -> str:
        count = f"{self.done:,}" if self.done == self.total else f"stopped at {self.done:,} of {self.total:,}"
        seconds = time.monotonic() - self._began
        return f"{self.description}: {count} {self.unit} in {seconds:.1f} s  {self._detail()}"


@contextlib.contextmanager
def progress(description: str, total: int, unit: str = "images", *, start: int = 0) -> Iterator[Meter]:
    """Show work of `total` units, of which `start` were done by an earlier process, while the block runs.

    On a terminal: one bar with rate, time left and whatever `Meter.update` was told, replaced by one line
    at the end; a training of many epochs is one bar whose `epoch` is a postfix. Elsewhere: plain lines,
    one in ten seconds at the most, and the same last line.
    """
    meter = Meter(description, total, unit, start)
    if not is_main():
        meter._next = math.inf
        yield meter
        return
    try:
        with _bar(meter) if _live() else contextlib.nullcontext():
            yield meter
    finally:
        _tell(meter._closing())


def _tell(line: str) -> None:
    print(label + line, file=sys.stderr, flush=True)


def _number(name: str, value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    return f"{100 * float(value):.1f} %" if name.startswith("acc") else f"{float(value):.3g}"


def _live() -> bool:
    """Whether stderr is a terminal that can redraw a line. Rich alone would believe FORCE_COLOR in CI."""
    from rich.console import Console

    return not label and sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal


@contextlib.contextmanager
def _bar(meter: Meter) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=5,
        redirect_stdout=sys.stdout.isatty(),  # what is printed into a file must reach the file
    )
    meter._attach(bar)
    terminal = [sys.stdout, sys.stderr]  # as they are before the bar puts itself in their place
    with bar, _above_the_bar(terminal):
        yield


@contextlib.contextmanager
def _above_the_bar(terminal: list[Any]) -> Iterator[None]:
    """Send log lines bound for the terminal through the bar's stderr, which prints them above the bar."""
    handlers = [
        handler
        for logger in (logging.getLogger(), logging.getLogger("aerl"))
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in terminal and handler.stream.isatty()
    ]
    streams = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
