"""One loop trains everything: supervised or policy gradient, with or without an adversary."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl import checkpoint, distributed, interrupt
from aerl.attacks import BatchGenerator, evaluating
from aerl.attacks.losses import kl
from aerl.data import Batches, DataSplits, to_unit
from aerl.distributed import Share
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
    """A trainer, built. `optimizer` takes the parameters; `augment` takes (images, generator, share)."""

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
    augment: Callable[..., Tensor] = lambda images, generator, share=None: images


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
    share: Share | None = None,
) -> Step:
    """The loss of one batch: x (B, C, H, W) in [0, 1], y (B,). One action is drawn per forward pass.

    The adversary attacks `bare_model` (`model` without wrappers) in eval mode with frozen parameters.
    If x is a `share` of a batch, every draw is the one that the whole batch would see.
    """
    if share is not None:
        act = partial(_act_on_share, act, share)
    if adversary is not None:
        x_adv = adversary.attack(bare_model or model, x, y, generator=BatchGenerator(generator, share))
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


def _act_on_share(act: Act, share: Share, logits: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """What `act` does in these rows of a whole batch, whatever stands in the others."""
    all_logits, all_y = logits.new_zeros(share.whole, logits.shape[1]), y.new_zeros(share.whole)
    all_logits[share.rows], all_y[share.rows] = logits, y
    return act(all_logits, all_y, generator)[share.rows]


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

    Every epoch's random streams follow from (seed, epoch) alone, and one that is left in its midst by
    `interrupt.Stopped` keeps their states, so a resumed run continues bit for bit.
    Where there are several processes, each takes its share of every batch: the batch, the draws and hence the
    training stay the same, but for dropout, which each draws for itself, and BatchNorm on the CPU, which sees
    the share alone.
    Returns the epoch that best.pt is from. Raises UserError, naming the epoch and the step, when the
    loss is not finite: the checkpoints of the epochs before stay.
    """
    device, processes = hardware.device, distributed.world()
    batch_size = min(recipe.batch_size, len(data.train))
    if batch_size % processes:
        raise UserError(
            f"trainer.batch_size={batch_size}: cannot be shared evenly by the {processes} processes of torchrun"
        )
    if processes > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    wrapped: nn.Module = torch.compile(model) if hardware.compile else model  # type: ignore[assignment]
    optimizer = recipe.optimizer(model.parameters())
    base_rates = [group["lr"] for group in optimizer.param_groups]
    train = Batches(data.train, recipe.batch_size, device, drop_last=True, shared=True)
    val = Batches(data.val, max(256, recipe.batch_size), device, shared=True)
    steps = len(train) * recipe.epochs
    saved = _resume(folder / "last.pt", model, optimizer)
    best = _Best(folder / "best.pt", saved.get("best_epoch", 0), saved.get("best_score", -math.inf))
    first_epoch, first_step = saved.get("epoch", 0), saved.get("step", 0)
    results.restore(saved.get("results"))
    saved_at = time.monotonic()
    share = distributed.share(batch_size)
    own = [distributed.rank()] if distributed.rank() else []
    start = (first_epoch * len(train) + first_step) * batch_size

    def save(epoch: int, **within: Any) -> None:
        """Of a state after `epoch` whole epochs and, `within` the next one, some steps."""
        if not distributed.is_main():
            return
        best.write()
        state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {
            "epoch": epoch,
            "best_epoch": best.epoch,
            "best_score": best.score,
            "results": results.seal(),
            **within,
        }
        checkpoint.save(state, folder / "last.pt")

    with progress("training", steps * batch_size, "images", start=start) as bar:
        for epoch in range(first_epoch, recipe.epochs):
            adversary = recipe.adversary
            if adversary is not None and epoch < adversary.start_epoch:
                adversary = None
            torch.manual_seed(seed_from(seed, "dropout", epoch, *own))
            generator = stream(seed, "actions", epoch, device=device)
            augmentation = stream(seed, "augmentation", epoch, device=device)
            history = torch.zeros(len(train), 5, device=device)
            begin = first_step if epoch == first_epoch else 0
            if begin:
                history[:begin] = saved["history"]
                states = saved["random"]
                _set_random(states[min(distributed.rank(), len(states) - 1)], generator, augmentation, device)
            model.train()
            began = time.monotonic()
            batches = train.epoch(stream(seed, "batches", epoch), begin)
            for step, (images, y) in enumerate(batches, start=begin):
                factor = learning_rate(epoch * len(train) + step, steps, recipe.schedule, recipe.warmup)
                for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
                x = to_unit(recipe.augment(images, augmentation, share=share), hardware.memory_format)
                with _told_of_memory(recipe.batch_size):
                    with hardware.autocast():
                        outcome = train_step(
                            wrapped, x, y, recipe.act, generator,
                            adversary=adversary, bare_model=model, probability_floor=recipe.probability_floor,
                            share=share,
                        )  # fmt: skip
                    optimizer.zero_grad()
                    outcome.loss.backward()  # type: ignore[no-untyped-call]
                distributed.average([p.grad for p in model.parameters() if p.grad is not None])
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
                distributed.heed()
                if interrupt.asked() and step + 1 < len(train):  # else the epoch is brought to its end
                    random = distributed.gather(_random(generator, augmentation, device))
                    distributed.average([so_far := history[: step + 1].clone()])
                    save(epoch, step=step + 1, history=so_far, random=random)
                    interrupt.check()
            seconds = time.monotonic() - began
            distributed.average([history])
            loss, reward, accuracy, adversarial_loss, grad_norm = history.mean(0).tolist()
            metrics = {
                "loss": loss,
                "reward": reward,
                "accuracy": accuracy,
                "grad_norm": grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_second": (len(train) - begin) * batch_size / seconds,
            }
            if adversary is not None and adversary.objective != "alone":
                metrics["adversarial_loss"] = adversarial_loss
            # Where BatchNorm has seen shares, all go on with the mean of what it has seen.
            distributed.average([buffer for buffer in model.buffers() if buffer.is_floating_point()])
            scores = validate(model, val, hardware, adversary, seed)
            if (fault := _not_finite(history, scores)) is not None:
                if distributed.is_main():
                    best.write()
                raise UserError(
                    f"training stopped at epoch {epoch + 1} of {recipe.epochs}: {fault}; what was saved of the epochs "
                    "before is kept. A smaller trainer.optimizer.lr or a trainer.clip may help"
                )
            results.log(metrics, n=len(data.train), split="train", step=epoch + 1)
            results.log(scores, n=len(data.val), split="val", step=epoch + 1)
            best.consider(model, epoch + 1, _score(recipe.select, scores, epoch))
            due = time.monotonic() - saved_at > _SECONDS_BETWEEN_CHECKPOINTS
            if due or epoch + 1 == recipe.epochs or interrupt.asked():
                save(epoch + 1)
                saved_at = time.monotonic()
            interrupt.check()
    return best.epoch


@contextmanager
def _told_of_memory(batch_size: int) -> Iterator[None]:
    """A smaller batch would be another training, so that is left to the user."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"trainer.batch_size={batch_size}: the device's memory does not hold it; "
            f"trainer.batch_size={max(1, batch_size // 2)} takes half as much, hardware.precision=bf16 less"
        ) from error


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


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load last.pt, and return what it says beside the weights: how far training came; {} at the beginning."""
    if not distributed.from_main(path.exists):
        return {}
    state: dict[str, Any] = distributed.from_main(lambda: checkpoint.load(path))
    model.load_state_dict(state.pop("model"))
    optimizer.load_state_dict(state.pop("optimizer"))
    step = f" and step {state['step']} of the next" if state.get("step") else ""
    log.info("going on after epoch %d%s, from %s", state["epoch"], step, path)
    return state


def _random(
    actions: torch.Generator, augmentation: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    """The state of every stream that an epoch draws from, save that of the batches, which it draws from at once."""
    states = {
        "actions": actions.get_state(),
        "augmentation": augmentation.get_state(),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random(
    states: dict[str, Tensor], actions: torch.Generator, augmentation: torch.Generator, device: torch.device
) -> None:
    actions.set_state(states["actions"])
    augmentation.set_state(states["augmentation"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


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
    generator = stream(seed, "validation", device=hardware.device)
    with evaluating(model):
        for batch, (images, y) in enumerate(val.epoch(None)):
            x = to_unit(images, hardware.memory_format)
            with torch.no_grad():
                logits = model(x)
            sums["accuracy"] += (logits.argmax(1) == y).sum()
            sums["loss"] += F.cross_entropy(logits, y, reduction="sum")
            if adversary is not None:
                noise = BatchGenerator(generator, val.share(batch))
                x_adv = adversary.attack(model, x, y, generator=noise)
                with torch.no_grad():
                    right = (model(x_adv).argmax(1) == y).sum()
                sums["adversarial_accuracy"] = sums.get("adversarial_accuracy", 0.0) + right
    totals = distributed.total(torch.stack([torch.as_tensor(value).double() for value in sums.values()]))
    return dict(zip(sums, (totals / val.size).tolist(), strict=True))
