"""One loop trains everything: supervised or policy gradient, with or without an adversary."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aerl.attacks import BatchGenerator, evaluating
from aerl.attacks.losses import kl
from aerl.data import Batches, DataSplits, to_unit
from aerl.evaluation.evaluate import within_memory
from aerl.runtime import ddp, signals
from aerl.runtime.ddp import Share
from aerl.runtime.device import Hardware, is_out_of_memory, seed_from, stream
from aerl.runtime.progress import progress
from aerl.tracking.results import ResultLog
from aerl.training import checkpoint
from aerl.training.objectives import policy_loss, reward
from aerl.types import UserError, foreign_code

log = logging.getLogger("aerl")

Act = Callable[[Tensor, Tensor, torch.Generator], Tensor]
Attack = Callable[..., Tensor]

# Written no more often than this: an epoch of a small dataset takes less time than its checkpoint.
_SECONDS_BETWEEN_CHECKPOINTS = 10.0
_NO_MEMORY = (
    "trainer.batch_size={}: the memory does not hold it; trainer.batch_size={} takes about half as much, "
    "hardware.precision=bf16 less"
)


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
    noise: torch.Generator | None = None,
    bare_model: nn.Module | None = None,
    probability_floor: float = 0.0,
    share: Share | None = None,
) -> Step:
    """The loss of one batch: x (B, C, H, W) in [0, 1], y (B,). One action is drawn per forward pass.

    The adversary attacks `bare_model` (`model` without wrappers) in eval mode with frozen parameters, and draws
    from `noise`. In one process a signal ends it on the spot: nothing has changed yet.
    If x is a `share` of a batch, every draw is the one that the whole batch would see.
    A sample with logits that are not finite earns no reward and is not correct.
    """
    if share is not None:
        act = partial(_act_on_share, act, share)
    if adversary is not None:
        with signals.stop_immediately() if share is None else nullcontext():
            x_adv = adversary.attack(bare_model or model, x, y, generator=_noise(noise or generator, x, share))
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
    finite = logits.detach().isfinite().all(1)
    return Step(
        loss,
        reward=(reward(y, actions) * finite).mean().detach(),
        correct=((logits.argmax(1) == y) & finite).float().mean().detach(),
        adversarial_loss=adversarial_loss.detach(),
    )


def _noise(generator: torch.Generator, x: Tensor, share: Share | None) -> BatchGenerator:
    """What an adversary draws from for images x (B, C, H, W), which may be a `share` of a batch."""
    if share is None:
        return BatchGenerator(generator, len(x))
    return BatchGenerator(generator, share.whole, torch.arange(share.first, share.last, device=x.device))


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
    `signals.Stopped` keeps their states, so a resumed run continues bit for bit.
    Where there are several processes, each takes its share of every batch: the batch, the draws and hence the
    training stay the same, but for dropout, which each draws for itself, and BatchNorm on the CPU, which sees
    the share alone.
    Returns the epoch that best.pt is from. Raises UserError, naming the epoch and the step, when anything that
    was finite no longer is (losses, gradients, weights, buffers, scores), or when the memory does not suffice: the
    best weights of the epochs before are in best.pt then.
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
    wrapped: nn.Module = torch.compile(model) if hardware.compile else model  # type: ignore[assignment]
    optimizer = recipe.optimizer(model.parameters())
    base_rates = [group["lr"] for group in optimizer.param_groups]
    train = Batches(data.train, batch_size, device, drop_last=True, shared=True)
    val = Batches(data.val, max(256, batch_size), device, shared=True)
    steps = len(train) * recipe.epochs
    finite = _finite(model)
    saved = _resume(folder / "last.pt", model, optimizer)
    best = _Best(folder / "best.pt", saved.get("best_epoch", 0), saved.get("best_score", -math.inf))
    first_epoch, first_step = saved.get("epoch", 0), saved.get("step", 0)
    results.restore(saved.get("results"))
    saved_at = time.monotonic()
    share = ddp.share(batch_size)
    rank = [ddp.rank()] if ddp.rank() else []
    foreign = [
        getattr(model, "net", model),
        recipe.act,
        *([recipe.adversary.attack] if recipe.adversary else []),
    ]
    start = (first_epoch * len(train) + first_step) * batch_size

    def save(epoch: int, **within: Any) -> None:
        """Of a state after `epoch` whole epochs and, `within` the next one, some steps."""
        if not ddp.is_main():
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

    @contextmanager
    def guarded(place: str, history: Tensor) -> Iterator[None]:
        """One line for whatever stops training at `place`, after the best weights so far are written."""
        try:
            yield
        except Exception as error:
            kept = best.keep()
            if is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__)):
                reason = _NO_MEMORY.format(batch_size, max(1, batch_size // 2))
            elif isinstance(error, UserError):
                reason = _not_finite(history, model, finite) or str(error)
            else:
                raise
            raise UserError(f"training stopped at {place}: {reason}; {kept}") from error

    with progress("training", steps * batch_size, "images", start=start) as bar:
        for epoch in range(first_epoch, recipe.epochs):
            adversary = recipe.adversary
            if adversary is not None and epoch < adversary.start_epoch:
                adversary = None
            torch.manual_seed(seed_from(seed, "dropout", epoch, *rank))
            generator = stream(seed, "actions", epoch, device=device)
            augmentation = stream(seed, "augmentation", epoch, device=device)
            history = torch.zeros(len(train), 5, device=device)
            begin = first_step if epoch == first_epoch else 0
            if begin:
                history[:begin] = _restore(saved["processes"], model, generator, augmentation, device)
            model.train()
            began = time.monotonic()
            place = f"epoch {epoch + 1} of {recipe.epochs}"
            batches = train.epoch(stream(seed, "batches", epoch), begin)
            for step, (images, y) in enumerate(batches, start=begin):
                factor = learning_rate(epoch * len(train) + step, steps, recipe.schedule, recipe.warmup)
                for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
                noise, before = None, {}
                if adversary is not None:
                    noise = stream(seed, "adversary", epoch, step, device=device)
                    before = _random(generator, augmentation, device)
                with guarded(f"{place}, step {step + 1} of {len(train)}", history[:step]):
                    x = to_unit(recipe.augment(images, augmentation, share=share), hardware.memory_format)
                    try:
                        with foreign_code("model.net", *foreign), hardware.autocast():
                            outcome = train_step(
                                wrapped, x, y, recipe.act, generator,
                                adversary=adversary, noise=noise, bare_model=model,
                                probability_floor=recipe.probability_floor, share=share,
                            )  # fmt: skip
                    except signals.Stopped:  # in the adversary: this step is done again
                        if processes == 1:
                            save(epoch, step=step, processes=[before | {"history": history[:step].clone()}])
                        raise
                    optimizer.zero_grad()
                    outcome.loss.backward()  # type: ignore[no-untyped-call]
                    ddp.average([p.grad for p in model.parameters() if p.grad is not None])
                    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)
                    with foreign_code("trainer.optimizer", optimizer):
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
                ddp.sync_stop_request()
                if signals.stop_requested():
                    states = ddp.gather(_state(history[: step + 1], model, generator, augmentation))
                    with guarded(place, history[: step + 1]):
                        _check_finite(history[: step + 1], model, finite)
                    save(epoch, step=step + 1, processes=states)
                    signals.raise_if_stopped()
            seconds = time.monotonic() - began
            states = ddp.gather(_state(history, model, generator, augmentation))
            ddp.average([history])
            loss, reward, accuracy, adversarial_loss, grad_norm = history.mean(0).tolist()
            metrics = {
                "loss": loss,
                "reward": reward,
                "accuracy": accuracy,
                "grad_norm": grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
            }
            if begin < len(train):
                metrics["images_per_second"] = (len(train) - begin) * batch_size / seconds
            if adversary is not None and adversary.objective != "alone":
                metrics["adversarial_loss"] = adversarial_loss
            # Where BatchNorm has seen shares, all go on with the mean of what it has seen.
            buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
            ddp.average(buffers, differing=True)
            with guarded(place, history):
                _check_finite(history, model, finite)
                try:
                    with signals.stop_immediately(), foreign_code("model.net", *foreign):
                        scores = validate(model, val, hardware, adversary, seed)
                except signals.Stopped:  # all steps of the epoch are done, the validation is done again
                    save(epoch, step=len(train), processes=states)
                    raise
                _check_finite(history, model, finite, scores)
            results.log(metrics, n=len(data.train), split="train", step=epoch + 1)
            results.log(scores, n=len(data.val), split="val", step=epoch + 1)
            best.consider(model, epoch + 1, _score(recipe.select, scores, epoch))
            due = time.monotonic() - saved_at > _SECONDS_BETWEEN_CHECKPOINTS
            if due or epoch + 1 == recipe.epochs or signals.stop_requested():
                save(epoch + 1)
                saved_at = time.monotonic()
            signals.raise_if_stopped()
    return best.epoch


class _Best:
    """The best weights so far, in memory; written together with last.pt."""

    def __init__(self, path: Path, epoch: int, score: float) -> None:
        self.path, self.epoch, self.score = path, epoch, score
        self._weights: dict[str, Tensor] | None = None

    def consider(self, model: nn.Module, epoch: int, score: float | None) -> None:
        """Of equal scores the later wins: it has seen more. Kept off the device, whose memory training may need."""
        if score is not None and score >= self.score:
            self.epoch, self.score = epoch, score
            weights = model.state_dict().items()
            self._weights = {name: value.detach().to("cpu", copy=True) for name, value in weights}

    def write(self) -> None:
        if self._weights is not None:
            checkpoint.save({"model": self._weights, "epoch": self.epoch}, self.path)
            self._weights = None

    def keep(self) -> str:
        """Write what there is, where training has failed; returns what that is."""
        if ddp.is_main():
            self.write()
        if self.epoch == 0:
            return "there are no weights to keep yet"
        return f"the best weights so far, of epoch {self.epoch}, are kept in {self.path}"


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load last.pt, and return what it says beside the weights: how far training came; {} at the beginning."""
    if not ddp.broadcast_from_main(path.exists):
        return {}
    state: dict[str, Any] = ddp.broadcast_from_main(lambda: checkpoint.load(path))
    model.load_state_dict(state.pop("model"))
    optimizer.load_state_dict(state.pop("optimizer"))
    step = f" and step {state['step']} of the next" if state.get("step") else ""
    log.info("going on after epoch %d%s, from %s", state["epoch"], step, path)
    return state


def _random(actions: torch.Generator, augmentation: torch.Generator, device: torch.device) -> dict[str, Any]:
    """The state of every stream that an epoch goes on drawing from."""
    states = {
        "actions": actions.get_state(),
        "augmentation": augmentation.get_state(),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _state(
    history: Tensor, model: nn.Module, actions: torch.Generator, augmentation: torch.Generator
) -> dict[str, Any]:
    """What a process needs to go on within an epoch, beside what all have in common."""
    state = _random(actions, augmentation, history.device) | {"history": history.cpu().clone()}
    if ddp.world_size() > 1:  # on the CPU BatchNorm sees the share alone
        state["buffers"] = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    return state


def _restore(
    states: Sequence[dict[str, Any]],
    model: nn.Module,
    actions: torch.Generator,
    augmentation: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Go on from what `_state` was in each process; returns the history so far."""
    state = states[min(ddp.rank(), len(states) - 1)]
    actions.set_state(state["actions"])
    augmentation.set_state(state["augmentation"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    if len(states) != ddp.world_size():  # those who go on are others: with the mean, and the first one's buffers
        return torch.stack([one["history"] for one in states]).mean(0)
    for name, buffer in model.named_buffers():
        if name in state.get("buffers", {}):
            buffer.copy_(state["buffers"][name])
    history: Tensor = state["history"]
    return history


def _finite(model: nn.Module) -> Tensor:
    """bool (T,): which of the model's tensors hold nothing but finite numbers."""
    return torch.stack([tensor.isfinite().all() for tensor in model.state_dict().values()])


def _not_finite(
    history: Tensor, model: nn.Module, finite: Tensor, scores: Mapping[str, float] = MappingProxyType({})
) -> str | None:
    """What is not finite of the losses of each step, of tensors that were `finite`, and of validation's scores."""
    if (bad := ~history.isfinite().all(1)).any():
        fault = f"the loss or gradient is not finite at step {int(bad.nonzero()[0]) + 1}"
    elif (bad := finite & ~_finite(model)).any():
        fault = f"{list(model.state_dict())[int(bad.nonzero()[0])]} is not finite after step {len(history)}"
    elif names := [name for name, score in scores.items() if not math.isfinite(score)]:
        fault = f"the validation's {names[0]} is {scores[names[0]]} after step {len(history)}"
    else:
        return None
    return f"{fault}; a smaller trainer.optimizer.lr or a trainer.clip may help"


def _check_finite(
    history: Tensor, model: nn.Module, finite: Tensor, scores: Mapping[str, float] = MappingProxyType({})
) -> None:
    if (fault := _not_finite(history, model, finite, scores)) is not None:
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

    NaN where logits are not finite. Batches that the memory does not hold are halved, which changes no draw.
    """
    sums: dict[str, Any] = {}
    limit = val.batch_size

    def work(batch: int, images: Tensor, y: Tensor, rows: Tensor) -> None:
        x, y = to_unit(images[rows], hardware.memory_format), y[rows]
        with torch.no_grad():
            logits = model(x)
        found = {"accuracy": _correct(logits, y), "loss": F.cross_entropy(logits, y, reduction="sum")}
        if adversary is not None:
            generator = stream(seed, "validation", batch, device=hardware.device)
            noise = _noise(generator, images, val.share(batch))[rows]
            x_adv = adversary.attack(model, x, y, generator=noise)
            with torch.no_grad():
                found["adversarial_accuracy"] = _correct(model(x_adv), y)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value

    with evaluating(model):
        for batch, (images, y) in enumerate(val.epoch(None)):
            limit = within_memory(partial(work, batch, images, y), torch.arange(len(y)), limit)
    totals = ddp.total(torch.stack([value.double() for value in sums.values()]))
    return dict(zip(sums, (totals / val.size).tolist(), strict=True))


def _correct(logits: Tensor, y: Tensor) -> Tensor:
    """How many of the logits (B, K) are largest at the label y (B,); NaN unless all of them are finite."""
    return torch.where(logits.isfinite().all(), (logits.argmax(1) == y).sum().double(), math.nan)
