"""results.jsonl, summary.json and config.yaml of a run folder. Imports neither torch nor wandb."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aerl.errors import UserError
from aerl.runtime.ddp import is_main
from aerl.runtime.files import CHANGED, atomic_write, inside, plain, read_json, read_yaml, sha256, write_json, writing

if TYPE_CHECKING:
    from aerl.tracking.loggers import Logger


@dataclass(frozen=True)
class Result:
    """One measured number, one line of results.jsonl.

    `n` is the number of samples behind `value`, `step` the epoch (None for what is measured once), `eps` in the scale
    [0, 1] of the images. `source` names the model that a transferred attack was made on, or the run that this one is
    compared with. NaN and infinity are stored as null, and null is read back as NaN.
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


_FIELDS = frozenset(field.name for field in fields(Result))


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json of a run folder atomically, with a digest that `read_summary` checks."""
    content = {key: value for key, value in plain(summary).items() if key != "seal"}
    write_json(Path(folder) / "summary.json", {**content, "seal": _digest(content)})


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json of a run folder, or None if there is none; UserError if it was changed or damaged."""
    path = Path(folder) / "summary.json"
    if not path.exists():
        return None
    summary = read_json(inside(Path(folder), path))
    if not isinstance(summary, dict):
        raise UserError(f"cannot read {path}: is not the summary of a run")
    seal = summary.pop("seal", None)
    if (seal is not None or "analyses" in summary) and seal != _digest(summary):  # early versions had no seal
        raise UserError(f"{path}: {CHANGED}")
    return summary


def trainer_of(summary: Mapping[str, Any]) -> str:
    """The trainer of a run's model, which is that of another run if it evaluates one."""
    return str((summary.get("origin") or summary)["trainer"])


def find_runs(folder: Path) -> list[Path]:
    """Every run folder in a folder, itself included, sorted by name."""
    found = (path.parent for path in folder.rglob("summary.json"))
    return sorted(run for run in found if "wandb" not in run.relative_to(folder).parts)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.yaml of a run folder; UserError if it is damaged, or is not the one that summary.json records, which is
    read unless it is given."""
    path = Path(folder) / "config.yaml"
    config = read_yaml(inside(Path(folder), path))
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}: is not a configuration")
    if changed_files(folder, read_summary(folder) or {} if summary is None else summary, ["config.yaml"]):
        raise UserError(f"{path}: {CHANGED}")
    return config


def changed_files(folder: Path, summary: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """The files of a run (of `names`, or all) that are missing or lack the digest in its summary."""
    recorded: Mapping[str, str] = summary.get("files") or {}
    changed = []
    for name in names or recorded:
        with contextlib.suppress(OSError):
            if name not in recorded or sha256(folder / name) == recorded[name]:
                continue
        changed.append(name)
    return changed


def read_results(path: Path) -> list[Result]:
    """Every Result in `path`; a last line that a killed process left incomplete is ignored.

    Raises UserError if the file cannot be read, or if any other line is not a Result.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(_parse(line))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"cannot read {path}: line {number} is not a result ({error})") from error
    return results


def _parse(line: bytes) -> Result:
    """One line as a Result, without the fields of later versions; ValueError or TypeError if it is not a Result."""
    stored = json.loads(line)
    if not isinstance(stored, dict):
        raise ValueError("not an object")
    if stored.get("value", 0) is None:
        stored["value"] = math.nan
    return Result(**{key: value for key, value in stored.items() if key in _FIELDS})


class ResultLog:
    """The results of one run folder: every number goes to results.jsonl, then to the `logger`, if any.

    `identity` has the `run_id`, `seed`, `dataset`, `model` and `trainer` of each line.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], logger: "Logger | None" = None) -> None:
        self.path, self.identity, self.logger = Path(folder) / "results.jsonl", dict(identity), logger

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
        """Store one Result per metric; they are on the disk on return. UserError for a failure of the disk.

        For the logger they are history (`split/metric`) with a `step`, else summary values (`split/attack/metric`).
        """
        rest = {**self.identity, "attack": attack, "norm": norm, "eps": float(eps), "source": source, "step": step}
        results = [Result(metric, float(value), n, split, **rest) for metric, value in metrics.items()]
        with writing(self.path), self.path.open("ab") as file:
            for result in results:
                file.write(json.dumps(plain(asdict(result)), ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if self.logger is not None:
            prefix = split if attack == "none" else f"{split}/{attack}"
            named = {f"{prefix}/{result.metric}": result.value for result in results}
            self.logger.summary(named) if step is None else self.logger.history(step, named)
        return results

    def seal(self) -> dict[str, Any]:
        """The number of `bytes` so far and their `sha256`, for `restore`."""
        return _sealed(self._read())

    def restore(self, seal: Mapping[str, Any] | None) -> None:
        """Go back to a `seal` (None: the beginning) and drop the rest, which a resumed run measures again.

        Raises UserError if the sealed results are missing or were changed.
        """
        if not is_main():  # the folder is temporary
            return
        content = self._read()
        sealed = content[: seal["bytes"] if seal else 0]
        if seal and _sealed(sealed) != seal:
            raise UserError(f"{self.path}: {CHANGED}; restore it, or use overwrite=true to start again")
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
