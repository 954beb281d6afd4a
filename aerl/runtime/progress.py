"""Progress of long work: a live bar on a terminal, elsewhere a log line every ten seconds, or thirty without news."""

import io
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aerl.runtime.ddp import is_main
from aerl.runtime.signals import is_worker

log = logging.getLogger("aerl")

_SILENCE = 30.0  # seconds


class Bar(tqdm):  # type: ignore[misc]
    """tqdm whose postfix is read only when it is shown, so that a step does not wait for the GPU."""

    monitor_interval = 0  # no thread of tqdm's

    def __init__(self, description: str, total: int, unit: str, start: float) -> None:
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not is_worker()
        self._postfix: dict[str, Any] = {}
        self._logged_at = time.monotonic()
        shown = "{desc}: {percentage:.0f} % " + ("|{bar:16}| {remaining}  " if self.live else " ") + "{details}"
        super().__init__(
            desc=description, total=total, initial=start, unit=f" {unit}", bar_format=shown, leave=False,
            file=sys.stderr if self.live else io.StringIO(), mininterval=0.2 if self.live else 10, miniters=1,
            ncols=shutil.get_terminal_size().columns if self.live else None, nrows=20, smoothing=0,
            disable=not is_main(),
        )  # fmt: skip

    def update(self, advance: float = 0, **postfix: Any) -> None:
        """Count `advance` more units. Each value of `postfix` (acc=0.97, epoch="3/40") is shown until it is replaced.

        A value is a number, a tensor () or text; names that begin with "acc" are shown in percent.
        """
        self._postfix.update(postfix)
        super().update(advance)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.live:
            super().display(msg, pos)
        elif msg is None and self.n > self.initial:
            self._logged_at = time.monotonic()
            log.info(str(self))

    def log_if_silent(self, ended: threading.Event) -> None:
        """Log a line whenever there was none for 30 seconds, such as within a long batch, until `ended`."""
        while not ended.wait(_SILENCE / 30):
            if time.monotonic() - self._logged_at > _SILENCE:
                self._logged_at = time.monotonic()
                log.info(f"{self}  {self.format_dict['elapsed']:.0f} s so far")

    @property
    def format_dict(self) -> dict[str, Any]:
        shown: dict[str, Any] = super().format_dict
        rate = (self.n - self.initial) / max(shown["elapsed"], 1e-9)
        words = [f"{rate:,.0f}{self.unit}/s" if rate >= 10 else f"{rate:.2g}{self.unit}/s"]
        return shown | {"details": "  ".join(words + [f"{name} {_text(name, v)}" for name, v in self._postfix.items()])}


@contextmanager
def progress(description: str, total: int, unit: str = "images", *, start: float = 0) -> Iterator[Bar]:
    """Show the progress of `total` units, `start` of which an earlier process did; log one line at the end."""
    bar, ended = Bar(description, total, unit, start), threading.Event()
    if not (bar.live or bar.disable):
        threading.Thread(target=bar.log_if_silent, args=(ended,), daemon=True).start()
    try:
        loggers = [logger for logger in (logging.getLogger(), log) if logger.handlers and bar.live]
        with logging_redirect_tqdm(loggers):  # prints above the bar
            yield bar
    finally:
        ended.set()
        if not bar.disable:
            done = round(bar.n)  # several stages add shares of a sample
            count = f"{done:,}" if done == total else f"stopped at {done:,} of {total:,}"
            bar.bar_format, bar.ncols = f"{description}: {count}{bar.unit} in {{elapsed_s:.1f}} s  {{details}}", None
            line = str(bar)
            bar.close()
            log.info(line)


def _text(name: str, value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    return f"{100 * float(value):.1f} %" if name.startswith("acc") else f"{float(value):.3g}"
