"""One loop trains everything: what a step descends is the objective's, with or without an adversary."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl.attacks import BatchGenerator, evaluating
from aerl.attacks.modes import full_precision
from aerl.data import Batches, DataSplits, to_unit
from aerl.evaluation.evaluate import within_memory
from aerl.runtime import ddp, signals
from aerl.runtime.device import Hardware, is_out_of_memory, seed_from, stream
from aerl.runtime.progress import progress
from aerl.tracking.results import ResultLog
from aerl.training import checkpoint
from aerl.training.objectives import Objective
from aerl.types import UserError, foreign_code, is_foreign

log = logging.getLogger("aerl")

Attack = Callable[..., Tensor]

# Written no more often than this: an epoch of a small dataset takes less time than its checkpoint.
_SECONDS_BETWEEN_CHECKPOINTS = 10.0
# So often several processes ask each other whether to stop, which takes a message; one asks itself at every step.
_STEPS_BETWEEN_STOP_CHECKS = 10


@dataclass(frozen=True)
class Adversary:
    """Makes the adversarial examples that the objective gets from `start_epoch` on."""

    attack: Attack
    start_epoch: int = 0


@dataclass(frozen=True)
class Recipe:
    """A trainer, built. `optimizer` takes the parameters; `augment` takes (images, generator)."""

    epochs: int
    batch_size: int
    optimizer: Callable[..., torch.optim.Optimizer]
    objective: Objective
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    clip: float | None = None
    adversary: Adversary | None = None
    select: str = "val_accuracy"
    augment: Callable[..., Tensor] = lambda images, generator: images


def check_recipe(recipe: Recipe, model: nn.Module, device: torch.device) -> None:
    """Raises UserError for what would end training at its first step, while there is nothing to lose yet."""
    trial = nn.Parameter(torch.zeros(2, 2, device=device))
    trial.grad = torch.zeros_like(trial)
    remedy = "it must step on dense gradients and without a closure, as SGD and AdamW of torch.optim do"
    with foreign_code("trainer.optimizer", remedy=remedy):
        try:
            recipe.optimizer(model.parameters())
        except (ValueError, TypeError) as error:  # torch checks its own settings
            raise UserError(f"trainer.optimizer: {error}") from error
        optimizer = recipe.optimizer([trial])
        optimizer.step()
    if any("lr" not in group for group in optimizer.param_groups):
        raise UserError("trainer.optimizer: has no lr, which trainer.schedule changes at every step")


class TrainStep(nn.Module):
    """The forward pass of one training step: craft adversarial examples, then compute the objective.

    A module, because DistributedDataParallel wants one forward pass per step; an objective may make several.
    Nothing in it waits for the device, unless the attack or the objective does.
    """

    def __init__(self, model: nn.Module, objective: Objective, hardware: Hardware) -> None:
        super().__init__()
        self.model = model
        self.forward_model = torch.compile(model) if hardware.compile else model
        self.objective, self.hardware = objective, hardware

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator,
        attack: Attack | None = None,
        noise: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, C, H, W) in [0, 1], y (B,) -> the loss () and metrics (). `attack` draws from `noise`."""
        x_adv = None
        if attack is not None:
            with self.hardware.autocast():
                x_adv = attack(self.model, x, y, generator=BatchGenerator(noise or generator, len(x)))
        # Autocast keeps the weights that it has cast until it ends: those of the attack have no gradient.
        with self.hardware.autocast():
            loss, metrics = self.objective(self.forward_model, x, y, x_adv=x_adv, generator=generator)
        return loss.mean(), {
            name: torch.as_tensor(value, dtype=torch.float32, device=x.device).detach()
            for name, value in metrics.items()
        }


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
    """Train `model` in place, from `folder`/last.pt on if there is one; write last.pt and best.pt.

    Every epoch's random streams follow from (seed, epoch, rank) alone, and an epoch that `signals.Stopped` interrupts
    saves their states, so a resumed run continues bit for bit with as many processes as before. Several processes
    split every batch among them. What each draws is its own; BatchNorm sees the batch of all processes on GPUs, and
    on the CPU that of the first.
    Returns the epoch that best.pt is from. Raises UserError, naming the epoch and the step, when a loss, gradient,
    weight, buffer or score becomes NaN or infinite, or when the memory does not suffice: best.pt then has the best
    weights of the epochs before.
    """
    device, processes = hardware.device, ddp.world_size()
    batch_size = min(recipe.batch_size, len(data.train))
    if recipe.batch_size > batch_size:
        log.info("trainer.batch_size=%d: every batch is all %d training images", recipe.batch_size, batch_size)
    if batch_size % processes:
        raise UserError(
            f"trainer.batch_size={recipe.batch_size}: batches of {batch_size} images cannot be shared evenly by the "
            f"{processes} processes of torchrun"
        )
    if processes > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    optimizer = build_optimizer(recipe, model, hardware)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    train = Batches(data.train, batch_size, device, drop_last=True, shared=True)
    val = Batches(data.val, max(256, batch_size), device, shared=True)
    steps = len(train) * recipe.epochs
    saved = _resume(folder / "last.pt", model, optimizer)
    train_step = ddp.data_parallel(TrainStep(model, recipe.objective, hardware))
    best = _Best(folder / "best.pt", saved.get("best_epoch", 0), saved.get("best_score", -math.inf))
    check_finite = _FiniteCheck(model)
    first_epoch, first_step = saved.get("epoch", 0), saved.get("step", 0)
    results.restore(saved.get("results"))
    saved_at = time.monotonic()
    rank = [ddp.rank()] if ddp.rank() else []
    code = {"model.net": getattr(model, "net", model), "trainer.objective": recipe.objective}
    code |= {f"trainer.{name}": act for name, act in getattr(recipe.objective, "keywords", {}).items() if name == "act"}
    if recipe.adversary is not None:
        code["trainer.adversary.attack"] = recipe.adversary.attack
    culprits = " or ".join(key for key, target in code.items() if is_foreign(target))

    def save(epoch: int, **within: Any) -> None:
        """The state after `epoch` epochs and, `within` the next one, some steps."""
        if ddp.is_main():
            best.write()
            state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {
                "results": results.seal(),
                "epoch": epoch,
                "best_epoch": best.epoch,
                "best_score": best.score,
                **within,
            }
            checkpoint.save(state, folder / "last.pt")

    @contextmanager
    def guarded(place: str) -> Iterator[None]:
        """One line for whatever stops training at `place`, after the best weights so far are written."""
        try:
            yield
        except Exception as error:
            if ddp.is_main():
                best.write()
            if is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__)):
                reason = (
                    f"trainer.batch_size={batch_size}: out of memory; trainer.batch_size={max(1, batch_size // 2)} "
                    "takes about half as much, hardware.precision=bf16 less"
                )
            elif isinstance(error, UserError):
                reason = check_finite.fault(history) or str(error)
            else:
                raise
            raise UserError(f"training stopped at {place}: {reason}; {best}") from error

    with progress("training", steps * batch_size, start=(first_epoch * len(train) + first_step) * batch_size) as bar:
        for epoch in range(first_epoch, recipe.epochs):
            adversary = recipe.adversary
            if adversary is not None and epoch < adversary.start_epoch:
                adversary = None
            torch.manual_seed(seed_from(seed, "dropout", epoch, *rank))
            streams = {name: stream(seed, name, epoch, *rank, device=device) for name in ("actions", "augmentation")}
            history = _History()
            begin = first_step if epoch == first_epoch else 0
            if begin:
                history.restore(saved["processes"], streams, device)
            model.train()
            began = time.monotonic()
            place = f"epoch {epoch + 1} of {recipe.epochs}"
            batches = train.epoch(stream(seed, "batches", epoch), begin)
            for step, (images, y) in enumerate(batches, start=begin):
                factor = learning_rate(epoch * len(train) + step, steps, recipe.schedule, recipe.warmup)
                for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
                with guarded(f"{place}, step {step + 1} of {len(train)}"):
                    x = to_unit(recipe.augment(images, streams["augmentation"]), hardware.memory_format)
                    attack, noise = None, None
                    if adversary is not None:
                        attack, noise = adversary.attack, stream(seed, "adversary", epoch, step, *rank, device=device)
                    optimizer.zero_grad()
                    with foreign_code(culprits, *code.values()):
                        loss, metrics = train_step(x, y, streams["actions"], attack, noise)
                        loss.backward()
                    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)
                    with foreign_code("trainer.optimizer", optimizer):
                        optimizer.step()
                metrics |= {"loss": loss.detach(), "grad_norm": norm}
                history.append(metrics)
                shown = {"acc": metrics["accuracy"]} if "accuracy" in metrics else {}
                bar.update(batch_size, **shown, loss=metrics["loss"], epoch=f"{epoch + 1}/{recipe.epochs}")
                if processes == 1 or step % _STEPS_BETWEEN_STOP_CHECKS == 0:
                    ddp.sync_stop_request()
                if signals.stop_requested():
                    states = ddp.gather(history.state(streams, device))
                    with guarded(place):
                        check_finite(history)
                    save(epoch, step=step + 1, processes=states)
                    signals.raise_if_stopped()
            seconds = time.monotonic() - began
            states = ddp.gather(history.state(streams, device))
            means = history.means() | {"lr": optimizer.param_groups[0]["lr"]}
            if begin < len(train):
                means["images_per_second"] = (len(train) - begin) * batch_size / seconds
            ddp.broadcast_weights(model)  # on the CPU each has BatchNorm statistics of its own
            with guarded(place):
                check_finite(history)
                try:
                    with signals.stop_immediately(), foreign_code(culprits, *code.values()):
                        scores = validate(model, val, hardware, adversary, seed)
                except signals.Stopped:  # all steps of the epoch are done, the validation is done again
                    save(epoch, step=len(train), processes=states)
                    raise
                check_finite(history, scores)
            results.log(means, n=len(data.train), split="train", step=epoch + 1)
            results.log(scores, n=len(data.val), split="val", step=epoch + 1)
            best.consider(model, epoch + 1, _score(recipe.select, scores, epoch))
            due = time.monotonic() - saved_at > _SECONDS_BETWEEN_CHECKPOINTS
            if due or epoch + 1 == recipe.epochs or signals.stop_requested():
                save(epoch + 1)
                saved_at = time.monotonic()
            signals.raise_if_stopped()
    return best.epoch


def build_optimizer(recipe: Recipe, model: nn.Module, hardware: Hardware) -> torch.optim.Optimizer:
    """With its fused kernel where hardware.fused asks for it, it has one, and it runs on a GPU."""
    on_gpu = hardware.fused and hardware.device.type == "cuda"
    fused = {"fused": True} if on_gpu and "fused" in inspect.signature(recipe.optimizer).parameters else {}
    return recipe.optimizer(model.parameters(), **fused)


class _Best:
    """The best weights so far, in memory; written together with last.pt."""

    def __init__(self, path: Path, epoch: int, score: float) -> None:
        self.path, self.epoch, self.score = path, epoch, score
        self._weights: dict[str, Tensor] | None = None

    def consider(self, model: nn.Module, epoch: int, score: float | None) -> None:
        """Of equal scores the later wins. Copied off the device, whose memory training may need."""
        if score is not None and score >= self.score:
            self.epoch, self.score = epoch, score
            weights = model.state_dict().items()
            self._weights = {name: value.detach().to("cpu", copy=True) for name, value in weights}

    def write(self) -> None:
        if self._weights is not None:
            checkpoint.save({"model": self._weights, "epoch": self.epoch}, self.path)
            self._weights = None

    def __str__(self) -> str:
        if self.epoch == 0:
            return "there are no best weights yet"
        return f"the best weights so far, of epoch {self.epoch}, are in {self.path}"


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load last.pt; returns what it has beside the weights, {} where there is none."""
    if not ddp.broadcast_from_main(path.exists):
        return {}
    state: dict[str, Any] = ddp.broadcast_from_main(lambda: checkpoint.load(path))
    model.load_state_dict(state.pop("model"))
    optimizer.load_state_dict(state.pop("optimizer"))
    step = f" and step {state['step']} of the next" if state.get("step") else ""
    log.info("going on after epoch %d%s, from %s", state["epoch"], step, path)
    return state


class _History:
    """The metrics of an epoch's steps so far. They stay on the device: to read one waits for it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, metrics: Mapping[str, Tensor]) -> None:
        self.names = list(metrics)
        self._rows.append(torch.stack(list(metrics.values())))

    def columns(self, *names: str) -> Tensor:
        """(steps, names)."""
        return torch.stack(self._rows)[:, [self.names.index(name) for name in names]]

    def means(self) -> dict[str, float]:
        """Over the steps and the processes."""
        means = ddp.total(torch.stack(self._rows)).div_(ddp.world_size()).mean(0)
        return dict(zip(self.names, means.tolist(), strict=True))

    def state(self, streams: Mapping[str, torch.Generator], device: torch.device) -> dict[str, Any]:
        """What this process needs to go on within an epoch."""
        state: dict[str, Any] = {name: generator.get_state() for name, generator in streams.items()}
        state |= {"cpu": torch.get_rng_state(), "names": self.names, "history": torch.stack(self._rows).cpu()}
        return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})

    def restore(
        self, states: Sequence[dict[str, Any]], streams: Mapping[str, torch.Generator], device: torch.device
    ) -> None:
        """Go on from what `state` was in each process; with another number of them on the streams of the epoch."""
        same = len(states) == ddp.world_size()
        state = states[ddp.rank() if same else 0]
        self.names, self._rows = list(state["names"]), list(state["history"].to(device))
        if not same:
            return
        for name, generator in streams.items():
            generator.set_state(state[name])
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)


class _FiniteCheck:
    """Whether losses, gradients and scores are finite, and the model's tensors that were so at the beginning."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._finite_at_first = self._finite()

    def _finite(self) -> Tensor:
        """bool (T,), for each tensor of the model."""
        return torch.stack([tensor.isfinite().all() for tensor in self.model.state_dict().values()])

    def fault(self, history: _History, scores: Mapping[str, float] | None = None) -> str | None:
        step = len(history)
        if step and (bad := ~history.columns("loss", "grad_norm").isfinite().all(1)).any():
            fault = f"the loss or gradient is not finite at step {int(bad.nonzero()[0]) + 1}"
        elif (bad := self._finite_at_first & ~self._finite()).any():
            fault = f"{list(self.model.state_dict())[int(bad.nonzero()[0])]} is not finite after step {step}"
        elif names := [name for name, score in (scores or {}).items() if not math.isfinite(score)]:
            fault = f"the validation's {names[0]} is {(scores or {})[names[0]]} after step {step}"
        else:
            return None
        return f"{fault}; a smaller trainer.optimizer.lr or a trainer.clip may help"

    def __call__(self, history: _History, scores: Mapping[str, float] | None = None) -> None:
        if (fault := self.fault(history, scores)) is not None:
            raise UserError(fault)


def _score(select: str, scores: dict[str, float], epoch: int) -> float | None:
    """The number best.pt maximises; None before the adversary has joined, if it is measured under one."""
    if select == "last":
        return float(epoch)
    value = scores.get(select.removeprefix("val_"))
    return -value if value is not None and select == "val_loss" else value


def validate(
    model: nn.Module, val: Batches, hardware: Hardware, adversary: Adversary | None, seed: int
) -> dict[str, float]:
    """Accuracy and cross-entropy on the validation images, in fp32; under the adversary too if it is given.

    NaN where logits are not finite. Batches that do not fit in memory are halved, which changes no draw.
    """
    sums: dict[str, Any] = {}
    limit = val.batch_size
    rank = [ddp.rank()] if ddp.rank() else []

    def work(batch: int, images: Tensor, y: Tensor, rows: Tensor) -> None:
        noise = BatchGenerator(stream(seed, "validation", batch, *rank, device=hardware.device), len(images))[rows]
        x, y = to_unit(images[rows], hardware.memory_format), y[rows]
        with torch.no_grad():
            logits = model(x)
        values = {"accuracy": _correct(logits, y), "loss": F.cross_entropy(logits, y, reduction="sum")}
        if adversary is not None:
            x_adv = adversary.attack(model, x, y, generator=noise)
            with torch.no_grad():
                values["adversarial_accuracy"] = _correct(model(x_adv), y)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value

    with evaluating(model), full_precision():
        for batch, (images, y) in enumerate(val.epoch(None)):
            limit = within_memory(partial(work, batch, images, y), torch.arange(len(y)), limit)
    totals = ddp.total(torch.stack([value.double() for value in sums.values()]))
    return dict(zip(sums, (totals / val.size).tolist(), strict=True))


def _correct(logits: Tensor, y: Tensor) -> Tensor:
    """How many of the logits (B, K) are largest at the label y (B,); NaN unless all of them are finite."""
    return torch.where(logits.isfinite().all(), (logits.argmax(1) == y).sum().double(), math.nan)
