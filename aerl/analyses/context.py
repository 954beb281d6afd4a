"""The input of an analysis: an AnalysisContext, and the models of other runs to show next to this run's."""

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

from aerl.attacks import AttackSpec
from aerl.data import Split, subset
from aerl.errors import UserError
from aerl.evaluation.statistics import right
from aerl.report import figures
from aerl.runtime.device import Hardware
from aerl.runtime.files import write_csv
from aerl.tracking.results import ResultLog, read_summary
from aerl.types import Norm


class NotMade(UserError):
    """There is nothing to show; the run logs the reason and continues with the next analysis."""


@dataclass(frozen=True)
class AnalysisContext:
    """The input of every analysis. The rows of `images`, `labels` and `outcomes` are the same samples.

    model: maps (B, C, H, W) float32 in [0, 1] to logits.
    images, labels: uint8 (n, C, H, W), or float32 in [0, 1], and int64 (n,); see `aerl.data.to_unit`.
    outcomes: the arrays of outcomes.npz: `index` in the test set, `label`, `clean_pred`, `clean_p` (of the label),
        `clean_confidence`, `clean_entropy` (bits) and, for each attack `a`, `a_pred`, `a_p`, `a_confidence`,
        `a_entropy`, `a_l1`, `a_l2`, `a_linf`.
    adversarial: by attack, the adversarial examples of the first k samples, float32 (k, C, H, W) in [0, 1].
    attacks: by attack, its entry in summary.json, with `norm` and `eps`.
    specs: the attacks themselves, by their names in the configuration.
    figures, log, save: where figures go, where Results go, and `save(key=value)` for summary.json.
    norm, eps, seed: of the run. trainer: the one that trained the model; it determines the colour.
    batch_size: how many images the model may get at once.
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
    specs: Mapping[str, AttackSpec] = field(default_factory=dict)

    @property
    def this_run(self) -> str:
        """Its name next to other runs."""
        return f"{self.trainer} (this run)"

    def right(self, samples: int) -> Split:
        """Up to `samples` correctly classified images, always the same ones; NotMade if there are none."""
        rows = torch.from_numpy(right(self.outcomes)).nonzero().squeeze(1)
        if len(rows) == 0:
            raise NotMade("no sample is classified correctly")
        return subset(Split(self.images[rows], self.labels[rows]), samples)

    def attacked(self, attack: str) -> npt.NDArray[np.bool_]:
        """bool (n,): the samples that `attack` got, correct when clean or, if so run, also under earlier attacks."""
        before = [] if self.attacks[attack].get("alone", True) else takewhile(lambda a: a != attack, self.attacks)
        return right(self.outcomes, [name for name in before if self.attacks[name].get("counts", True)])

    def draw(self, name: str, figure: Any, caption: str) -> None:
        """Write a matplotlib Figure as figures/`name`.png and .pdf, and show it in the loggers."""
        path = figures.save(figure, self.figures, name, caption)
        if self.log.logger is not None:
            self.log.logger.pictures(f"figures/{name}", [(caption, path)])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write tables/`name`.csv into the run folder, and show the table in the loggers."""
        folder = self.log.path.with_name("tables")
        folder.mkdir(exist_ok=True)
        write_csv(folder / f"{name}.csv", columns, rows)
        if self.log.logger is not None:
            self.log.logger.table(f"tables/{name}", columns, rows)


def class_name(names: Sequence[str], predicted: int) -> str:
    """The name of a predicted class, which may be -1 (see `aerl.attacks.predictions`) or beyond `names`."""
    return "not finite" if predicted < 0 else names[predicted] if predicted < len(names) else str(predicted)


@dataclass(frozen=True)
class Subject:
    """A model in a figure; its `trainer` determines the colour."""

    name: str
    trainer: str
    model: nn.Module


@dataclass(frozen=True, kw_only=True)
class Beside:
    """An analysis that uses the models of other `runs` of the same dataset.

    The constructor raises UserError if one of them cannot be loaded, before anything is computed.
    """

    runs: list[str] = field(default_factory=list)
    load: Callable[..., Mapping[str, nn.Module]]

    def __post_init__(self) -> None:
        self.others  # noqa: B018

    @cached_property
    def others(self) -> list[Subject]:
        models = self.load(self.runs, key="runs")
        trainers = [str((read_summary(Path(run).expanduser()) or {}).get("trainer", "none")) for run in self.runs]
        named = zip(models.items(), trainers, strict=True)
        return [Subject(name, trainer, model) for (name, model), trainer in named]

    def subjects(self, context: AnalysisContext) -> list[Subject]:
        """This run's model, then the others."""
        own = context.this_run if self.runs else context.trainer
        return [Subject(own, context.trainer, context.model), *self.others]
