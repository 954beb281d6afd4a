"""Analyses look at a finished evaluation: a function of an AnalysisContext to Results, and figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aerl.data import Split, subset
from aerl.evaluation.outcomes import right
from aerl.report import figures
from aerl.runtime.device import Hardware
from aerl.runtime.files import write_csv
from aerl.tracking.results import ResultLog, read_summary
from aerl.types import Norm, UserError


class NotMade(UserError):
    """An analysis has nothing to look at; the run says so and goes on to the next one."""


@dataclass(frozen=True)
class AnalysisContext:
    """What every analysis is given. The rows of `images`, `labels` and `outcomes` are the same samples.

    `model` maps (B, C, H, W) float32 in [0, 1] to logits; `images` are uint8 (n, C, H, W), `labels` int64.
    `outcomes` holds the arrays of outcomes.npz: `index` in the test set, `label`, `clean_pred`, `clean_p` (of
    the label), `clean_confidence`, `clean_entropy` (bits) and, for each attack `a`, `a_pred`, `a_p`,
    `a_confidence`, `a_entropy`, `a_l2`, `a_linf`. `adversarial[a]` are the adversarial
    examples of the first samples, float32 in [0, 1] (k, C, H, W), `attacks[a]` its `norm` and `eps`. Figures go
    into the folder `figures`, numbers into `log`, and what summary.json should say is handed to
    `save(key=value)`. `norm`, `eps` and `seed` are the run's, `trainer` is the one that trained the model (its
    figures have that trainer's colour), `batch_size` is how many images to put through the model at once.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    outcomes: Mapping[str, npt.NDArray[np.generic]]
    adversarial: Mapping[str, Tensor]
    attacks: Mapping[str, Mapping[str, Any]]
    figures: Path
    log: ResultLog
    norm: Norm
    eps: float
    seed: int
    trainer: str
    hardware: Hardware
    batch_size: int
    save: Callable[..., None]

    def right(self, samples: int) -> Split:
        """Up to `samples` images that are classified rightly, always the same ones; NotMade if there is none."""
        rows = torch.from_numpy(right(self.outcomes)).nonzero().squeeze(1)
        if len(rows) == 0:
            raise NotMade("no sample is classified rightly")
        return subset(Split(self.images[rows], self.labels[rows]), samples)

    def attacked(self, attack: str) -> npt.NDArray[np.bool_]:
        """bool (n,): the samples that `attack` worked on, those right before it: clean, or after earlier attacks."""
        before = [] if self.attacks[attack].get("alone", True) else takewhile(lambda a: a != attack, self.attacks)
        return right(self.outcomes, [name for name in before if self.attacks[name].get("counts", True)])

    def draw(self, name: str, figure: Any, caption: str) -> None:
        """Write a matplotlib Figure as `name` into the folder of figures (PNG and PDF), and show it to W&B."""
        path = figures.save(figure, self.figures, name, caption)
        if self.log.tracker is not None:
            self.log.tracker.pictures(f"figures/{name}", [(caption, path)])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write tables/`name`.csv into the run folder, and show the table to W&B."""
        folder = self.log.path.with_name("tables")
        folder.mkdir(exist_ok=True)
        write_csv(folder / f"{name}.csv", columns, rows)
        if self.log.tracker is not None:
            self.log.tracker.table(f"tables/{name}", columns, rows)


def class_name(names: Sequence[str], predicted: int) -> str:
    """The name of a predicted class: also of none, -1 (see `aerl.attacks.predictions`), and of those beyond `names`."""
    return "not finite" if predicted < 0 else names[predicted] if predicted < len(names) else str(predicted)


@dataclass(frozen=True)
class Subject:
    """A model in a figure: under which name, in whose colour."""

    name: str
    trainer: str
    model: nn.Module


@dataclass(frozen=True, kw_only=True)
class Beside:
    """An analysis that shows other runs beside this one: their folders are `runs`, of the same dataset.

    Raises UserError when it is made if one of them cannot be loaded, before anything is computed.
    """

    runs: list[str] = field(default_factory=list)
    load: Callable[..., Mapping[str, nn.Module]]

    def __post_init__(self) -> None:
        self._others  # noqa: B018

    @cached_property
    def _others(self) -> list[Subject]:
        models = self.load(self.runs, key="runs")
        trainers = [str((read_summary(Path(run).expanduser()) or {}).get("trainer", "none")) for run in self.runs]
        named = zip(models.items(), trainers, strict=True)
        return [Subject(name, trainer, model) for (name, model), trainer in named]

    def subjects(self, context: AnalysisContext) -> list[Subject]:
        """This run's model, then the others."""
        own = f"{context.trainer} (this run)" if self.runs else context.trainer
        return [Subject(own, context.trainer, context.model), *self._others]
