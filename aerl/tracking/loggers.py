"""Where a run shows its numbers while it goes on, beside its own files: W&B, TensorBoard, CSV files; any or several."""

import csv
import importlib.util
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aerl.config.names import leaves
from aerl.errors import UserError, first_line
from aerl.runtime.files import atomic_write, plain
from aerl.tracking.wandb import Tracker

if TYPE_CHECKING:
    from aerl.config.schema import Config  # pydantic's import is slow, and --help does without it

log = logging.getLogger("aerl")


class Logger(Protocol):
    """What a run tells a logger. No method raises."""

    def history(self, step: int, metrics: Mapping[str, float]) -> None:
        """Values of epoch `step`; a run that resumes gives those of some epochs again."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values, some of them nested."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of numbers, text and None."""

    def pictures(self, name: str, pictures: Sequence[tuple[str, Any]]) -> None:
        """Captioned pictures: paths or arrays (H, W) or (H, W, 3), uint8."""

    def finish(self, exit_code: int) -> None:
        """The end, as failed unless `exit_code` is 0."""


class Loggers:
    """All loggers of a run as one."""

    def __init__(self, *loggers: Logger) -> None:
        self.loggers = loggers

    def history(self, step: int, metrics: Mapping[str, float]) -> None:
        for logger in self.loggers:
            logger.history(step, metrics)

    def summary(self, values: Mapping[str, Any]) -> None:
        for logger in self.loggers:
            logger.summary(values)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        for logger in self.loggers:
            logger.table(name, columns, rows)

    def pictures(self, name: str, pictures: Sequence[tuple[str, Any]]) -> None:
        for logger in self.loggers:
            logger.pictures(name, pictures)

    def finish(self, exit_code: int) -> None:
        for logger in self.loggers:
            logger.finish(exit_code)


class Csv:
    """csv/history.csv, a row for each epoch, and each table as csv/NAME.csv."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "csv"
        self._epochs: dict[int, dict[str, Any]] = {}
        if (path := self.folder / "history.csv").is_file():  # of an earlier start
            with path.open(newline="") as file:
                self._epochs = {int(row["epoch"]): dict(row) for row in csv.DictReader(file)}

    def history(self, step: int, metrics: Mapping[str, float]) -> None:
        self._epochs.setdefault(step, {"epoch": step}).update(metrics)
        columns = list(dict.fromkeys(key for row in self._epochs.values() for key in row))
        rows = [[row.get(key, "") for key in columns] for _, row in sorted(self._epochs.items())]
        self._write("history", columns, rows)

    def summary(self, values: Mapping[str, Any]) -> None:
        """summary.json and the table of the attacks have them."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._write(name.rpartition("/")[2], columns, rows)

    def pictures(self, name: str, pictures: Sequence[tuple[str, Any]]) -> None:
        """figures/ has them."""

    def finish(self, exit_code: int) -> None:
        """Every file is complete."""

    def _write(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        try:
            self.folder.mkdir(exist_ok=True)
            atomic_write(self.folder / f"{name}.csv", text.getvalue())
        except (OSError, UserError) as error:  # results.jsonl has the numbers, or its failure ends the run
            log.warning("logger=csv: %s", first_line(error))


class TensorBoard:
    """tensorboard/ in the run folder: curves, tables as text, pictures, and the run's row among the hyperparameters."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """`config` are the run's settings by dotted keys."""
        self.folder, self._config = folder / "tensorboard", config
        self._writer: Any = None
        self._final: dict[str, float] = {}
        self._stopped = False

    def history(self, step: int, metrics: Mapping[str, float]) -> None:
        self._do(lambda to: [to.add_scalar(name, value, step) for name, value in metrics.items()], step)

    def summary(self, values: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in plain(values).items() if _is_number(value)}
        self._final |= numbers
        self._do(lambda to: [to.add_scalar(name, value) for name, value in numbers.items()])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        cells = [columns, ["---"] * len(columns), *rows]
        lines = (" | ".join("" if cell is None else str(cell).replace("|", "\\|") for cell in row) for row in cells)
        self._do(lambda to: to.add_text(name, "\n".join(f"| {line} |" for line in lines)))

    def pictures(self, name: str, pictures: Sequence[tuple[str, Any]]) -> None:
        import numpy as np
        from PIL import Image

        def add(to: Any) -> None:
            for number, (_, data) in enumerate(pictures):
                image = np.asarray(Image.open(data).convert("RGB")) if isinstance(data, (str, Path)) else data
                to.add_image(name, image, number, dataformats="HWC" if image.ndim == 3 else "HW")

        self._do(add)

    def finish(self, exit_code: int) -> None:
        settings = {key: value for key, value in self._config.items() if isinstance(value, (bool, int, float, str))}
        metrics = {key: value for key, value in self._final.items() if key.startswith("accuracy/")}
        if exit_code == 0:
            self._do(lambda to: to.add_hparams(settings, metrics, run_name="."))
        self._do(lambda to: to.close())

    def _do(self, action: Callable[[Any], object], step: int | None = None) -> None:
        if self._stopped:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # An earlier start may have logged later epochs than this one goes on with.
                self._writer = SummaryWriter(str(self.folder), purge_step=step if self.folder.exists() else None)
            action(self._writer)
            self._writer.flush()
        except Exception as error:
            self._stopped = True
            log.warning("logger=tensorboard stopped (%s): results are in results.jsonl", first_line(error))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check(config: "Config") -> None:
    """UserError if a logger's package is missing."""
    if config.logger.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("logger=tensorboard: needs the package tensorboard; pip install 'aerl[tensorboard]'")


def open_loggers(folder: Path, config: "Config", wandb: Tracker | None) -> Loggers | None:
    """The loggers of a run, beside its W&B run; None without any."""
    loggers: list[Logger] = [] if wandb is None else [wandb]
    if config.logger.csv:
        loggers.append(Csv(folder))
    if config.logger.tensorboard:
        loggers.append(TensorBoard(folder, dict(leaves(config.model_dump(exclude={"logger"})))))
    return Loggers(*loggers) if loggers else None


def log_accuracies(logger: Logger, summary: Mapping[str, Any]) -> None:
    """The closing table of a run, and the numbers by which W&B and TensorBoard sort and plot runs."""
    attacks = summary["attacks"]
    accuracies = {"clean": summary["clean_accuracy"]}
    accuracies |= {name: info["robust_accuracy"] for name, info in attacks.items()}
    for row in (summary.get("worst_case_by_eps") or ())[:-1]:
        accuracies[f"worst case eps {row['eps']:g}"] = row
    if summary["worst_case_accuracy"] is not None:
        accuracies["worst case"] = summary["worst_case_accuracy"]
    logger.summary({f"accuracy/{name.replace(' ', '_')}": value["value"] for name, value in accuracies.items()})
    rows = []
    for name, accuracy in accuracies.items():
        settings = [attacks.get(name, {}).get(key) for key in ("norm", "eps", "seconds")]
        rows.append([name, *settings, *(accuracy[key] for key in ("value", "low", "high", "n"))])
    logger.table("tables/attacks", ["attack", "norm", "eps", "seconds", "accuracy", "low", "high", "n"], rows)
