"""Per-sample outcomes of every attack, accuracies with confidence intervals, and the worst case."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aerl.data import Split, to_unit
from aerl.errors import UserError
from aerl.evaluation.statistics import Policy, proportion, reward, right
from aerl.types import ORDERS

DISTANCES = tuple(norm.lower() for norm in ORDERS)
Outcomes = dict[str, np.ndarray]  # outcomes.npz: index, label, clean_pred, ..., <attack>_pred, ...


@dataclass(frozen=True)
class Batch:
    """The outcome of one attack on the samples `rows` (b,).

    values: arrays (b,), as in `Attacked.samples`.
    kept, images: the samples (k,) whose images float32 (k, C, H, W) are kept: examples and evidence.
    outside: how far any pixel left [0, 1].
    """

    rows: np.ndarray
    values: Outcomes
    kept: np.ndarray
    images: np.ndarray
    outside: float


@dataclass
class Attacked:
    """The outcome of one attack, or of none, on all samples.

    samples: arrays (N,). `pred` int64, the class of the largest logit, -1 if a logit is not finite; float32 each
        metric, and `l1`, `l2` and `linf`, the perturbation in units of the images' range. Of a randomised model `pred`
        is the most frequent class of several passes, each metric its mean, and `right` the share of passes that are
        right.
    examples: float32 (k, C, H, W), the first k images as attacked.
    outside: how far any pixel left [0, 1].
    seconds: wall time.
    """

    samples: Outcomes
    examples: np.ndarray
    outside: float = 0.0
    seconds: float = 0.0

    @classmethod
    def blank(cls, split: Split, metrics: Iterable[str], examples: int) -> "Attacked":
        """Nothing measured yet; `examples` of the clean images."""
        n = len(split)
        samples = {name: np.zeros(n, np.float32) for name in (*metrics, *DISTANCES)}
        return cls({"pred": np.zeros(n, np.int64), **samples}, to_unit(split.images[:examples]).numpy())

    @property
    def pred(self) -> np.ndarray:
        return self.samples["pred"]

    def standing(self, labels: np.ndarray) -> np.ndarray:
        """bool (N,): classified correctly; by a randomised model in any of its passes, so that attacks go on."""
        still: np.ndarray = self.samples["right"] > 0 if "right" in self.samples else self.pred == labels
        return still

    def columns(self, attack: str) -> Outcomes:
        """The arrays of outcomes.npz: `<attack>_pred`, ...; of the clean images no distances."""
        keys = [key for key in self.samples if attack != "clean" or key not in DISTANCES]
        return {f"{attack}_{key}": self.samples[key] for key in keys}

    def record(self, batch: "Batch") -> None:
        for key, column in batch.values.items():
            self.samples[key][batch.rows] = column
        shown = batch.kept < len(self.examples)
        self.examples[batch.kept[shown]] = batch.images[shown]
        self.outside = max(self.outside, batch.outside)


def accuracy(
    outcomes: Mapping[str, np.ndarray], attacks: Sequence[str] = (), policy: Policy = "argmax"
) -> dict[str, float]:
    """Mean reward clean and under the worst, per sample, of `attacks`, with its 95 % interval."""
    rewards = reward(outcomes, attacks, policy)
    return proportion(float(rewards.sum()), len(rewards))


def within_eps(attacks: Mapping[str, Mapping[str, Any]], names: Iterable[str], eps: float) -> list[str]:
    """The `names` of the attacks whose eps is not larger: what they fool is fooled at `eps`, too."""
    return [name for name in names if attacks[name]["eps"] <= eps * (1 + 1e-6)]


def so_far(outcomes: Mapping[str, np.ndarray], clean: Attacked, attacks: Sequence[str]) -> Attacked:
    """Every sample under the first of `attacks` that fooled it, or else unperturbed."""
    state, survived = copy.deepcopy(clean), right(outcomes)
    for name in attacks:
        fooled = survived & (outcomes[f"{name}_pred"] != outcomes["label"])
        for key, values in state.samples.items():
            values[fooled] = outcomes[f"{name}_{key}"][fooled]
        survived &= ~fooled
    return state


def check_within(name: str, attacked: Attacked, norm: str, eps: float, boxed: bool = True) -> None:
    """UserError if an attack left its ball or, with `boxed`, [0, 1]: its outcomes then prove nothing."""
    size = float(attacked.samples[norm.lower()].max(initial=0.0))
    if not size <= eps * (1 + 1e-4) + 1e-6:
        raise UserError(f"attack.{name}: left its {norm} ball: perturbation of {size:.6g}, eps={eps:.6g}")
    if boxed and not attacked.outside <= 1e-6:
        raise UserError(f"attack.{name}: left the box: a pixel is {attacked.outside:.6g} outside [0, 1]")
