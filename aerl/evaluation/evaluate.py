"""Per-sample outcomes of every attack, their worst case, and confidence intervals."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from aerl.attacks import NoGradient, SampleGenerator, attacking, predictions, warn
from aerl.data import Split, to_unit
from aerl.evaluation.statistics import proportion
from aerl.runtime import ddp, signals
from aerl.runtime.device import Hardware, is_out_of_memory, seed_from
from aerl.types import UserError, foreign_code, is_foreign

Attack = Callable[..., Tensor | dict[str, Tensor]]
Outcomes = dict[str, np.ndarray]
Policy = Literal["argmax", "sample"]
PER_SAMPLE = ("pred", "p", "confidence", "entropy", "l2", "linf")


@dataclass
class Attacked:
    """What one attack, or none, makes of all samples.

    pred int64 (N,), the class of the largest logit; of the softmax, p float32 (N,), the probability of the
    label, confidence float32 (N,), the largest probability, and entropy float32 (N,), in bits; l2 and linf
    float32 (N,), the perturbation's size in units of the images' range. Where a logit is not finite, pred is -1,
    so that the sample is wrong, and p, confidence and entropy are 0. `examples` float32
    (k, C, H, W) are the first k images as attacked, `outside` how far any pixel left [0, 1], `seconds` of
    wall time.
    """

    pred: np.ndarray
    p: np.ndarray
    confidence: np.ndarray
    entropy: np.ndarray
    l2: np.ndarray
    linf: np.ndarray
    examples: np.ndarray
    outside: float = 0.0
    seconds: float = 0.0

    def copy(self) -> "Attacked":
        """The same samples, to be attacked further."""
        arrays = {key: getattr(self, key).copy() for key in (*PER_SAMPLE, "examples")}
        return replace(self, **arrays, outside=0.0, seconds=0.0)


@dataclass
class Stage:
    """How far an interrupted attack has come: what a rerun needs to go on as if nothing had happened.

    `todo` bool (N,) are the samples of this stage, `done` those of them that have been attacked.
    """

    number: int
    todo: np.ndarray
    done: np.ndarray
    seconds: float
    parts: dict[str, Attacked]


def predict(model: nn.Module, split: Split, hardware: Hardware, batch_size: int, examples: int = 16) -> Attacked:
    """All images as they are, unattacked; fp32, eval mode. Raises UserError for what other people's code raises."""
    first = to_unit(split.images[:examples]).numpy()
    n = len(split)
    p, confidence, entropy, l2, linf = (np.zeros(n, np.float32) for _ in PER_SAMPLE[1:])
    clean = Attacked(np.zeros(n, np.int64), p, confidence, entropy, l2, linf, first)

    def work(index: Tensor) -> None:
        x, y = batch(split, index, hardware)
        with reproducible(0, "clean", int(index[0]), device=hardware.device):
            _record(clean, model, x, x, y, index)

    with foreign_code("model.net", getattr(model, "net", model)):
        within_memory(work, torch.arange(n), batch_size)
    _warn_not_finite(clean.pred < 0)
    return clean


def _warn_not_finite(rows: np.ndarray) -> None:
    if count := int(rows.sum()):
        warn(f"{count} images have logits that are not finite; they count as wrong")


def within_memory(work: Callable[[Tensor], None], index: Tensor, limit: int) -> int:
    """Do `work` on all samples of `index` (n,), at most `limit` at a time; returns the limit that sufficed.

    Where the memory does not, the limit is halved, which is said once, and the work repeated. Raises
    UserError where not even one sample fits.
    """
    while len(index):
        part = index[:limit]
        try:
            work(part)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise UserError(
                    "out of memory: the device does not hold the pass of a single image; hardware.device=cpu, a "
                    "smaller dataset.size or a smaller model.net needs less"
                ) from error
            limit = len(part) // 2
            warn(
                f"out of memory with {len(part)} images at a time (a randomised model, or an attack that states its "
                f"own batch_size, then draws other numbers); went on with {limit}"
            )
        else:
            index = index[limit:]
            continue
        torch.cuda.empty_cache()  # now that the error holds no tensors; does nothing where CUDA is not in use
    return limit


def batch(split: Split, index: Tensor, hardware: Hardware) -> tuple[Tensor, Tensor]:
    x = to_unit(split.images[index].to(hardware.device), hardware.memory_format)
    return x, split.labels[index].to(hardware.device)


@contextmanager
def reproducible(*words: int | str, device: torch.device) -> Iterator[None]:
    """A randomised model draws from the global stream: it gets the same one in a rerun, and leaves no trace."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_from(*words))
        yield


def stages(attack: Attack, model: nn.Module, split: Split, hardware: Hardware) -> Sequence[Attack]:
    """The attacks of which `attack` consists, each for the samples that the ones before have left."""
    parts = getattr(attack, "stages", None)
    if parts is None:
        return [attack]
    with foreign_code("stages", attack, getattr(model, "net", model)):
        found: Sequence[Attack] = parts(model, batch(split, torch.arange(0), hardware)[0])
        if not found:
            raise UserError(f"stages returned {found}: expected attacks")
        return found


def run_attack(
    attack: Attack,
    model: nn.Module,
    split: Split,
    before: Attacked,
    hardware: Hardware,
    *,
    name: str,
    seed: int,
    batch_size: int,
    policy: Policy = "argmax",
    progress: Callable[[int, int], None] = lambda advanced, robust: None,
    resume: Stage | None = None,
    keep: Callable[[Stage], None] = lambda stage: None,
) -> dict[str, Attacked]:
    """Attack every sample that is right in `before`; the others are lost already and stay as they are there.

    Returns one `Attacked` under `name`, or one per part under `<name>_<part>` if the attack returns a dict.
    With policy="sample" no sample is ever surely lost, and all are attacked. After every batch `keep` is
    given the state, from which `resume` goes on, and `progress` the number of samples done since the last
    call and of those still right (with stages, each sample counts once in each).

    Random numbers are keyed by the image, so that neither the batch size nor the order of samples changes an
    outcome; an attack whose batches do matter, such as AutoAttack, states its own `batch_size`, which is
    kept to.

    An attack is not trusted: it gets copies, and the outcomes are those of the images as the data has them, of a
    copy of what it returned, and of a model that it has left alone. Raises UserError for an attack that returns
    anything but images like those it got (or a dict of them, with the same names for every batch) or alters the
    model, and for what other people's code raises.
    """
    key = f"attack.{name}"
    labels = split.labels.numpy()
    attacks = stages(attack, model, split, hardware)
    size = setting(attack, "batch_size", None) or batch_size
    todo = np.ones(len(split), bool) if policy == "sample" else before.pred == labels
    state = resume or Stage(0, todo, np.zeros(len(split), bool), 0.0, {})
    began = time.monotonic() - state.seconds
    weights = _tensors(model, clone=True) if is_foreign(attack) else None

    def robust() -> np.ndarray:
        still: np.ndarray = np.logical_and.reduce([todo, *(a.pred == labels for a in state.parts.values())])
        return still

    def work(index: Tensor) -> None:
        x, y = batch(split, index, hardware)
        with attacking(model), reproducible(seed, name, state.number, int(index[0]), device=hardware.device):
            noise = SampleGenerator.for_images(x, seed=seed, salt=name)
            layers = [] if weights is None else _layers(model)
            with signals.stop_immediately():  # the state of the last batch is kept; this one is done again
                found = attacks[state.number](model, x.clone(), y.clone(), generator=noise)
            if weights is not None:
                _check_unaltered(model, weights, layers, x, key)
            images = {f"{name}_{part}" if part else name: own for part, own in _returned(found, x, key)}
            if state.parts and images.keys() != state.parts.keys():
                names = [", ".join(sorted(these)) or "nothing" for these in (images, state.parts)]
                raise UserError(f"{key}: returned {names[0]}: expected, as for other images, {names[1]}")
            for part, x_adv in images.items():
                _record(state.parts.setdefault(part, before.copy()), model, x, x_adv, y, index)

    limit = size
    while True:
        for mine in _rounds(state, size):
            fault = None
            try:
                with foreign_code(key, attack, getattr(model, "net", model)):
                    limit = within_memory(work, torch.from_numpy(mine), limit)
            except UserError as error:
                fault = error
            faults = ddp.gather((isinstance(fault, NoGradient), fault and str(fault)))
            for no_gradient, told in faults:
                if told and not no_gradient:
                    raise UserError(told) from fault
            if any(no_gradient for no_gradient, _ in faults):
                warn(f"not run: {NoGradient()}")
                break  # to the next stage: a black-box one can still judge the model
            count = _exchange(state, mine, before)
            state.seconds = time.monotonic() - began
            progress(count, int(robust().sum()))
            ddp.sync_stop_request()
            keep(state)
        if state.number + 1 == len(attacks):
            break
        survivors = robust()
        progress(int(todo.sum() - survivors.sum()), int(survivors.sum()))
        state = Stage(state.number + 1, survivors, np.zeros(len(split), bool), state.seconds, state.parts)
    for attacked in state.parts.values():
        attacked.seconds = state.seconds / len(state.parts)
        _warn_not_finite((attacked.pred < 0) & (before.pred >= 0))
    return state.parts or {name: before.copy()}


def _rounds(state: Stage, size: int) -> Iterator[np.ndarray]:
    """The samples still to be done, in batches of at most `size`: of every round of them, this process's batch.

    The batches are the same for any number of processes. Where there is none left for this one it is empty.
    """
    batches = [rows.numpy() for rows in torch.split(torch.from_numpy(np.flatnonzero(state.todo)), size)]
    batches = [left for rows in batches if len(left := rows[~state.done[rows]])]
    for first in range(0, len(batches), ddp.world_size()):
        place = first + ddp.rank()
        yield batches[place] if place < len(batches) else np.zeros(0, np.int64)


def _exchange(state: Stage, mine: np.ndarray, before: Attacked) -> int:
    """Note what the processes have found in this round, each for its samples; returns how many those were."""
    first = mine[mine < len(before.examples)]
    news = {
        part: ({key: getattr(found, key)[mine] for key in PER_SAMPLE}, found.examples[first], found.outside)
        for part, found in state.parts.items()
    }
    count = 0
    for rows, shown, told in ddp.gather((mine, first, news)):
        for part, (columns, examples, outside) in told.items():
            found = state.parts.setdefault(part, before.copy())
            for key, values in columns.items():
                getattr(found, key)[rows] = values
            found.examples[shown] = examples
            found.outside = max(found.outside, outside)
        state.done[rows] = True
        count += len(rows)
    return count


def _returned(found: Any, x: Tensor, key: str) -> Iterator[tuple[str, Tensor]]:
    """The parts of what an attack returned for images x (B, C, H, W): each its name, "" for a tensor alone, and a
    copy like x. Raises UserError where it is anything else than images, or has pixels that are not finite."""
    if not isinstance(found, dict):
        found = {"": found}
    if not found or not all(isinstance(part, str) and re.fullmatch(r"[\w.-]*", part) for part in found):
        raise UserError(f"{key}: returned parts {list(found)}: expected names of letters, digits and any of _.-")
    for part, images in found.items():
        where = f"{key}: returned " + (f"as {part} " if part else "")
        if not isinstance(images, Tensor):
            raise UserError(f"{where}a {type(images).__name__}: expected a tensor of images, or a dict of them")
        if images.shape != x.shape:
            raise UserError(f"{where}images of shape {tuple(images.shape)}: expected {tuple(x.shape)}")
        if not images.is_floating_point():
            raise UserError(f"{where}images of {images.dtype}: expected torch.float32, in [0, 1]")
        own = torch.empty_like(x)
        with torch.no_grad():
            own.copy_(images)
        if bad := int((~own.isfinite()).flatten(1).any(1).sum()):
            raise UserError(f"{where}NaN or infinite pixels in {bad} of {len(x)} images: expected [0, 1]")
        yield part, own


def _tensors(model: nn.Module, *, clone: bool = False) -> dict[str, Tensor]:
    """Every parameter and buffer, by its name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()} if clone else tensors


def _layers(model: nn.Module) -> list[Any]:
    """Of every layer what an attack could exchange: itself, its mode, what it computes and its hooks."""
    return [
        (name, id(layer), layer.training, vars(layer).get("forward"), vars(type(layer)).get("forward"),
         [tuple(hooks) for hooks in (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks)])
        for name, layer in model.named_modules()
    ]  # fmt: skip


def _check_unaltered(model: nn.Module, weights: dict[str, Tensor], layers: list[Any], x: Tensor, key: str) -> None:
    """UserError if the model has other `weights` or `layers` than before the attack.

    Values are compared, not tensors' versions, which `.data` leaves as they are; that costs less than a pass. A
    buffer that the model itself changes in every pass (BatchNorm that is still in training) is left to the probe.
    """
    altered = _differing(_tensors(model), weights)
    if altered and set(altered) <= dict(model.named_buffers()).keys():
        before = _tensors(model, clone=True)
        with torch.no_grad(), reproducible(0, key, device=x.device):
            model(x)
        own = _differing(_tensors(model), before)
        weights |= {name: before[name] for name in own}
        altered = [name for name in altered if name not in own]
    if _layers(model) != layers:
        altered.append("layers, their modes or hooks")
    if altered:
        raise UserError(f"{key}: altered the model ({altered[0]}): expected to leave it as it is; nothing is counted")


def _differing(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[str]:
    """The names under which the two do not have the same values, in the same form."""

    def same(one: Tensor, other: Tensor) -> bool:
        form = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (one, other)]
        return form[0] == form[1] and (torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num()))

    both = tensors.keys() & others.keys()
    return [name for name in {**tensors, **others} if name not in both or not same(tensors[name], others[name])]


def _record(attacked: Attacked, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor) -> None:
    """Put one batch of adversarial images, and what the model says of them, where they belong."""
    with attacking(model), torch.no_grad():
        logits = model(x_adv).float()
    pred = predictions(logits)
    rows = index.numpy()  # NumPy takes a tensor of one index for a number
    delta = (x_adv - x).flatten(1)
    attacked.pred[rows] = pred.cpu().numpy()
    softmax = logits.softmax(1).where(pred[:, None] >= 0, 0)
    attacked.p[rows] = softmax.gather(1, y[:, None]).squeeze(1).cpu().numpy()
    attacked.confidence[rows] = softmax.amax(1).cpu().numpy()
    attacked.entropy[rows] = (torch.special.entr(softmax).sum(1) / math.log(2)).cpu().numpy()
    attacked.l2[rows] = delta.norm(dim=1).cpu().numpy()
    attacked.linf[rows] = delta.abs().amax(1).cpu().numpy()
    attacked.outside = max(attacked.outside, -x_adv.min().item(), x_adv.max().item() - 1)
    shown = rows < len(attacked.examples)
    attacked.examples[rows[shown]] = x_adv.cpu().numpy()[shown]


def setting(attack: Attack, key: str, default: Any) -> Any:
    """A setting of a built attack: of a function's bound keywords, or of an instance."""
    return attack.keywords.get(key, default) if isinstance(attack, partial) else getattr(attack, key, default)


def accuracy(
    outcomes: Mapping[str, np.ndarray], attacks: Sequence[str] = (), policy: Policy = "argmax"
) -> dict[str, float]:
    """Mean reward clean and under the worst, per sample, of `attacks`, with its 95 % interval."""
    rewards = reward(outcomes, attacks, policy)
    return proportion(float(rewards.sum()), len(rewards))


def reward(outcomes: Mapping[str, np.ndarray], attacks: Sequence[str] = (), policy: Policy = "argmax") -> np.ndarray:
    """float (N,): the least reward of each sample, clean and under every one of `attacks`.

    A model that deploys the class of its largest logit earns 1 where that is right under all of them. One
    that draws its class from the softmax earns, in expectation, the probability of the label.
    """
    if policy == "sample":
        least: np.ndarray = np.minimum.reduce([outcomes[f"{name}_p"] for name in ("clean", *attacks)])
        return least
    return right(outcomes, attacks).astype(float)


def right(outcomes: Mapping[str, np.ndarray], attacks: Sequence[str] = ()) -> np.ndarray:
    """bool (N,): classified rightly clean and under every one of `attacks`."""
    survived: np.ndarray = outcomes["clean_pred"] == outcomes["label"]
    for name in attacks:
        survived = survived & (outcomes[f"{name}_pred"] == outcomes["label"])
    return survived


def attack_names(outcomes: Mapping[str, np.ndarray]) -> list[str]:
    """The attacks that `outcomes` holds, in the order they were run."""
    return [key.removesuffix("_pred") for key in outcomes if key.endswith("_pred") and key != "clean_pred"]


def so_far(outcomes: Mapping[str, np.ndarray], clean: Attacked, attacks: Sequence[str]) -> Attacked:
    """Every sample as the first of `attacks` to fool it left it, or unperturbed."""
    state, survived = clean.copy(), right(outcomes)
    for name in attacks:
        fooled = survived & (outcomes[f"{name}_pred"] != outcomes["label"])
        for key in PER_SAMPLE:
            getattr(state, key)[fooled] = outcomes[f"{name}_{key}"][fooled]
        survived &= ~fooled
    return state


def check_within(name: str, attacked: Attacked, norm: str, eps: float, boxed: bool = True) -> None:
    """An attack that left its ball, or with `boxed` the box [0, 1], proves nothing: a UserError says how far."""
    reached = float((attacked.l2 if norm == "L2" else attacked.linf).max(initial=0.0))
    if not reached <= eps * (1 + 1e-4) + 1e-6:
        raise UserError(
            f"attack.{name}: left its {norm} ball: a perturbation of {reached:.6g} where eps is {eps:.6g}; "
            "its result is not counted"
        )
    if boxed and not attacked.outside <= 1e-6:
        raise UserError(
            f"attack.{name}: left the box: a pixel lies {attacked.outside:.6g} outside [0, 1]; "
            "its result is not counted"
        )
