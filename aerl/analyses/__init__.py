"""Analyses look at a finished evaluation: a function of an AnalysisContext to Results, and figures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from aerl.hardware import Hardware
from aerl.results import ResultLog
from aerl.types import Norm


@dataclass(frozen=True)
class AnalysisContext:
    """What every analysis is given. The rows of `images`, `labels` and `outcomes` are the same samples.

    `model` maps (B, C, H, W) float32 in [0, 1] to logits; `images` are uint8 (n, C, H, W), `labels` int64.
    `outcomes` holds the arrays of outcomes.npz: `index` in the test set, `label`, `clean_pred`, `clean_p` (of
    the label) and, for each attack `a`, `a_pred`, `a_p`, `a_l2`, `a_linf`. `adversarial[a]` are the adversarial
    examples of the first samples, float32 in [0, 1] (k, C, H, W), `attacks[a]` its `norm` and `eps`. Figures go
    into the folder `figures`, numbers into `log`, and what summary.json should say is handed to
    `save(key=value)`. `norm`, `eps` and `seed` are the run's, `batch_size` is how many images to put through the
    model at once.
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
    hardware: Hardware
    batch_size: int
    save: Callable[..., None]
