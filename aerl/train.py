"""One loop trains everything: supervised or policy gradient, with or without an adversary."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl import checkpoint
from aerl.attacks import BatchGenerator, evaluating
from aerl.attacks.losses import kl
from aerl.data import Batches, DataSplits, to_unit
from aerl.hardware import Hardware, seed_from, stream
from aerl.objectives import policy_loss, reward
from aerl.report.progress import progress
from aerl.results import ResultLog
from aerl.types import UserError

log = logging.getLogger("aerl")

Act = Callable[[Tensor, Tensor, torch.Generator], Tensor]
Attack = Callable[..., Tensor]

# Written no more often than this: an epoch of a small dataset takes less time than its checkpoint.
_SECONDS_BETWEEN_CHECKPOINTS = 10.0


@dataclass(frozen=True)
class Adversary:
    """Adversarial examples in the training loss, from `start_epoch` on.

    objective: "added", `weight` times the policy loss on them beside the clean one; "alone", the policy loss
    on them in place of the clean one (Madry et al. 2018, equation 2.1); "kl", `weight` times KL(clean
    prediction || prediction on them) beside the clean loss (TRADES, Zhang et al. 2019, equation 5).
    """

    attack: Attack
    weight: float
    start_epoch: int
    objective: Literal["added", "alone", "kl"] = "added"


@dataclass(frozen=True)
class Recipe:
    """A trainer, built. `optimizer` takes the parameters; `augment` takes (images, generator)."""

    epochs: int
    batch_size: int
    optimizer: Callable[..., torch.optim.Optimizer]
    act: Act
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    clip: float | None = None
    probability_floor: float = 0.0
    adversary: Adversary | None = None
    select: str = "val_accuracy"
    augment: Callable[[Tensor, torch.Generator], Tensor] = lambda images, generator: images


@dataclass(frozen=True)
class Step:
    """What one training step computed: the loss to descend, and sums over the batch to report."""

    loss: Tensor
    reward: Tensor
    correct: Tensor
    adversarial_loss: Tensor


def train_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    act: Act,
    generator: torch.Generator,
    *,
    adversary: Adversary | None = None,
    bare_model: nn.Module | None = None,
    probability_floor: float = 0.0,
) -> Step:
    """The loss of one batch: x (B, C, H, W) in [0, 1], y (B,). One action is drawn per forward pass.

    The adversary attacks `bare_model` (`model` without wrappers) in eval mode with frozen parameters.
    """
    if adversary is not None:
        x_adv = adversary.attack(bare_model or model, x, y, generator=BatchGenerator(generator))
        if adversary.objective == "alone":
            x, adversary = x_adv, None
    logits = model(x)
    actions = act(logits.detach(), y, generator)
    loss = policy_loss(logits, y, actions, probability_floor).mean()
    adversarial_loss = torch.zeros((), device=x.device)
    if adversary is not None:
        z = model(x_adv)
        if adversary.objective == "kl":
            adversarial_loss = kl(z, logits).mean()
        else:
            adversarial_loss = policy_loss(z, y, act(z.detach(), y, generator), probability_floor).mean()
        loss = loss + adversary.weight * adversarial_loss
    return Step(
        loss,
        reward=reward(y, actions).mean().detach(),
        correct=(logits.argmax(1) == y).float().mean().detach(),
        adversarial_loss=adversarial_loss.detach(),
    )


def learning_rate(step: int, steps: int, schedule: str, warmup: float) -> float:
    """The factor on the base rate at `step` of `steps`: linear warm-up from 0, then constant or down to 0."""
    warm = round(warmup * steps)
    if step < warm:
        return step / warm
    remaining = 1 - (step - warm) / max(1, steps - warm)
    if schedule == "linear":
        return remaining
    return 0.5 * (1 + math.cos(math.pi * (1 - remaining))) if schedule == "cosine" else 1.0


def fit(
    model: nn.Module,
    data: DataSplits,
    recipe: Recipe,
    hardware: Hardware,
    *,
    seed: int,
    folder: Path,
    results: ResultLog,
) -> int:
    """Train `model` in place, from `folder`/last.pt on if there is one; leave last.pt and best.pt.

    Every epoch's random streams follow from (seed, epoch) alone, so a resumed run continues bit for bit.
    Returns the epoch that best.pt is from. Raises UserError, naming the epoch and the step, when the
    loss is not finite: the checkpoints of the epochs before stay.
    """
    device = hardware.device
    wrapped: nn.Module = torch.compile(model) if hardware.compile else model  # type: ignore[assignment]
    optimizer = recipe.optimizer(model.parameters())
    base_rates = [group["lr"] for group in optimizer.param_groups]
    train = Batches(data.train, recipe.batch_size, device, drop_last=True)
    val = Batches(data.val, max(256, recipe.batch_size), device)
    steps = len(train) * recipe.epochs
    first_epoch, best_epoch, best_score = _resume(folder / "last.pt", model, optimizer)
    best = _Best(folder / "best.pt", best_epoch, best_score)
    results.rewind(first_epoch)
    saved_at = time.monotonic()
    batch_size = min(recipe.batch_size, len(data.train))
    start, total = (epochs * len(train) * batch_size for epochs in (first_epoch, recipe.epochs))

    with progress("training", total, "images", start=start) as bar:
        for epoch in range(first_epoch, recipe.epochs):
            adversary = recipe.adversary
            if adversary is not None and epoch < adversary.start_epoch:
                adversary = None
            torch.manual_seed(seed_from(seed, "dropout", epoch))
            generator = stream(seed, "actions", epoch, device=device)
            augmentation = stream(seed, "augmentation", epoch, device=device)
            history = torch.zeros(len(train), 5, device=device)
            model.train()
            began = time.monotonic()
            for step, (images, y) in enumerate(train.epoch(stream(seed, "batches", epoch))):
                factor = learning_rate(epoch * len(train) + step, steps, recipe.schedule, recipe.warmup)
                for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
                x = to_unit(recipe.augment(images, augmentation), hardware.memory_format)
                with hardware.autocast():
                    outcome = train_step(
                        wrapped, x, y, recipe.act, generator,
                        adversary=adversary, bare_model=model, probability_floor=recipe.probability_floor,
                    )  # fmt: skip
                optimizer.zero_grad()
                outcome.loss.backward()  # type: ignore[no-untyped-call]
                norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)
                optimizer.step()
                # Kept on the device: reading a number here would wait for the GPU at every step.
                history[step] = torch.stack(
                    [outcome.loss.detach(), outcome.reward, outcome.correct, outcome.adversarial_loss, norm]
                )
                bar.update(
                    batch_size,
                    acc=outcome.correct,
                    loss=outcome.loss.detach(),
                    epoch=f"{epoch + 1}/{recipe.epochs}",
                )
            seconds = time.monotonic() - began
            loss, reward, accuracy, adversarial_loss, grad_norm = history.mean(0).tolist()
            metrics = {
                "loss": loss,
                "reward": reward,
                "accuracy": accuracy,
                "grad_norm": grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_second": len(train) * batch_size / seconds,
            }
            if adversary is not None and adversary.objective != "alone":
                metrics["adversarial_loss"] = adversarial_loss
            scores = validate(model, val, hardware, adversary, seed)
            if (fault := _not_finite(history, scores)) is not None:
                best.write()
                raise UserError(
                    f"training stopped at epoch {epoch + 1} of {recipe.epochs}: {fault}; what was saved of the epochs "
                    "before is kept. A smaller trainer.optimizer.lr or a trainer.clip may help"
                )
            results.log(metrics, n=len(data.train), split="train", step=epoch + 1)
            results.log(scores, n=len(data.val), split="val", step=epoch + 1)
            best.consider(model, epoch + 1, _score(recipe.select, scores, epoch))
            if epoch + 1 == recipe.epochs or time.monotonic() - saved_at > _SECONDS_BETWEEN_CHECKPOINTS:
                best.write()
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "epoch": epoch + 1,
                    "best_epoch": best.epoch,
                    "best_score": best.score,
                }
                checkpoint.save(state, folder / "last.pt")
                saved_at = time.monotonic()
    return best.epoch


class _Best:
    """The best weights so far, in memory; written together with last.pt."""

    def __init__(self, path: Path, epoch: int, score: float) -> None:
        self.path, self.epoch, self.score = path, epoch, score
        self._weights: dict[str, Tensor] | None = None

    def consider(self, model: nn.Module, epoch: int, score: float | None) -> None:
        """Of equal scores the later wins: it has seen more."""
        if score is not None and score >= self.score:
            self.epoch, self.score = epoch, score
            self._weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def write(self) -> None:
        if self._weights is not None:
            checkpoint.save({"model": self._weights, "epoch": self.epoch}, self.path)
            self._weights = None


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int, float]:
    """(epochs done, best epoch, best score) from last.pt, or the beginning."""
    if not path.exists():
        return 0, 0, -math.inf
    state = checkpoint.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("going on after epoch %d, from %s", state["epoch"], path)
    return state["epoch"], state["best_epoch"], state["best_score"]


def _not_finite(history: Tensor, scores: dict[str, float]) -> str | None:
    bad = ~history.isfinite().all(1)
    if bad.any():
        return f"the loss or gradient is not finite at step {int(bad.nonzero()[0]) + 1} of {len(history)}"
    if not math.isfinite(scores["loss"]):
        return f"the validation loss is {scores['loss']} after step {len(history)}"
    return None


def _score(select: str, scores: dict[str, float], epoch: int) -> float | None:
    """The number best.pt maximises; None before the adversary has joined, if it is measured under one."""
    if select == "last":
        return float(epoch)
    value = scores.get(select.removeprefix("val_"))
    return -value if value is not None and select == "val_loss" else value


def validate(
    model: nn.Module, val: Batches, hardware: Hardware, adversary: Adversary | None, seed: int
) -> dict[str, float]:
    """Accuracy and cross-entropy on the validation images, in fp32; under the adversary too if it is given."""
    sums: dict[str, Any] = {"accuracy": 0.0, "loss": 0.0}
    generator = BatchGenerator(stream(seed, "validation", device=hardware.device))
    with evaluating(model):
        for images, y in val.epoch(None):
            x = to_unit(images, hardware.memory_format)
            with torch.no_grad():
                logits = model(x)
            sums["accuracy"] += (logits.argmax(1) == y).sum()
            sums["loss"] += F.cross_entropy(logits, y, reduction="sum")
            if adversary is not None:
                x_adv = adversary.attack(model, x, y, generator=generator)
                with torch.no_grad():
                    right = (model(x_adv).argmax(1) == y).sum()
                sums["adversarial_accuracy"] = sums.get("adversarial_accuracy", 0.0) + right
    return {name: float(total) / val.size for name, total in sums.items()}
