"""Progress of long work: a live bar on a terminal, elsewhere a log line every ten seconds."""

import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aerl.runtime.ddp import is_main
from aerl.runtime.signals import is_worker

log = logging.getLogger("aerl")


class Bar(tqdm):  # type: ignore[misc]
    """tqdm whose postfix is read only when it is shown, so that a step does not wait for the GPU."""

    monitor_interval = 0  # no thread of tqdm's

    def __init__(self, description: str, total: int, unit: str, start: int) -> None:
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not is_worker()
        self._postfix: dict[str, Any] = {}
        shown = "{desc}: {percentage:.0f} % " + ("|{bar:16}| {remaining}  " if self.live else " ") + "{details}"
        super().__init__(
            desc=description, total=total, initial=start, unit=f" {unit}", bar_format=shown, leave=False,
            file=sys.stderr if self.live else io.StringIO(), mininterval=0.2 if self.live else 10, miniters=1,
            ncols=shutil.get_terminal_size().columns if self.live else None, nrows=20, smoothing=0,
            disable=not is_main(),
        )  # fmt: skip

    def update(self, advance: int = 0, **postfix: Any) -> None:
        """Count `advance` more units. Each value of `postfix` (acc=0.97, epoch="3/40") is shown until it is replaced.

        A value is a number, a tensor () or text; names that begin with "acc" are shown in percent.
        """
        self._postfix.update(postfix)
        super().update(advance)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.live:
            super().display(msg, pos)
        elif msg is None and self.n > self.initial:
            log.info(str(self))

    @property
    def format_dict(self) -> dict[str, Any]:
        shown: dict[str, Any] = super().format_dict
        rate = (self.n - self.initial) / max(shown["elapsed"], 1e-9)
        words = [f"{rate:,.0f}{self.unit}/s" if rate >= 10 else f"{rate:.2g}{self.unit}/s"]
        return shown | {"details": "  ".join(words + [f"{name} {_text(name, v)}" for name, v in self._postfix.items()])}


@contextmanager
def progress(description: str, total: int, unit: str = "images", *, start: int = 0) -> Iterator[Bar]:
    """Show the progress of `total` units, `start` of which an earlier process did; log one line at the end."""
    bar = Bar(description, total, unit, start)
    try:
        loggers = [logger for logger in (logging.getLogger(), log) if logger.handlers and bar.live]
        with logging_redirect_tqdm(loggers):  # prints above the bar
            yield bar
    finally:
        if not bar.disable:
            count = f"{bar.n:,}" if bar.n == total else f"stopped at {bar.n:,} of {total:,}"
            bar.bar_format, bar.ncols = f"{description}: {count}{bar.unit} in {{elapsed_s:.1f}} s  {{details}}", None
            line = str(bar)
            bar.close()
            log.info(line)


def _text(name: str, value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    return f"{100 * float(value):.1f} %" if name.startswith("acc") else f"{float(value):.3g}"
