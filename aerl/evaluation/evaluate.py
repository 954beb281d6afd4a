"""Evaluation: predict the test images, attack them, and store every outcome as soon as it is known."""

import copy
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from aerl.attacks import Attack, AttackSpec, NoGradient, SampleGenerator, attacking, collect_warnings, predictions, warn
from aerl.data import Split, rows, subset, to_unit
from aerl.errors import UserError, foreign_code, is_foreign, named
from aerl.evaluation import evidence
from aerl.evaluation.evidence import Evidence
from aerl.evaluation.memory import within_memory
from aerl.evaluation.metrics import BUILT_IN, Metric, measure
from aerl.evaluation.outcomes import DISTANCES, Attacked, Batch, Outcomes, accuracy, check_within, so_far, within_eps
from aerl.evaluation.resume import Saver, Stage, finished, interrupted
from aerl.evaluation.statistics import Policy, right
from aerl.runtime import ddp, signals
from aerl.runtime.device import Hardware, seed_from
from aerl.runtime.files import load_arrays, save_arrays
from aerl.runtime.progress import progress
from aerl.tracking.run_folder import Record, unattacked

if TYPE_CHECKING:
    from aerl.build import Parts
    from aerl.config.schema import Config

log = logging.getLogger("aerl")

_FIRST = 16  # images, from which an attack may choose its stages
PASSES = 32  # of a randomised model, over which each outcome is a mean


# --- A run -----------------------------------------------------------------------------------------------


def evaluate(parts: "Parts", config: "Config", record: Record) -> tuple[Outcomes, Split]:
    """Run all attacks on the test images; returns the outcomes and these images.

    What an earlier start of this run has finished is read from its files, and an interrupted attack resumes.
    """
    torch.backends.cudnn.benchmark = False  # it would tune every size of batch, and batches shrink
    folder, policy = record.folder, config.evaluation.policy
    split, metrics = subset(parts.data.test, config.evaluation.samples), {**BUILT_IN, **parts.metrics}
    outcomes = ddp.broadcast_from_main(lambda: _stored(record))
    if outcomes and record.summary["evaluated"]:
        record.results.restore(record.summary["results"])
        return outcomes, split
    with signals.stop_immediately():
        passes = ddp.broadcast_from_main(
            lambda: PASSES if is_randomised(parts.model, first_images(split, parts.hardware)) else 1
        )
        clean = ddp.broadcast_from_main(
            lambda: predict(
                parts.model, split, parts.hardware, batch_size(parts, config), metrics=metrics, passes=passes
            )
        )
    if not outcomes:
        record.summary.update(unattacked(), passes=passes)
        evidence.discard(folder, evidence.NAME)
        index = rows(len(parts.data.test), config.evaluation.samples).numpy()
        outcomes = {"index": index, "label": split.labels.numpy(), **clean.columns("clean")}
        save_arrays(folder / "outcomes.npz", outcomes)

    record.results.restore(record.summary["trained"])  # a killed process may have logged some of what follows
    clean_accuracy = accuracy(outcomes, [], policy)
    means = {f"mean_{name}": outcomes[f"clean_{name}"].mean() for name in parts.metrics}
    record.results.log({"clean_accuracy": clean_accuracy["value"], **means}, n=len(split), split="test")
    record.save(clean_accuracy=clean_accuracy)
    for name, attack in parts.attacks.items():
        ddp.sync_stop_request()
        signals.raise_if_stopped()
        if any(info["of"] == name for info in record.summary["attacks"].values()):
            log.info("%s: already done", name)
        else:
            _attack(name, attack, parts, config, record, split, clean, outcomes, passes)
        for part, info in record.summary["attacks"].items():
            if info["of"] == name:
                means = {f"mean_{key}": outcomes[f"{part}_{key}"].mean() for key in (*DISTANCES, *parts.metrics)}
                values = {"robust_accuracy": info["robust_accuracy"]["value"], **means, "seconds": info["seconds"]}
                transferred = name.partition("_eps")[0] == "transfer"
                source = part.removeprefix(f"{name}_").removesuffix("_refined") if transferred else ""
                threat = {"norm": info["norm"], "eps": info["eps"]}
                record.results.log(values, n=len(split), split="test", attack=part, source=source, **threat)

    attacks = record.summary["attacks"]
    counted = [part for part, info in attacks.items() if info["counts"]]
    worst = accuracy(outcomes, counted, policy) if counted else None
    if ddp.is_main():
        evidence.finish(folder, outcomes, counted)
    if worst is not None:
        record.results.log({"worst_case_accuracy": worst["value"]}, n=len(split), split="test")
    by_eps = []
    for eps in config.radii if counted else ():
        by_eps.append({"eps": eps, **accuracy(outcomes, within_eps(attacks, counted, eps), policy)})
        record.results.log(
            {"worst_case_accuracy": by_eps[-1]["value"]}, n=len(split), split="test", attack=f"worst_eps{eps:.6g}",
            norm=config.norm, eps=eps,
        )  # fmt: skip
    record.advance(
        worst_case_by_eps=by_eps,
        robust_accuracy={part: info["robust_accuracy"]["value"] for part, info in attacks.items()},
        worst_case_accuracy=worst,
        seconds=record.summary["seconds"] | {"attack": sum(info["seconds"] for info in attacks.values())},
        evaluated=record.results.seal(),
    )
    return outcomes, split


def batch_size(parts: "Parts", config: "Config") -> int:
    """How many images go through the model at once."""
    return config.evaluation.batch_size or (512 if parts.hardware.device.type == "cuda" else 128)


def _stored(record: Record) -> Outcomes:
    """The outcomes of an earlier start; nothing if they are damaged, which is logged."""
    done = record.summary["attacks"]
    if not (done or record.summary["evaluated"]):
        return {}
    try:
        outcomes, examples = (load_arrays(record.folder / f"{name}.npz") for name in ("outcomes", "examples"))
        missing = [name for name in ("clean", *done) if f"{name}_pred" not in outcomes]
        missing += [name for name in done if name not in examples]
        if missing:
            raise UserError(f"{record.folder}: outcomes.npz or examples.npz lacks {', '.join(missing)}")
    except UserError as error:
        log.warning("%s; the attacks start again", error)
        return {}
    return outcomes


def _attack(
    name: str, attack: AttackSpec, parts: "Parts", config: "Config", record: Record, split: Split, clean: Attacked,
    outcomes: Outcomes, passes: int,
) -> None:  # fmt: skip
    """Run one attack, or the rest of it, and add it to `outcomes` and to the run folder: last to the summary."""
    folder, policy, attacks = record.folder, config.evaluation.policy, record.summary["attacks"]
    norm, eps = attack.norm or config.norm, config.eps if attack.eps is None else attack.eps
    within = norm == config.norm and eps <= config.eps * (1 + 1e-6)  # the run's threat model
    alone = not config.evaluation.survivors_only or policy == "sample"
    counted = [part for part, info in attacks.items() if info["counts"]]
    before = clean if alone else so_far(outcomes, clean, counted)
    counts, keep = within and attack.counts, None
    n, total = len(split), len(split) if policy == "sample" else int(before.standing(split.labels.numpy()).sum())
    with named(f"attack.{name}"), collect_warnings() as warnings:
        resume, earlier_warnings = ddp.broadcast_from_main(lambda: interrupted(folder, name))
        warnings.extend(earlier_warnings)
        if policy == "sample" and attack.drop_fooled:
            log.warning("%s: stops at the first wrong argmax; set attack.%s.drop_fooled=false", name, name)
        runs = stages(attack, parts.model, split, parts.hardware)
        if attack.stages is not None and not any(stage == "" for stage, _ in runs):
            log.info("%s: %s", name, " -> ".join(stage for stage, _ in runs) or "the model needs none of its remedies")
        count = len(runs)
        shape = split.images.shape[1:]
        if counts and evidence.wanted(config.evaluation.evidence, n, shape):
            fresh = right(outcomes, counted)
            for attacked in resume.parts.values() if resume else ():
                fresh &= attacked.pred == outcomes["label"]
            keep = Evidence(folder, n, shape, fresh).keep if ddp.is_main() else _keep_nothing
        # Every stage is a share of each sample.
        start = 0 if resume is None else total * (resume.number + 1) - int((resume.todo & ~resume.done).sum())
        with progress(name, total=total, unit="samples", start=start / max(count, 1)) as bar:
            found = run_attack(
                attack, parts.model, split, before, parts.hardware, name=name, seed=config.seed,
                batch_size=batch_size(parts, config), policy=policy, metrics={**BUILT_IN, **parts.metrics},
                passes=passes, keep=keep, resume=resume, save=Saver(folder, name, warnings),
                progress=lambda advanced, robust: bar.update(advanced / count, acc=robust / n),
            )  # fmt: skip
        warnings = list(dict.fromkeys(chain.from_iterable(ddp.gather(warnings))))
    news = {}
    for part, attacked in found.items():
        check_within(part, attacked, norm, eps, boxed=counts)
        outcomes |= attacked.columns(part)
        news[part] = {
            "of": name, "norm": norm, "eps": eps, "counts": counts, "alone": alone, "warnings": warnings,
            "robust_accuracy": accuracy(outcomes, [part], policy), "seconds": attacked.seconds,
        }  # fmt: skip
    examples = load_arrays(folder / "examples.npz") | {part: attacked.examples for part, attacked in found.items()}
    save_arrays(folder / "examples.npz", examples)
    save_arrays(folder / "outcomes.npz", outcomes)
    record.save(attacks=attacks | news)
    finished(folder)


def _keep_nothing(rows: np.ndarray, images: np.ndarray) -> None:
    """The first process keeps the evidence of all."""


# --- The clean images ------------------------------------------------------------------------------------


def predict(
    model: nn.Module, split: Split, hardware: Hardware, batch_size: int, examples: int = 16,
    metrics: Mapping[str, Metric] = BUILT_IN, passes: int = 1,
) -> Attacked:  # fmt: skip
    """All images unattacked; fp32, eval mode. UserError for what other people's code raises."""
    clean = Attacked.blank(split, [*metrics, *["right"] * (passes > 1)], examples)

    def work(index: Tensor) -> None:
        x, y = batch(split, index, hardware)
        with reproducible(0, "clean", int(index[0]), device=hardware.device):
            clean.record(_outcome(model, x, x, y, index.numpy(), metrics, passes, examples))

    with foreign_code("model.net", getattr(model, "net", model)):
        within_memory(work, torch.arange(len(split)), batch_size)
    _warn_not_finite(clean.pred < 0)
    return clean


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


def first_images(split: Split, hardware: Hardware) -> Tensor:
    """The images from which an attack may choose its stages."""
    return batch(split, torch.arange(min(_FIRST, len(split))), hardware)[0]


def is_randomised(model: nn.Module, x: Tensor) -> bool:
    """Whether the logits of images x (B, C, H, W) differ between two passes by more than 1 % of their spread."""
    with attacking(model), torch.no_grad(), foreign_code("model.net", getattr(model, "net", model)):
        with reproducible(0, "randomised", device=x.device):
            one, other = model(x).float(), model(x).float()
        return bool(((one - other).abs().amax(1) > 0.01 * (one.amax(1) - one.amin(1))).any())


def _outcome(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, rows: np.ndarray, metrics: Mapping[str, Metric],
    passes: int, examples: int, keep: bool = False,
) -> Batch:  # fmt: skip
    """The outcome of a batch of adversarial images; `keep` the images of all samples that are wrong."""
    with attacking(model), torch.no_grad():
        logits = [model(x_adv).float() for _ in range(passes)]
        found = torch.stack([predictions(each) for each in logits])
        measured = [measure(metrics, each, y) for each in logits]
    values = {"pred": found[0], **measured[0]}
    if passes > 1:
        values = {key: torch.stack([each[key] for each in measured]).mean(0) for key in measured[0]}
        values |= {"pred": found.mode(0).values, "right": (found == y).float().mean(0)}
    delta = (x_adv - x).flatten(1)
    values |= {"l1": delta.abs().sum(1), "l2": delta.norm(dim=1), "linf": delta.abs().amax(1)}
    outside = max(-x_adv.min().item(), x_adv.max().item() - 1)
    kept = (torch.from_numpy(rows < examples).to(y.device) | (keep & (values["pred"] != y))).nonzero().squeeze(1)
    columns = {key: column.cpu().numpy() for key, column in values.items()}
    return Batch(rows, columns, rows[kept.cpu().numpy()], x_adv[kept].float().cpu().numpy(), outside)


def _warn_not_finite(samples: np.ndarray) -> None:
    if count := int(samples.sum()):
        warn(f"{count} images have logits that are not finite; they count as wrong")


# --- One attack --------------------------------------------------------------------------------------------


def stages(attack: AttackSpec, model: nn.Module, split: Split, hardware: Hardware) -> list[tuple[str, Attack]]:
    """The attacks of which `attack` consists, each for the samples that withstood the ones before, and their names."""
    if attack.stages is None:
        return [("", attack.call)]
    first = first_images(split, hardware)
    with (
        foreign_code("stages", attack.call, getattr(model, "net", model)),
        attacking(model),
        reproducible(0, "stages", device=hardware.device),  # the same ones in every process, and after an interruption
    ):
        found = attack.stages(model, first)
        if isinstance(found, Mapping):
            return list(found.items())
        if not found:
            raise UserError(f"stages returned {found}: expected attacks")
        return [("", each) for each in found]


def run_attack(
    attack: Attack | AttackSpec, model: nn.Module, split: Split, before: Attacked, hardware: Hardware, *,
    name: str, seed: int, batch_size: int, policy: Policy = "argmax", metrics: Mapping[str, Metric] = BUILT_IN,
    progress: Callable[[int, int], None] = lambda advanced, robust: None,
    resume: Stage | None = None, save: Callable[[Stage], None] = lambda stage: None, passes: int = 1,
    keep: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> dict[str, Attacked]:  # fmt: skip
    """Attack every sample that is right in `before`, with policy="sample" all of them; the others stay as there.

    Returns one `Attacked` under `name`, or one per part under `<name>_<part>` if the attack returns a dict. After
    every batch `save` gets the state, from which `resume` continues, and `progress` the number of samples done since
    the last call and of those still right (each sample counts once per stage). `keep` gets the samples (m,) that were
    fooled and their images float32 (m, C, H, W). Each outcome is that of `passes` passes.

    Random numbers are keyed by the image, so that neither batch size nor order changes an outcome; an attack whose
    batches do matter states its own `batch_size`.

    An attack is not trusted: it gets copies of the images and, unless it is aerl's own, of the model. The outcomes are
    those of a copy of what it returned. UserError for an attack that does not return images like those it got (or a
    dict of them, with the same names for every batch), and for what other people's code raises.
    """
    key, labels, examples = f"attack.{name}", split.labels.numpy(), len(before.examples)
    attack = AttackSpec.of(attack, key)
    calls, foreign = stages(attack, model, split, hardware), is_foreign(attack.call)
    if not calls:
        return {name: copy.deepcopy(before)}
    limit = size = attack.batch_size or batch_size
    todo = np.ones(len(split), bool) if policy == "sample" else before.standing(labels)
    state = resume or Stage(0, todo, np.zeros(len(split), bool))
    began = time.monotonic() - state.seconds
    news: list[dict[str, Batch]] = []  # this round's batches of this process, by part

    def work(index: Tensor) -> None:
        x, y = batch(split, index, hardware)
        with attacking(model), reproducible(seed, name, state.number, int(index[0]), device=hardware.device):
            noise = SampleGenerator.for_images(x, seed=seed, salt=name)
            victim = copy.deepcopy(model) if foreign else model
            with signals.stop_immediately():  # a batch that a signal cuts short is repeated
                returned = call(victim, x.clone(), y.clone(), generator=noise)
            images = {"_".join(filter(None, (name, stage, part))): own for part, own in _images(returned, x, key)}
            known = [part for part in state.parts if part not in earlier]
            if known and images.keys() != set(known):
                found, expected = (", ".join(sorted(parts)) for parts in (images, known))
                raise UserError(f"{key}: returned {found}: expected, as for other images, {expected}")
            rows = index.numpy()
            news.append({part: _outcome(model, x, x_adv, y, rows, metrics, passes, examples, keep is not None)
                         for part, x_adv in images.items()})  # fmt: skip

    while True:
        stage, call = calls[state.number]
        earlier = [part for part in state.parts if stage and not f"{part}_".startswith(f"{name}_{stage}_")]
        start = state.parts[earlier[-1]] if earlier else before
        for mine in _rounds(state, size):
            fault = None
            news.clear()
            try:
                with foreign_code(key, attack.call, getattr(model, "net", model)):
                    limit = within_memory(work, torch.from_numpy(mine), limit)
            except UserError as error:
                fault = error
            if not _has_gradient(fault):
                warn(f"not run: {NoGradient()}")
                break  # to the next stage, which may be a black-box attack
            done = list(chain.from_iterable(ddp.gather(news)))
            for part, outcome in chain.from_iterable(parts.items() for parts in done):
                state.parts.setdefault(part, copy.deepcopy(start)).record(outcome)
                state.done[outcome.rows] = True
                if keep is not None:
                    wrong = outcome.values["pred"] != labels[outcome.rows]
                    fooled = np.isin(outcome.kept, outcome.rows[wrong])
                    keep(outcome.kept[fooled], outcome.images[fooled])
            state.seconds = time.monotonic() - began
            progress(sum(len(next(iter(parts.values())).rows) for parts in done), int(state.robust(labels).sum()))
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
    return state.parts or {name: copy.deepcopy(before)}


def _images(returned: Any, x: Tensor, key: str) -> Iterator[tuple[str, Tensor]]:
    """The parts of what an attack returned for images x (B, C, H, W): each its name, "" for a tensor alone, and a
    copy like x. UserError if it is anything but images, or has pixels that are not finite."""
    parts = returned if isinstance(returned, dict) else {"": returned}
    if not parts or not all(isinstance(part, str) and re.fullmatch(r"[\w.-]*", part) for part in parts):
        raise UserError(f"{key}: returned parts {list(parts)}: expected names of letters, digits and any of _.-")
    for part, images in parts.items():
        where = f"{key}: returned " + (f"as {part} " if part else "")
        if not isinstance(images, Tensor) or images.shape != x.shape or not images.is_floating_point():
            form = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise UserError(f"{where}{form}: expected images like torch.float32 {tuple(x.shape)}, or a dict of them")
        with torch.no_grad():
            own = torch.empty_like(x).copy_(images)
        if bad := int((~own.isfinite()).flatten(1).any(1).sum()):
            raise UserError(f"{where}NaN or infinite pixels in {bad} of {len(x)} images")
        yield part, own


def _has_gradient(fault: UserError | None) -> bool:
    """Raise on every process what one of them raised; False if only a gradient is missing."""
    faults = ddp.gather((isinstance(fault, NoGradient), fault and str(fault)))
    for no_gradient, text in faults:
        if text and not no_gradient:
            raise UserError(text) from fault
    return not any(no_gradient for no_gradient, _ in faults)


def _rounds(state: Stage, size: int) -> Iterator[np.ndarray]:
    """The samples still to be attacked, in batches of at most `size`: in every round this process's batch, or none.

    The batches are the same for any number of processes.
    """
    batches = [rows.numpy() for rows in torch.split(torch.from_numpy(np.flatnonzero(state.todo)), size)]
    batches = [left for rows in batches if len(left := rows[~state.done[rows]])]
    for first in range(0, len(batches), ddp.world_size()):
        place = first + ddp.rank()
        yield batches[place] if place < len(batches) else np.zeros(0, np.int64)
