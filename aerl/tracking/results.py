"""Where a run's numbers go: `results.jsonl` and `summary.json` first, Weights & Biases second.

This module imports neither torch nor wandb.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aerl.runtime.files import atomic_write, inside, read_json, read_yaml, sha256, writing
from aerl.types import UserError

if TYPE_CHECKING:
    from aerl.tracking.wandb import Tracker

_CHANGED = "is not as aerl wrote it: it was changed, or is damaged; restore it"


@dataclass(frozen=True)
class Result:
    """One measured number, one line of results.jsonl.

    `n` is the number of samples behind `value`, `step` the epoch (None for what is measured once),
    `eps` is in the [0, 1] scale of the images, `source` names the model a transferred attack was made on,
    or the run that this one is compared with.
    JSON knows no NaN and no infinity: such a value is written as null, and null is read back as NaN.
    """

    metric: str
    value: float
    n: int
    split: str
    run_id: str
    seed: int
    dataset: str
    model: str
    trainer: str
    attack: str = "none"
    norm: str = ""
    eps: float = 0.0
    source: str = ""
    step: int | None = None


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays become lists, paths text, and what is not finite null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and torch, without importing them
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; a number that is not finite becomes null."""
    atomic_write(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` of a run folder atomically, with a digest of its content that `read_summary` checks."""
    content = {key: value for key, value in plain(summary).items() if key != "seal"}
    write_json(Path(folder) / "summary.json", {**content, "seal": _digest(content)})


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The `summary.json` of a run folder, or None where there is none.

    Raises UserError where it is damaged, or is not as it was written.
    """
    path = Path(folder) / "summary.json"
    if not path.exists():
        return None
    summary = read_json(inside(Path(folder), path))
    if not isinstance(summary, dict):
        raise UserError(f"cannot read {path}: it holds no summary of a run")
    seal = summary.pop("seal", None)
    if (seal is not None or "analyses" in summary) and seal != _digest(summary):  # earlier versions sealed none
        raise UserError(f"{path}: {_CHANGED}")
    return summary


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a run folder; UserError where it is damaged, or is not the one summary.json records."""
    path = Path(folder) / "config.yaml"
    config = read_yaml(inside(Path(folder), path))
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}: it holds no configuration")
    if changed_files(folder, read_summary(folder) or {}, ["config.yaml"]):
        raise UserError(f"{path}: {_CHANGED}")
    return config


def changed_files(folder: Path, summary: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """Which files of a run, of `names` or all, are missing or do not have the digest that its summary records."""
    recorded: Mapping[str, str] = summary.get("files") or {}

    def changed(name: str) -> bool:
        try:
            return sha256(folder / name) != recorded[name]
        except OSError:
            return True

    return [name for name in names or recorded if name in recorded and changed(name)]


_FIELDS = frozenset(field.name for field in fields(Result))


def _parse(line: bytes) -> Result:
    """One line as a Result, without fields of a later version; ValueError or TypeError if it is none."""
    stored = json.loads(line)
    if not isinstance(stored, dict):
        raise ValueError("not an object")
    result = Result(**{key: value for key, value in stored.items() if key in _FIELDS})
    return result if result.value is not None else Result(**{**asdict(result), "value": math.nan})


def read_results(path: Path) -> list[Result]:
    """Every Result in `path`; a last line torn by a killed process is passed over.

    Raises UserError where the file cannot be read, or where any other line is not a Result.
    """
    try:
        *lines, last = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(_parse(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"cannot read {path}: line {number} is not a result ({error})") from error
    with contextlib.suppress(ValueError, TypeError):
        results.append(_parse(last))
    return results


class ResultLog:
    """The results of one run folder: every number goes to results.jsonl, then to the tracker, if any.

    `identity` gives each line its `run_id`, `seed`, `dataset`, `model` and `trainer`. A saved state of the run
    contains the `seal` of its results; `restore` goes back to it.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], tracker: "Tracker | None" = None, *, scratch: bool = False
    ) -> None:
        """`scratch`: of a process whose results nobody reads, and which has none of the earlier starts."""
        self.path = Path(folder) / "results.jsonl"
        self.tracker, self.scratch = tracker, scratch
        self._identity = dict(identity)

    def log(
        self,
        metrics: Mapping[str, float],
        *,
        n: int,
        split: str,
        step: int | None = None,
        attack: str = "none",
        norm: str = "",
        eps: float = 0.0,
        source: str = "",
    ) -> list[Result]:
        """Store one Result per metric, measured on `n` samples of `split`; they are on the disk on return.

        With a `step` (the epoch) they also become W&B history under `split/metric`, without one a value
        of the W&B summary under `split/attack/metric`. Raises UserError where the disk refuses.
        """
        results = [
            Result(metric, float(value), n, split, **self._identity,
                   attack=attack, norm=norm, eps=float(eps), source=source, step=step)
            for metric, value in metrics.items()
        ]  # fmt: skip
        with writing(self.path), self.path.open("ab") as file:
            for result in results:
                file.write(json.dumps(plain(asdict(result)), ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if self.tracker is not None:
            prefix = split if attack == "none" else f"{split}/{attack}"
            named = {f"{prefix}/{result.metric}": result.value for result in results}
            if step is None:
                self.tracker.summary(named)
            else:
                self.tracker.history(step, named)
        return results

    def seal(self) -> dict[str, Any]:
        """What `restore` goes back to: the number of `bytes` so far, and their `sha256`."""
        return _sealed(self._read())

    def restore(self, seal: Mapping[str, Any] | None) -> None:
        """Go back to a `seal` (None: the beginning) and drop what a resumed run will measure again.

        Raises UserError where what it seals is missing or was changed.
        """
        if self.scratch:
            return
        content = self._read()
        sealed = content[: seal["bytes"] if seal else 0]
        if seal and _sealed(sealed) != seal:
            raise UserError(f"{self.path}: {_CHANGED}, or begin the run again with overwrite=true")
        if sealed != content:
            atomic_write(self.path, sealed)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error


def _sealed(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
