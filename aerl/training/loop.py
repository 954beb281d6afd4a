"""The training loop: every trainer is an objective, with or without an adversary."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from aerl.attacks import BatchGenerator, evaluating
from aerl.attacks.modes import full_precision
from aerl.data import Batches, DataSplits, to_unit
from aerl.errors import UserError, foreign_code, is_foreign
from aerl.evaluation.memory import within_memory
from aerl.runtime import ddp, signals
from aerl.runtime.device import Hardware, is_out_of_memory, seed_from, stream
from aerl.runtime.progress import progress
from aerl.tracking.results import ResultLog
from aerl.training import checkpoint
from aerl.training.average import Average
from aerl.training.objectives import Act, Objective, largest
from aerl.training.schedule import Schedule

log = logging.getLogger("aerl")

Attack = Callable[..., Tensor]

_SECONDS_BETWEEN_CHECKPOINTS = 10.0  # an epoch of a small dataset takes less time than its checkpoint
_STEPS_BETWEEN_STOP_CHECKS = 10  # of several processes, to which a check costs a message


class Scheduled(Protocol):
    """An act that changes in training."""

    def at(self, progress: float) -> Act:
        """The act after a share `progress` in [0, 1] of all steps."""


@dataclass(frozen=True)
class Adversary:
    """Makes the adversarial examples that the objective gets from `start_epoch` on; validation may use another attack,
    `judge`."""

    attack: Attack
    start_epoch: int = 0
    judge: Attack | None = None


@dataclass(frozen=True)
class Recipe:
    """A trainer. `optimizer` takes the parameters; `augment` takes (images, generator), `mix` (x, y, classes).

    With `act` the objective is called with the act of each step, otherwise with the one that it has.
    Training ends early after an epoch with a validation accuracy of `until` or more, or after `patience` epochs without
    a better score. `ema` is the decay per step of a moving average of the weights, which is then validated and kept.
    """

    epochs: int
    batch_size: int
    optimizer: Callable[..., torch.optim.Optimizer]
    objective: Objective
    schedule: Schedule = field(default_factory=Schedule)
    clip: float | None = None
    adversary: Adversary | None = None
    select: str = "val_accuracy"
    until: float | None = None
    patience: int | None = None
    ema: float | None = None
    act: Scheduled | None = None
    augment: Callable[..., Tensor] = lambda images, generator: images
    mix: Callable[..., tuple[Tensor, Tensor]] | None = None


def fit(
    model: nn.Module, data: DataSplits, recipe: Recipe, hardware: Hardware, *,
    seed: int, folder: Path, results: ResultLog,
) -> int:  # fmt: skip
    """Train `model` in place, from `folder`/last.pt on if it exists; returns the epoch that best.pt is from.

    A resumed run is the same bit for bit with as many processes as before: random streams follow from (seed, epoch,
    rank), and last.pt has their states within an epoch. Several processes share every batch; BatchNorm sees the batch
    of all of them on GPUs, of the first on the CPU. Raises UserError, naming epoch and step, where a loss, gradient,
    weight or score is not finite or memory runs out; best.pt then has the best weights so far.
    """
    device, batch_size = hardware.device, _batch_size(recipe, len(data.train))
    if ddp.world_size() > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    optimizer = build_optimizer(recipe, model, hardware)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    train = Batches(data.train, batch_size, device, drop_last=True, shared=True)
    val = Batches(data.val, max(256, batch_size), device, shared=True)
    if isinstance(recipe.objective, nn.Module):
        recipe.objective.to(device)
    average = None if recipe.ema is None else Average(model, recipe.ema)
    selected = model if average is None else average.model  # is validated, and kept in best.pt
    checkpoints = _Checkpoints(folder, model, average, optimizer, recipe.objective, results)
    train_step = ddp.data_parallel(TrainStep(model, recipe.objective, hardware))
    parts = {"model.net": getattr(model, "net", model), "trainer.objective": recipe.objective}
    parts |= {f"trainer.{key}": v for key, v in getattr(recipe.objective, "keywords", {}).items() if key == "act"}
    parts |= {"trainer.adversary.attack": recipe.adversary.attack} if recipe.adversary else {}
    culprits = " or ".join(key for key, part in parts.items() if is_foreign(part))
    foreign_parts = partial(foreign_code, culprits, *parts.values())
    total, done = recipe.epochs * len(train), checkpoints.epoch * len(train) + checkpoints.step

    with progress("training", total * batch_size, start=done * batch_size) as bar:
        for number in range(checkpoints.epoch, recipe.epochs):
            adversary = recipe.adversary
            attack = adversary.attack if adversary is not None and number >= adversary.start_epoch else None
            epoch = _Epoch(seed, number, device)
            if number == checkpoints.epoch and checkpoints.processes:
                epoch.restore(checkpoints.processes)
            began, begin = time.monotonic(), epoch.steps
            model.train()
            with _explained(epoch, recipe, train, checkpoints):
                for images, y in train.epoch(stream(seed, "batches", number), begin):
                    factor = recipe.schedule.factor(number, epoch.steps, len(train), recipe.epochs)
                    for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                        group["lr"] = rate * factor
                    x = to_unit(recipe.augment(images, epoch.streams["augmentation"]), hardware.memory_format)
                    if recipe.mix is not None:
                        x, y = recipe.mix(x, y, data.num_classes)
                    noise = stream(seed, "adversary", number, epoch.steps, *_rank(), device=device) if attack else None
                    act = recipe.act and recipe.act.at((number * len(train) + epoch.steps) / total)
                    optimizer.zero_grad()
                    with foreign_parts():
                        loss, metrics = train_step(x, y, epoch.streams["actions"], attack, noise, act)
                        loss.backward()
                    grad_norm = gradient_norm(model, recipe.clip)
                    with foreign_code("trainer.optimizer", optimizer):
                        optimizer.step()
                    if average is not None:
                        average.update()
                    epoch.append(metrics | {"loss": loss.detach(), "grad_norm": grad_norm})
                    shown = {"acc": metrics["accuracy"]} if "accuracy" in metrics else {}
                    bar.update(batch_size, **shown, loss=loss.detach(), epoch=f"{number + 1}/{recipe.epochs}")
                    if ddp.world_size() == 1 or epoch.steps % _STEPS_BETWEEN_STOP_CHECKS == 1:
                        ddp.sync_stop_request()
                    if signals.stop_requested():
                        processes = ddp.gather(epoch.state())
                        epoch.check_finite({})
                        checkpoints.save(number, step=epoch.steps, processes=processes)
                        signals.raise_if_stopped()
                means = epoch.means() | {"lr": optimizer.param_groups[0]["lr"]}
                if begin < len(train):
                    means["images_per_second"] = (len(train) - begin) * batch_size / (time.monotonic() - began)
                ddp.broadcast_weights(model)  # on the CPU each process has BatchNorm statistics of its own
                if average is not None:
                    ddp.broadcast_weights(average.model)
                processes = ddp.gather(epoch.state())
                epoch.check_finite({})
                try:
                    with signals.stop_immediately(), foreign_parts():
                        scores = validate(selected, val, hardware, adversary if attack else None, seed)
                except signals.Stopped:
                    checkpoints.save(number, step=len(train), processes=processes)
                    raise
                epoch.check_finite(scores)
                results.log(means, n=len(data.train), split="train", step=number + 1)
                results.log(scores, n=len(data.val), split="val", step=number + 1)
                checkpoints.consider(selected, number + 1, _score(recipe.select, scores, number))
                ended = _early_end(recipe, number + 1, scores, checkpoints.improved)
                if checkpoints.due() or number + 1 == recipe.epochs or ended or signals.stop_requested():
                    checkpoints.save(recipe.epochs if ended else number + 1)  # ended: nothing is left to do
                if ended:
                    log.info("%s after epoch %d", ended, number + 1)
                    break
                signals.raise_if_stopped()
    return checkpoints.best_epoch


def _early_end(recipe: Recipe, epoch: int, scores: Mapping[str, float], improved: int) -> str | None:
    """Why training ends after this epoch, before its time; the score improved last in epoch `improved`."""
    if recipe.until is not None and scores["accuracy"] >= recipe.until:
        return f"trainer.until={recipe.until:g}: reached"
    if recipe.patience is not None and improved and epoch - improved >= recipe.patience:
        return f"trainer.patience={recipe.patience}: no better score than that of epoch {improved}"
    return None


def gradient_norm(model: nn.Module, clip: float | None) -> Tensor:
    """The L2 norm of all gradients together, before they are clipped to `clip`."""
    if clip:
        return nn.utils.clip_grad_norm_(model.parameters(), clip)
    return nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])


class TrainStep(nn.Module):
    """The forward pass of a training step: craft adversarial examples, then compute the objective.

    A module, because DistributedDataParallel wants one forward pass per step; an objective may make several.
    Nothing in it waits for the device, unless the attack or the objective does.
    """

    def __init__(self, model: nn.Module, objective: Objective, hardware: Hardware) -> None:
        super().__init__()
        self.model = model
        self.forward_model = torch.compile(model) if hardware.compile else model
        self.objective, self.hardware = objective, hardware

    def forward(
        self, x: Tensor, y: Tensor, generator: Generator, attack: Attack | None = None, noise: Generator | None = None,
        act: Act | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """x (B, C, H, W) in [0, 1], labels y (B,) or their shares (B, K) -> the loss () and metrics (). `attack` draws
        from `noise`."""
        x_adv = None
        if attack is not None:
            with self.hardware.autocast():
                x_adv = attack(self.model, x, largest(y), generator=BatchGenerator(noise or generator, len(x)))
        # Autocast keeps the weights that it has cast until it ends: those of the attack have no gradient.
        with self.hardware.autocast():
            given = {} if act is None else {"act": act}
            loss, metrics = self.objective(self.forward_model, x, y, x_adv=x_adv, generator=generator, **given)
        as_tensor = partial(torch.as_tensor, dtype=torch.float32, device=x.device)
        return loss.mean(), {name: as_tensor(value).detach() for name, value in metrics.items()}


class _Epoch:
    """The random streams of an epoch, and the metrics of its steps, on the device: reading one waits for it."""

    def __init__(self, seed: int, number: int, device: torch.device) -> None:
        self.number, self.device = number, device
        torch.manual_seed(seed_from(seed, "dropout", number, *_rank()))
        names = ("actions", "augmentation")
        self.streams = {name: stream(seed, name, number, *_rank(), device=device) for name in names}
        self.streams["cpu"] = torch.default_generator
        if device.type == "cuda":
            self.streams["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
        self._names: list[str] = []
        self._rows: list[Tensor] = []

    @property
    def steps(self) -> int:
        return len(self._rows)

    def append(self, metrics: Mapping[str, Tensor]) -> None:
        self._names = list(metrics)
        self._rows.append(torch.stack(list(metrics.values())))

    def means(self) -> dict[str, float]:
        """Over the steps and the processes."""
        means = ddp.total(torch.stack(self._rows)).div_(ddp.world_size()).mean(0)
        return dict(zip(self._names, means.tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """What this process needs to resume here."""
        states = {name: generator.get_state() for name, generator in self.streams.items()}
        return {**states, "names": self._names, "history": torch.stack(self._rows).cpu()}

    def restore(self, processes: Sequence[Mapping[str, Any]]) -> None:
        """Resume from the `state` of each process; the streams only if there are as many as before."""
        same = len(processes) == ddp.world_size()
        state = processes[ddp.rank() if same else 0]
        self._names, self._rows = list(state["names"]), list(state["history"].to(self.device))
        for name, generator in self.streams.items() if same else ():
            generator.set_state(state[name])

    def check_finite(self, scores: Mapping[str, float]) -> None:
        """UserError for a loss, gradient or validation score that is not finite."""
        columns = [name in ("loss", "grad_norm") for name in self._names]
        faults = [f"the validation's {name} is {score}" for name, score in scores.items() if not math.isfinite(score)]
        if self._rows and (bad := ~torch.stack(self._rows)[:, columns].isfinite().all(1)).any():
            faults.insert(0, f"the loss or gradient is not finite at step {int(bad.nonzero()[0]) + 1}")
        if faults:
            raise UserError(f"{faults[0]}; try a smaller trainer.optimizer.lr or trainer.clip")


class _Checkpoints:
    """last.pt, from which a training resumes, and best.pt, the weights with the best validation score."""

    def __init__(
        self, folder: Path, model: nn.Module, average: Average | None, optimizer: torch.optim.Optimizer,
        objective: Objective, results: ResultLog,
    ) -> None:  # fmt: skip
        self.last, self.best = folder / "last.pt", folder / "best.pt"
        self.model, self.average, self.optimizer, self.results = model, average, optimizer, results
        self.objective = objective if isinstance(objective, nn.Module) else nn.Identity()
        state = ddp.broadcast_from_main(lambda: checkpoint.load(self.last) if self.last.exists() else {})
        self.epoch, self.step, self.processes = state.get("epoch", 0), state.get("step", 0), state.get("processes")
        self.best_epoch, self.best_score = int(state.get("best_epoch", 0)), state.get("best_score", -math.inf)
        self.improved = int(state.get("improved", self.best_epoch))
        self._best_weights: dict[str, Tensor] | None = None
        self._saved_at = time.monotonic()
        results.restore(state.get("results"))
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if average is not None:
                average.load_state_dict(state["average"])
            self.objective.load_state_dict(state.get("objective", {}))
            step = f" and step {self.step} of the next" if self.step else ""
            log.info("resuming after epoch %d%s, from %s", self.epoch, step, self.last)

    def consider(self, model: nn.Module, epoch: int, score: float | None) -> None:
        """Of equal scores the later wins. Copied off the device, whose memory training may need."""
        if score is not None and score > self.best_score:
            self.improved = epoch
        if score is not None and score >= self.best_score:
            self.best_epoch, self.best_score = epoch, score
            weights = model.state_dict().items()
            self._best_weights = {name: value.detach().to("cpu", copy=True) for name, value in weights}

    def due(self) -> bool:
        return time.monotonic() - self._saved_at > _SECONDS_BETWEEN_CHECKPOINTS

    def save(self, epoch: int, **within_epoch: Any) -> None:
        """The state after `epoch` epochs, or within the next one."""
        self.save_best()
        if ddp.is_main():
            state: dict[str, Any] = {"epoch": epoch, "best_epoch": self.best_epoch, "best_score": self.best_score}
            state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            state |= {"improved": self.improved, "objective": self.objective.state_dict()}
            if self.average is not None:
                state["average"] = self.average.state_dict()
            checkpoint.save({**state, "results": self.results.seal(), **within_epoch}, self.last)
        self._saved_at = time.monotonic()

    def save_best(self) -> None:
        if self._best_weights is not None and ddp.is_main():
            checkpoint.save({"model": self._best_weights, "epoch": self.best_epoch}, self.best)
        self._best_weights = None


@contextmanager
def _explained(epoch: _Epoch, recipe: Recipe, batches: Batches, checkpoints: _Checkpoints) -> Iterator[None]:
    """Report in one line where and why training stopped, after the best weights so far are saved."""
    try:
        yield
    except Exception as error:
        checkpoints.save_best()
        if is_out_of_memory(error) or (error.__cause__ and is_out_of_memory(error.__cause__)):
            size = batches.batch_size
            reason = f"trainer.batch_size={size}: out of memory; try trainer.batch_size={max(1, size // 2)}"
        elif isinstance(error, UserError):
            try:
                epoch.check_finite({})  # of which the error may be a consequence
                reason = str(error)
            except UserError as cause:
                reason = str(cause)
        else:
            raise
        step = f", step {epoch.steps + 1} of {len(batches)}" if epoch.steps < len(batches) else ""
        best = f"of epoch {checkpoints.best_epoch}, in {checkpoints.best}" if checkpoints.best_epoch else "none yet"
        raise UserError(
            f"training stopped at epoch {epoch.number + 1} of {recipe.epochs}{step}: {reason}; best weights: {best}"
        ) from error


def _batch_size(recipe: Recipe, images: int) -> int:
    """Of all processes together."""
    size, processes = min(recipe.batch_size, images), ddp.world_size()
    if size < recipe.batch_size:
        log.info("trainer.batch_size=%d: every batch is all %d training images", recipe.batch_size, images)
    if size % processes:
        raise UserError(f"trainer.batch_size={recipe.batch_size}: {processes} processes cannot share {size} images")
    return size


def _rank() -> list[int]:
    """Part of the seed of every process but the first, which draws as one alone does."""
    return [ddp.rank()] if ddp.rank() else []


def build_optimizer(recipe: Recipe, model: nn.Module, hardware: Hardware) -> torch.optim.Optimizer:
    """With its fused kernel if hardware.fused asks for it, it has one, and it runs on a GPU."""
    on_gpu = hardware.fused and hardware.device.type == "cuda"
    fused = {"fused": True} if on_gpu and "fused" in inspect.signature(recipe.optimizer).parameters else {}
    return recipe.optimizer(model.parameters(), **fused)


def check_recipe(recipe: Recipe, model: nn.Module, device: torch.device) -> None:
    """UserError for an optimizer that would fail at its first step."""
    trial = nn.Parameter(torch.zeros(2, 2, device=device))
    trial.grad = torch.zeros_like(trial)
    with foreign_code("trainer.optimizer"):
        build_optimizer(recipe, model, Hardware(device))
        optimizer = recipe.optimizer([trial])
    with foreign_code("trainer.optimizer", remedy="expected an optimizer that takes dense gradients and no closure"):
        optimizer.step()


def validate(
    model: nn.Module, val: Batches, hardware: Hardware, adversary: Adversary | None, seed: int
) -> dict[str, float]:
    """Accuracy and cross-entropy on the validation images, in fp32, and the accuracy under `adversary`.

    NaN where logits are not finite. Batches that do not fit in memory are halved, which changes no draw.
    """
    sums: dict[str, Any] = {}

    def work(batch: int, images: Tensor, y: Tensor, rows: Tensor) -> None:
        noise = stream(seed, "validation", batch, *_rank(), device=hardware.device)
        x, size, y = to_unit(images[rows], hardware.memory_format), len(images), y[rows]
        with torch.no_grad():
            logits = model(x)
        values = {"accuracy": _correct(logits, y), "loss": F.cross_entropy(logits, y, reduction="sum")}
        if adversary is not None:
            judge = adversary.judge or adversary.attack
            x_adv = judge(model, x, y, generator=BatchGenerator(noise, size)[rows])
            with torch.no_grad():
                values["adversarial_accuracy"] = _correct(model(x_adv), y)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value

    limit = val.batch_size
    with evaluating(model), full_precision():
        for batch, (images, y) in enumerate(val.epoch(None)):
            limit = within_memory(partial(work, batch, images, y), torch.arange(len(y)), limit)
    totals = ddp.total(torch.stack([value.double() for value in sums.values()]))
    return dict(zip(sums, (totals / val.size).tolist(), strict=True))


def _correct(logits: Tensor, y: Tensor) -> Tensor:
    """How many of the logits (B, K) are largest at the label y (B,); NaN unless all of them are finite."""
    return torch.where(logits.isfinite().all(), (logits.argmax(1) == y).sum().double(), math.nan)


def _score(select: str, scores: Mapping[str, float], epoch: int) -> float | None:
    """What best.pt maximises; None if it is measured under an adversary that has not started."""
    if select == "last":
        return float(epoch)
    value = scores.get(select.removeprefix("val_"))
    return -value if value is not None and select == "val_loss" else value
