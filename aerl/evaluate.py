"""Per-sample outcomes of every attack, their worst case, and confidence intervals."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aerl.attacks import SampleGenerator, attacking
from aerl.data import Split, to_unit
from aerl.hardware import Hardware
from aerl.results import proportion
from aerl.types import UserError

Attack = Callable[..., Tensor | dict[str, Tensor]]
Outcomes = dict[str, np.ndarray]


@dataclass
class Attacked:
    """One attack on all samples: the model's prediction on each adversarial image, and how far it lies.

    pred int64 (N,), l2 and linf float32 (N,) in pixel units of [0, 1]; examples float32 (k, C, H, W),
    the first k adversarial images; seconds of wall time.
    """

    pred: np.ndarray
    l2: np.ndarray
    linf: np.ndarray
    examples: np.ndarray
    seconds: float = 0.0


def predictions(model: nn.Module, split: Split, hardware: Hardware, batch_size: int) -> np.ndarray:
    """The class of the largest logit for every image, int64 (N,); fp32, eval mode."""
    pred = np.empty(len(split), np.int64)
    with attacking(model), torch.no_grad():
        for index in torch.split(torch.arange(len(split)), batch_size):
            x, _ = _batch(split, index, hardware)
            pred[index.numpy()] = model(x).argmax(1).cpu().numpy()
    return pred


def _batch(split: Split, index: Tensor, hardware: Hardware) -> tuple[Tensor, Tensor]:
    x = to_unit(split.images[index].to(hardware.device), hardware.memory_format)
    return x, split.labels[index].to(hardware.device)


def run_attack(
    attack: Attack,
    model: nn.Module,
    split: Split,
    clean_pred: np.ndarray,
    hardware: Hardware,
    *,
    name: str,
    seed: int,
    batch_size: int,
    examples: int = 16,
    progress: Callable[[int, int], None] = lambda attacked, robust: None,
) -> dict[str, Attacked]:
    """Attack every rightly classified sample of `split`; the others are lost already and stay as they are.

    Returns one `Attacked` under `name`, or one per part under `<name>_<part>` if the attack returns a dict.
    `progress(samples attacked, robust ones among them)` is called after every batch. Random starts are
    keyed by the image, so neither the batch size nor the order of samples changes an outcome, except that
    AutoAttack shares its random numbers among the samples of a batch.
    """
    results: dict[str, Attacked] = {}
    to_attack = torch.from_numpy(np.flatnonzero(clean_pred == split.labels.numpy()))
    began = time.monotonic()
    for start in range(0, len(to_attack), batch_size):
        index = to_attack[start : start + batch_size]
        x, y = _batch(split, index, hardware)
        found = attack(model, x, y, generator=SampleGenerator.for_images(x, seed=seed, salt=name))
        robust = torch.ones_like(y, dtype=torch.bool)
        for part, x_adv in (found if isinstance(found, dict) else {"": found}).items():
            key = f"{name}_{part}" if part else name
            if key not in results:
                results[key] = _unattacked(split, clean_pred, examples)
            robust &= _record(results[key], model, x, x_adv, index) == y
        progress(len(y), int(robust.sum()))
    seconds = time.monotonic() - began
    for attacked in results.values():
        attacked.seconds = seconds / len(results)
    return results or {name: _unattacked(split, clean_pred, examples)}


def _unattacked(split: Split, clean_pred: np.ndarray, examples: int) -> Attacked:
    zeros = np.zeros(len(split), np.float32)
    first = to_unit(split.images[:examples], torch.contiguous_format).numpy()
    return Attacked(clean_pred.copy(), zeros, zeros.copy(), first)


def _record(attacked: Attacked, model: nn.Module, x: Tensor, x_adv: Tensor, index: Tensor) -> Tensor:
    """Put one batch of adversarial images where it belongs; returns the model's predictions on it."""
    with attacking(model), torch.no_grad():
        pred: Tensor = model(x_adv).argmax(1)
    delta = (x_adv - x).flatten(1)
    rows = index.numpy()  # NumPy takes a tensor of one index for a number
    attacked.pred[rows] = pred.cpu().numpy()
    attacked.l2[rows] = delta.norm(dim=1).cpu().numpy()
    attacked.linf[rows] = delta.abs().amax(1).cpu().numpy()
    shown = rows < len(attacked.examples)
    attacked.examples[rows[shown]] = x_adv.cpu().numpy()[shown]
    return pred


def setting(attack: Attack, key: str, default: Any) -> Any:
    """A setting of a built attack: of a function's bound keywords, or of an instance."""
    return attack.keywords.get(key, default) if isinstance(attack, partial) else getattr(attack, key, default)


def accuracy(outcomes: Mapping[str, np.ndarray], attacks: Sequence[str] = ()) -> dict[str, float]:
    """Share of samples classified rightly clean and under every one of `attacks`, with its 95 % interval."""
    survived = right(outcomes, attacks)
    return proportion(int(survived.sum()), len(survived))


def attack_names(outcomes: Mapping[str, np.ndarray]) -> list[str]:
    """The attacks that `outcomes` holds, in the order they were run."""
    return [key.removesuffix("_pred") for key in outcomes if key.endswith("_pred") and key != "clean_pred"]


def right(outcomes: Mapping[str, np.ndarray], attacks: Sequence[str]) -> np.ndarray:
    """bool (N,): classified rightly clean and under every one of `attacks`."""
    survived: np.ndarray = outcomes["clean_pred"] == outcomes["label"]
    for name in attacks:
        survived = survived & (outcomes[f"{name}_pred"] == outcomes["label"])
    return survived


def check_within(name: str, attacked: Attacked, norm: str, eps: float) -> None:
    """An attack that left its ball proves nothing: a UserError, with how far it went."""
    reached = float((attacked.l2 if norm == "L2" else attacked.linf).max(initial=0.0))
    if not reached <= eps * (1 + 1e-4) + 1e-6:
        raise UserError(
            f"attack.{name}: left its {norm} ball: a perturbation of {reached:.6g} where eps is {eps:.6g}; "
            "its result is not counted"
        )
