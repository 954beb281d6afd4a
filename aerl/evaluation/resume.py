"""An attack in progress: progress.npz in the run folder, from which the same command resumes it."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aerl.errors import UserError
from aerl.evaluation.outcomes import Attacked, Outcomes
from aerl.runtime import signals
from aerl.runtime.files import load_arrays, save_arrays

log = logging.getLogger("aerl")

_SECONDS_BETWEEN_SAVES = 2.0
_FILE = "progress.npz"


@dataclass
class Stage:
    """An attack between two batches: all that is needed to reach the same outcomes.

    `todo` bool (N,) are the samples of this stage, `done` those already attacked; `parts` are the outcomes so far, in
    all stages, by the names of the attack's parts.
    """

    number: int
    todo: np.ndarray
    done: np.ndarray
    seconds: float = 0.0
    parts: dict[str, Attacked] = field(default_factory=dict)

    def robust(self, labels: np.ndarray) -> np.ndarray:
        """bool (N,): the samples of the stage that every part has left correct."""
        still: np.ndarray = np.logical_and.reduce([self.todo, *(part.standing(labels) for part in self.parts.values())])
        return still

    def next(self, labels: np.ndarray) -> "Stage":
        """The stage after this one, of the samples that are still correct."""
        return Stage(self.number + 1, self.robust(labels), np.zeros_like(self.done), self.seconds, self.parts)


class Saver:
    """Saves the state of an attack, and its list of `warnings`, every two seconds and when the run must stop."""

    def __init__(self, folder: Path, name: str, warnings: Sequence[str]) -> None:
        self.path, self.name, self.warnings = folder / _FILE, name, warnings
        self.saved_at = time.monotonic()

    def __call__(self, stage: Stage) -> None:
        """Raises Stopped where the run must stop, after saving."""
        if time.monotonic() - self.saved_at < _SECONDS_BETWEEN_SAVES and not signals.stop_requested():
            return
        arrays: Outcomes = {key: np.asarray(getattr(stage, key)) for key in ("number", "todo", "done", "seconds")}
        arrays |= {"attack": np.asarray(self.name), "warnings": np.asarray(list(self.warnings), dtype=np.str_)}
        for part, found in stage.parts.items():
            arrays |= {f"{part}/examples": found.examples, f"{part}/outside": np.asarray(found.outside)}
            arrays |= {f"{part}/samples/{key}": values for key, values in found.samples.items()}
        save_arrays(self.path, arrays)
        self.saved_at = time.monotonic()
        signals.raise_if_stopped()


def interrupted(folder: Path, name: str) -> tuple[Stage | None, list[str]]:
    """The saved state of the attack `name`, and its warnings; a damaged one is logged, and the attack starts again."""
    try:
        arrays = load_arrays(folder / _FILE)
    except UserError as error:
        log.warning("%s; %s starts again", error, name)
        return None, []
    if str(arrays.get("attack")) != name:
        return None, []
    parts = {}
    for part in dict.fromkeys(key.partition("/")[0] for key in arrays if "/" in key):
        prefix = f"{part}/samples/"
        samples = {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}
        parts[part] = Attacked(samples, arrays[f"{part}/examples"], float(arrays[f"{part}/outside"]))
    stage = Stage(int(arrays["number"]), arrays["todo"], arrays["done"], float(arrays["seconds"]), parts)
    return stage, [str(warning) for warning in arrays["warnings"]]


def finished(folder: Path) -> None:
    (folder / _FILE).unlink(missing_ok=True)
