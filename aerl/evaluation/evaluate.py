"""Evaluation: predict the test images, attack them, and store every outcome as soon as it is known."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from aerl.attacks import Attack, AttackSpec, NoGradient, SampleGenerator, attacking, collect_warnings, predictions, warn
from aerl.data import Split, rows, subset, to_unit
from aerl.evaluation.integrity import ModelGuard, adversarial_images
from aerl.evaluation.metrics import BUILT_IN, Metric, measure
from aerl.evaluation.outcomes import Attacked, Outcomes, Policy, accuracy, check_within, so_far
from aerl.evaluation.resume import Saver, Stage, finished, interrupted
from aerl.runtime import ddp, signals
from aerl.runtime.device import Hardware, is_out_of_memory, seed_from
from aerl.runtime.files import load_arrays, save_arrays
from aerl.runtime.progress import progress
from aerl.tracking.run_folder import Record, unattacked
from aerl.types import UserError, foreign_code, is_foreign, named

if TYPE_CHECKING:
    from aerl.build import Parts
    from aerl.config.schema import Config

log = logging.getLogger("aerl")


# --- A run -----------------------------------------------------------------------------------------------


def evaluate(parts: "Parts", config: "Config", record: Record) -> tuple[Outcomes, Split]:
    """All attacks on the test images; returns the outcomes and the images that they are of.

    What an earlier start of this run has finished is read from its files, and an interrupted attack continues.
    """
    torch.backends.cudnn.benchmark = False  # batches shrink as samples are fooled: every size would be tuned anew
    run = _Evaluation(parts, config, record)
    if record.summary["evaluated"]:
        record.results.restore(record.summary["results"])
        return run.outcomes, run.split
    record.results.restore(record.summary["trained"])  # a killed process may have logged some of what follows
    run.log_clean()
    done = {info["of"] for info in record.summary["attacks"].values()}
    for name, attack in parts.attacks.items():
        ddp.sync_stop_request()
        signals.raise_if_stopped()
        if name in done:
            log.info("%s: was done before", name)
        else:
            run.attack(name, attack)
        run.log_attack(name)
    run.finish()
    return run.outcomes, run.split


def batch_size(parts: "Parts", config: "Config") -> int:
    """How many images go through the model at once."""
    return config.evaluation.batch_size or (512 if parts.hardware.device.type == "cuda" else 128)


class _Evaluation:
    """The evaluation of one run: the outcomes so far, and the files that hold them."""

    def __init__(self, parts: "Parts", config: "Config", record: Record) -> None:
        self.parts, self.config, self.record = parts, config, record
        self.policy, samples = config.evaluation.policy, config.evaluation.samples
        self.metrics = {**BUILT_IN, **parts.metrics}
        self.batch_size = batch_size(parts, config)
        self.split = subset(parts.data.test, samples)
        with signals.stop_immediately():
            self.clean = ddp.broadcast_from_main(
                lambda: predict(parts.model, self.split, parts.hardware, self.batch_size, metrics=self.metrics)
            )
        self.outcomes = ddp.broadcast_from_main(self._stored)
        if not self.outcomes:
            record.summary.update(unattacked())
            index = rows(len(parts.data.test), samples).numpy()
            self.outcomes = {"index": index, "label": self.split.labels.numpy(), **self.clean.columns("clean")}
            save_arrays(record.folder / "outcomes.npz", self.outcomes)

    def _stored(self) -> Outcomes:
        """What an earlier start has found; nothing where that is damaged, which is logged, and so measured again."""
        done, folder = self.record.summary["attacks"], self.record.folder
        if not (done or self.record.summary["evaluated"]):
            return {}
        try:
            outcomes, examples = load_arrays(folder / "outcomes.npz"), load_arrays(folder / "examples.npz")
            missing = [name for name in ("clean", *done) if f"{name}_pred" not in outcomes]
            missing += [name for name in done if name not in examples]
            if missing:
                raise UserError(f"{folder}: outcomes.npz or examples.npz has nothing of {', '.join(missing)}")
        except UserError as error:
            log.warning("%s; the attacks begin again", error)
            return {}
        return outcomes

    @property
    def counted(self) -> list[str]:
        return [part for part, info in self.record.summary["attacks"].items() if info["counts"]]

    def means(self, attack: str, *more: str) -> dict[str, float]:
        """The means of the configured metrics, and of `more`, over all samples."""
        names = (*more, *self.parts.metrics)
        return {f"mean_{name}": float(self.outcomes[f"{attack}_{name}"].mean()) for name in names}

    def log_clean(self) -> None:
        clean = accuracy(self.outcomes, [], self.policy)
        self.record.results.log(
            {"clean_accuracy": clean["value"], **self.means("clean")}, n=len(self.split), split="test"
        )
        self.record.save(clean_accuracy=clean)

    def attack(self, name: str, attack: AttackSpec) -> None:
        """Run one attack, or the rest of it, and store its outcomes."""
        norm, eps = attack.norm or self.config.norm, self.config.eps if attack.eps is None else attack.eps
        within = norm == self.config.norm and eps <= self.config.eps * (1 + 1e-6)  # the run's threat model
        alone = not self.config.evaluation.survivors_only or self.policy == "sample"
        before = self.clean if alone else so_far(self.outcomes, self.clean, self.counted)
        with named(f"attack.{name}"), collect_warnings() as warnings:
            attacked = self._run(name, attack, before, warnings)
            warnings = list(dict.fromkeys(chain.from_iterable(ddp.gather(warnings))))
        info = {"of": name, "norm": norm, "eps": eps, "counts": within and attack.counts, "alone": alone,
                "warnings": warnings}  # fmt: skip
        self._store(attacked, info)

    def _run(self, name: str, attack: AttackSpec, before: Attacked, warnings: list[str]) -> dict[str, Attacked]:
        """Behind a progress bar that shows the accuracy so far. The warnings of an earlier start are added."""
        model, hardware, n = self.parts.model, self.parts.hardware, len(self.split)
        resume, earlier_warnings = ddp.broadcast_from_main(lambda: interrupted(self.record.folder, name))
        warnings.extend(earlier_warnings)
        if self.policy == "sample" and attack.drop_fooled:
            log.warning("%s: stops at a wrong argmax; attack.%s.drop_fooled=false goes on", name, name)
        total = n if self.policy == "sample" else int((before.pred == self.split.labels.numpy()).sum())
        count = len(stages(attack, model, self.split, hardware))
        start = 0 if resume is None else total * (resume.number + 1) - int((resume.todo & ~resume.done).sum())
        with progress(name, total=total * count, unit="samples", start=start) as bar:
            return run_attack(
                attack, model, self.split, before, hardware,
                name=name, seed=self.config.seed, batch_size=self.batch_size, policy=self.policy, metrics=self.metrics,
                progress=lambda advanced, robust: bar.update(advanced, acc=robust / n),
                resume=resume, save=Saver(self.record.folder, name, warnings),
            )  # fmt: skip

    def _store(self, attacked: Mapping[str, Attacked], info: Mapping[str, Any]) -> None:
        """Add one attack to the outcomes and to the run folder; the summary, last, says that it is done."""
        folder, news = self.record.folder, {}
        for part, found in attacked.items():
            check_within(part, found, info["norm"], info["eps"], boxed=info["counts"])
            self.outcomes |= found.columns(part)
            robust = accuracy(self.outcomes, [part], self.policy)
            news[part] = {**info, "robust_accuracy": robust, "seconds": found.seconds}
        # The first adversarial images of each attack are for figures.
        examples = load_arrays(folder / "examples.npz") | {part: found.examples for part, found in attacked.items()}
        save_arrays(folder / "examples.npz", examples)
        save_arrays(folder / "outcomes.npz", self.outcomes)
        self.record.save(attacks=self.record.summary["attacks"] | news)
        finished(folder)

    def log_attack(self, name: str) -> None:
        for part, info in self.record.summary["attacks"].items():
            if info["of"] == name:
                values = {"robust_accuracy": info["robust_accuracy"]["value"], **self.means(part, "l2", "linf"),
                          "seconds": info["seconds"]}  # fmt: skip
                source = part.removeprefix("transfer_").removesuffix("_refined") if name == "transfer" else ""
                self.record.results.log(
                    values, n=len(self.split), split="test", attack=part, norm=info["norm"], eps=info["eps"],
                    source=source,
                )  # fmt: skip

    def finish(self) -> None:
        """Log the worst case, and say in the summary that the evaluation is complete."""
        attacks, counted = self.record.summary["attacks"], self.counted
        worst = accuracy(self.outcomes, counted, self.policy) if counted else None
        if worst is not None:
            self.record.results.log({"worst_case_accuracy": worst["value"]}, n=len(self.split), split="test")
        self.record.advance(
            robust_accuracy={part: info["robust_accuracy"]["value"] for part, info in attacks.items()},
            worst_case_accuracy=worst,
            seconds=self.record.summary["seconds"] | {"attack": sum(info["seconds"] for info in attacks.values())},
            evaluated=self.record.results.seal(),
        )


# --- The images as they are --------------------------------------------------------------------------------


def predict(
    model: nn.Module,
    split: Split,
    hardware: Hardware,
    batch_size: int,
    examples: int = 16,
    metrics: Mapping[str, Metric] = BUILT_IN,
) -> Attacked:
    """All images as they are, unattacked; fp32, eval mode. Raises UserError for what other people's code raises."""
    clean = Attacked.blank(split, metrics, examples)

    def work(index: Tensor) -> None:
        x, y = batch(split, index, hardware)
        with reproducible(0, "clean", int(index[0]), device=hardware.device):
            _record(clean, model, x, x, y, index, metrics)

    with foreign_code("model.net", getattr(model, "net", model)):
        within_memory(work, torch.arange(len(split)), batch_size)
    _warn_not_finite(clean.pred < 0)
    return clean


def _record(
    attacked: Attacked, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor,
    metrics: Mapping[str, Metric],
) -> None:  # fmt: skip
    """Enter one batch of adversarial images, and what the model makes of them, where they belong."""
    with attacking(model), torch.no_grad():
        logits = model(x_adv).float()
        values = {"pred": predictions(logits), **measure(metrics, logits, y)}
    delta = (x_adv - x).flatten(1)
    values |= {"l2": delta.norm(dim=1), "linf": delta.abs().amax(1)}
    attacked.record(index.numpy(), values, x_adv)


def _warn_not_finite(samples: np.ndarray) -> None:
    if count := int(samples.sum()):
        warn(f"{count} images have logits that are not finite; they count as wrong")


def batch(split: Split, index: Tensor, hardware: Hardware) -> tuple[Tensor, Tensor]:
    """Images float32 in [0, 1] (b, C, H, W) and labels (b,) of the samples `index` (b,), on the device."""
    x = to_unit(split.images[index].to(hardware.device), hardware.memory_format)
    return x, split.labels[index].to(hardware.device)


@contextmanager
def reproducible(*words: int | str, device: torch.device) -> Iterator[None]:
    """Seed the global random stream from `words`, for models that draw from it, and restore it afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_from(*words))
        yield


def within_memory(work: Callable[[Tensor], None], index: Tensor, limit: int) -> int:
    """Do `work` on all samples of `index` (n,), at most `limit` at a time; returns the limit that sufficed.

    Where the memory does not suffice, the limit is halved, which is a warning, and the work is repeated. Raises
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


# --- One attack --------------------------------------------------------------------------------------------


def stages(attack: AttackSpec, model: nn.Module, split: Split, hardware: Hardware) -> Sequence[Attack]:
    """The attacks of which `attack` consists, each for the samples that the ones before have left."""
    if attack.stages is None:
        return [attack.call]
    with foreign_code("stages", attack.call, getattr(model, "net", model)):
        found = attack.stages(model, batch(split, torch.arange(0), hardware)[0])
        if not found:
            raise UserError(f"stages returned {found}: expected attacks")
        return found


def run_attack(
    attack: Attack | AttackSpec,
    model: nn.Module,
    split: Split,
    before: Attacked,
    hardware: Hardware,
    *,
    name: str,
    seed: int,
    batch_size: int,
    policy: Policy = "argmax",
    metrics: Mapping[str, Metric] = BUILT_IN,
    progress: Callable[[int, int], None] = lambda advanced, robust: None,
    resume: Stage | None = None,
    save: Callable[[Stage], None] = lambda stage: None,
) -> dict[str, Attacked]:
    """Attack every sample that is right in `before`; the others are lost already and stay as they are there.

    Returns one `Attacked` under `name`, or one per part under `<name>_<part>` if the attack returns a dict.
    With policy="sample" no sample is ever surely lost, and all are attacked. After every batch `save` gets the
    state, from which `resume` continues, and `progress` the number of samples done since the last call and of
    those still right (with stages, each sample counts once in each).

    Random numbers are keyed by the image, so that neither the batch size nor the order of samples changes an
    outcome. An attack whose batches do matter, such as AutoAttack, states its own `batch_size`.

    An attack is not trusted: it gets copies, and the outcomes are those of the images as the data has them, of a
    copy of what it returned, and of an unaltered model. Raises UserError for an attack that returns anything but
    images like those it got (or a dict of them, with the same names for every batch) or alters the model, and for
    what other people's code raises.
    """
    key = f"attack.{name}"
    attack = AttackSpec.of(attack, key)
    labels = split.labels.numpy()
    calls = stages(attack, model, split, hardware)
    limit = size = attack.batch_size or batch_size
    guard = ModelGuard(model) if is_foreign(attack.call) else None
    todo = np.ones(len(split), bool) if policy == "sample" else before.pred == labels
    state = resume or Stage(0, todo, np.zeros(len(split), bool))
    began = time.monotonic() - state.seconds

    def work(index: Tensor) -> None:
        x, y = batch(split, index, hardware)
        with attacking(model), reproducible(seed, name, state.number, int(index[0]), device=hardware.device):
            noise = SampleGenerator.for_images(x, seed=seed, salt=name)
            # The state after the last batch is saved; a batch that a signal cuts short is repeated.
            with guard.unaltered(x, key) if guard else nullcontext(), signals.stop_immediately():
                returned = calls[state.number](model, x.clone(), y.clone(), generator=noise)
            images = {f"{name}_{part}" if part else name: own for part, own in adversarial_images(returned, x, key)}
            if state.parts and images.keys() != state.parts.keys():
                found, expected = (", ".join(sorted(parts)) for parts in (images, state.parts))
                raise UserError(f"{key}: returned {found}: expected, as for other images, {expected}")
            for part, x_adv in images.items():
                _record(state.parts.setdefault(part, before.copy()), model, x, x_adv, y, index, metrics)

    while True:
        for mine in _rounds(state, size):
            fault = None
            try:
                with foreign_code(key, attack.call, getattr(model, "net", model)):
                    limit = within_memory(work, torch.from_numpy(mine), limit)
            except UserError as error:
                fault = error
            if not _has_gradient(fault):
                warn(f"not run: {NoGradient()}")
                break  # to the next stage, which may be a black-box attack
            count = _exchange(state, mine, before)
            state.seconds = time.monotonic() - began
            progress(count, int(state.robust(labels).sum()))
            ddp.sync_stop_request()
            save(state)
        if state.number + 1 == len(calls):
            break
        state = state.next(labels)
        survivors = int(state.todo.sum())
        progress(int(todo.sum()) - survivors, survivors)
    for attacked in state.parts.values():
        attacked.seconds = state.seconds / len(state.parts)
        _warn_not_finite((attacked.pred < 0) & (before.pred >= 0))
    return state.parts or {name: before.copy()}


def _has_gradient(fault: UserError | None) -> bool:
    """Raise on every process what one of them raised; False where all that is missing is a gradient."""
    faults = ddp.gather((isinstance(fault, NoGradient), fault and str(fault)))
    for no_gradient, text in faults:
        if text and not no_gradient:
            raise UserError(text) from fault
    return not any(no_gradient for no_gradient, _ in faults)


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
    """Enter what the processes have found in this round, each for its samples; returns how many those were."""
    first = mine[mine < len(before.examples)]
    news = {
        part: ({key: values[mine] for key, values in found.samples.items()}, found.examples[first], found.outside)
        for part, found in state.parts.items()
    }
    count = 0
    for index, shown, theirs in ddp.gather((mine, first, news)):
        for part, (columns, examples, outside) in theirs.items():
            found = state.parts.setdefault(part, before.copy())
            for key, values in columns.items():
                found.samples[key][index] = values
            found.examples[shown] = examples
            found.outside = max(found.outside, outside)
        state.done[index] = True
        count += len(index)
    return count
