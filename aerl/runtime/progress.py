"""How far a run is: a live bar on a terminal, elsewhere a log line now and then."""

import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aerl.runtime.ddp import is_main
from aerl.runtime.signals import is_worker

log = logging.getLogger("aerl")

_LIVE_SECONDS = 0.2  # between two redrawings of the bar
_LOG_SECONDS = 10.0  # between two log lines


class Bar(tqdm):  # type: ignore[misc]
    """tqdm with more in its postfix, which logs lines where there is no terminal to draw on."""

    monitor_interval = 0  # no thread of tqdm's

    def __init__(self, description: str, total: int, unit: str, start: int) -> None:
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not is_worker()
        self._values: dict[str, Any] = {}
        super().__init__(
            desc=description,
            total=total,
            initial=start,
            unit=unit,
            file=sys.stderr if self._live else io.StringIO(),
            mininterval=_LIVE_SECONDS if self._live else _LOG_SECONDS,
            miniters=1,
            smoothing=0,
            ncols=shutil.get_terminal_size().columns,
            nrows=20,
            leave=False,
            disable=not is_main(),
            bar_format="{desc}: {percentage:.0f} % |{bar:16}| {remaining}  {detail}"
            if self._live
            else "{desc}: {percentage:.0f} %  {detail}",
        )

    def update(self, advance: int = 0, **postfix: Any) -> None:
        """Count `advance` more units; `postfix` (acc=0.97, loss=0.08, epoch="3/40") holds until replaced.

        A number, or a tensor with one, is read only when it is shown, so that a GPU is not waited for at every step;
        names that begin with "acc" are shown in percent.
        """
        self._values.update(postfix)
        super().update(advance)

    @property
    def format_dict(self) -> dict[str, Any]:
        shown: dict[str, Any] = super().format_dict
        rate = (shown["n"] - shown["initial"]) / max(shown["elapsed"], 1e-9)
        words = [f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"]
        return shown | {"detail": "  ".join(words + [f"{name} {_text(name, v)}" for name, v in self._values.items()])}

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self._live:
            super().display(msg, pos)
        elif msg is None and self.n > self.initial:
            log.info(str(self))

    def summary(self) -> str:
        """The line that remains."""
        shown = self.format_dict
        count = f"{self.n:,}" if self.n == self.total else f"stopped at {self.n:,} of {self.total:,}"
        return f"{self.desc}: {count} {self.unit} in {shown['elapsed']:.1f} s  {shown['detail']}"


@contextmanager
def progress(description: str, total: int, unit: str = "images", *, start: int = 0) -> Iterator[Bar]:
    """Show work of `total` units, of which `start` were done by an earlier process, while the block runs."""
    bar = Bar(description, total, unit, start)
    if bar.disable:
        yield bar
        return
    loggers = [logger for logger in (logging.getLogger(), log) if logger.handlers]
    try:
        with logging_redirect_tqdm(loggers) if bar._live else nullcontext():  # above the bar
            yield bar
    finally:
        line = bar.summary()
        bar.close()
        log.info(line)


def _text(name: str, value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    return f"{100 * float(value):.1f} %" if name.startswith("acc") else f"{float(value):.3g}"
