"""Judge a model: predict the test images, attack them, and write every outcome down as soon as it is known."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aerl.attacks import collect_warnings
from aerl.build import Parts, named
from aerl.config.schema import Config
from aerl.data import Split, rows, subset
from aerl.evaluation import evaluate
from aerl.evaluation.evaluate import PER_SAMPLE, Attack, Attacked, Outcomes, Stage
from aerl.runtime import ddp, signals
from aerl.runtime.files import load_arrays, save_arrays
from aerl.runtime.progress import progress
from aerl.tracking.run_folder import Record, unattacked
from aerl.types import UserError

log = logging.getLogger("aerl")

# An attack in progress is written no more often than this.
_SECONDS_BETWEEN_SAVES = 2.0


def batch_size(parts: Parts, config: Config) -> int:
    """How many images go through the model at once."""
    return config.evaluation.batch_size or (512 if parts.hardware.device.type == "cuda" else 128)


def judge(parts: Parts, config: Config, record: Record) -> tuple[Outcomes, Split]:
    """All attacks on the test images; returns the outcomes and the images that they are of.

    What an earlier start of this run has finished is taken from its files, and the attack it was in goes on
    where it was.
    """
    split = subset(parts.data.test, config.evaluation.samples)
    policy = config.evaluation.policy
    torch.backends.cudnn.benchmark = False  # batches shrink as samples are fooled: every size would be tuned anew
    with signals.stop_immediately():
        clean = ddp.broadcast_from_main(
            lambda: evaluate.predict(parts.model, split, parts.hardware, batch_size(parts, config))
        )
    outcomes = ddp.broadcast_from_main(lambda: _earlier_outcomes(record))
    if not outcomes:
        record.summary.update(unattacked())
        outcomes = {
            "index": rows(len(parts.data.test), config.evaluation.samples).numpy(),
            "label": split.labels.numpy(),
            "clean_pred": clean.pred,
            **{f"clean_{key}": getattr(clean, key) for key in ("p", "confidence", "entropy")},
        }
        save_arrays(record.folder / "outcomes.npz", outcomes)
    if record.summary["evaluated"]:
        record.results.restore(record.summary["results"])
        return outcomes, split
    record.results.restore(record.summary["trained"])  # a killed process may have logged some of what follows
    clean_accuracy = evaluate.accuracy(outcomes, [], policy)
    record.results.log({"clean_accuracy": clean_accuracy["value"]}, n=len(split), split="test")
    record.save(clean_accuracy=clean_accuracy)

    done = {told["of"] for told in record.summary["attacks"].values()}
    for name, attack in parts.attacks.items():
        ddp.sync_stop_request()
        signals.raise_if_stopped()
        if name in done:
            log.info("%s: was done before", name)
        else:
            alone = not config.evaluation.survivors_only or policy == "sample"
            before = clean if alone else evaluate.so_far(outcomes, clean, _counted(record))
            with named(f"attack.{name}"), collect_warnings() as warnings:
                attacked = _attack(name, attack, parts, config, split, before, record.folder, warnings)
                warnings = list(dict.fromkeys(chain.from_iterable(ddp.gather(warnings))))
            told = _threat(attack, config) | {"alone": alone, "warnings": warnings}
            _write_down(name, attacked, told, outcomes, record, policy)
        _log(name, outcomes, record)

    attacks, counted = record.summary["attacks"], _counted(record)
    worst = evaluate.accuracy(outcomes, counted, policy) if counted else None
    if worst is not None:
        record.results.log({"worst_case_accuracy": worst["value"]}, n=len(split), split="test")
    seconds = sum(told["seconds"] for told in attacks.values())
    record.advance(
        robust_accuracy={part: told["robust_accuracy"]["value"] for part, told in attacks.items()},
        worst_case_accuracy=worst,
        seconds=record.summary["seconds"] | {"attack": seconds},
        evaluated=record.results.seal(),
    )
    return outcomes, split


def _earlier_outcomes(record: Record) -> Outcomes:
    """What an earlier start has found; nothing where that is damaged, which is logged, and so measured again."""
    done = record.summary["attacks"]
    if not (done or record.summary["evaluated"]):
        return {}
    try:
        outcomes = load_arrays(record.folder / "outcomes.npz")
        examples = load_arrays(record.folder / "examples.npz")
        missing = [name for name in ("clean", *done) if f"{name}_pred" not in outcomes]
        missing += [name for name in done if name not in examples]
        if missing:
            raise UserError(f"{record.folder}: outcomes.npz or examples.npz has nothing of {', '.join(missing)}")
    except UserError as error:
        log.warning("%s; the attacks begin again", error)
        return {}
    return outcomes


def _threat(attack: Attack, config: Config) -> dict[str, Any]:
    """What an attack may do, and whether that is within the run's threat model, so that it counts."""
    norm, eps = (evaluate.setting(attack, key, getattr(config, key)) for key in ("norm", "eps"))
    within = norm == config.norm and eps <= config.eps * (1 + 1e-6)
    return {"norm": norm, "eps": eps, "counts": within and evaluate.setting(attack, "counts", True)}


def _counted(record: Record) -> list[str]:
    return [part for part, told in record.summary["attacks"].items() if told["counts"]]


def _attack(
    name: str,
    attack: Attack,
    parts: Parts,
    config: Config,
    split: Split,
    before: Attacked,
    folder: Path,
    warnings: list[str],
) -> dict[str, Attacked]:
    """Run one attack, or what is left of it, behind a progress bar that shows the accuracy so far."""
    resume, warned = ddp.broadcast_from_main(lambda: _interrupted(folder, name))
    warnings.extend(warned)
    policy = config.evaluation.policy
    if policy == "sample" and evaluate.setting(attack, "drop_fooled", True):
        log.warning("%s: stops at a wrong argmax; attack.%s.drop_fooled=false goes on", name, name)
    total = len(split) if policy == "sample" else int((before.pred == split.labels.numpy()).sum())
    stages = len(evaluate.stages(attack, parts.model, split, parts.hardware))
    start = 0 if resume is None else total * (resume.number + 1) - int((resume.todo & ~resume.done).sum())
    with progress(name, total=total * stages, unit="samples", start=start) as bar:
        return evaluate.run_attack(
            attack,
            parts.model,
            split,
            before,
            parts.hardware,
            name=name,
            seed=config.seed,
            batch_size=batch_size(parts, config),
            policy=policy,
            progress=lambda advanced, robust: bar.update(advanced, acc=robust / len(split)),
            resume=resume,
            keep=_keeper(folder, name, warnings),
        )


# --- An attack in progress: a file that says how far it has come ------------------------------------------


def _keeper(folder: Path, name: str, warnings: Sequence[str]) -> Callable[[Stage], None]:
    """A function that writes a `Stage` to the run folder, unless it has just done so."""
    saved_at = time.monotonic()

    def keep(stage: Stage) -> None:
        nonlocal saved_at
        if time.monotonic() - saved_at < _SECONDS_BETWEEN_SAVES and not signals.stop_requested():
            return
        arrays = {key: np.asarray(getattr(stage, key)) for key in ("number", "todo", "done", "seconds")}
        arrays |= {"attack": np.asarray(name), "warnings": np.asarray(list(warnings), dtype=np.str_)}
        for part, attacked in stage.parts.items():
            arrays |= {f"{part}/{field.name}": getattr(attacked, field.name) for field in fields(Attacked)}
        save_arrays(folder / "progress.npz", arrays)
        saved_at = time.monotonic()
        signals.raise_if_stopped()

    return keep


def _interrupted(folder: Path, name: str) -> tuple[Stage | None, list[str]]:
    """How far an earlier start came with this attack, and what it warned of."""
    try:
        arrays = load_arrays(folder / "progress.npz")
    except UserError as error:
        log.warning("%s; %s begins again", error, name)
        return None, []
    if str(arrays.get("attack")) != name:
        return None, []
    names = dict.fromkeys(key.partition("/")[0] for key in arrays if "/" in key)
    parts = {part: Attacked(*(_scalar(arrays[f"{part}/{field.name}"]) for field in fields(Attacked))) for part in names}
    stage = Stage(int(arrays["number"]), arrays["todo"], arrays["done"], float(arrays["seconds"]), parts)
    return stage, [str(warning) for warning in arrays["warnings"]]


def _scalar(array: np.ndarray) -> Any:
    return array if array.ndim else array.item()


# --- What is finished -------------------------------------------------------------------------------------


def _write_down(
    name: str,
    attacked: Mapping[str, Attacked],
    told: Mapping[str, Any],
    outcomes: Outcomes,
    record: Record,
    policy: evaluate.Policy,
) -> None:
    """Add one attack to `outcomes` and to the run folder; the summary, last, says that it is done."""
    news = {}
    for part, found in attacked.items():
        evaluate.check_within(part, found, told["norm"], told["eps"], boxed=told["counts"])
        outcomes |= {f"{part}_{key}": getattr(found, key) for key in PER_SAMPLE}
        accuracy = evaluate.accuracy(outcomes, [part], policy)
        news[part] = {"of": name, **told, "robust_accuracy": accuracy, "seconds": found.seconds}
    # The first adversarial images of each attack are kept for figures.
    examples = load_arrays(record.folder / "examples.npz") | {part: found.examples for part, found in attacked.items()}
    save_arrays(record.folder / "examples.npz", examples)
    save_arrays(record.folder / "outcomes.npz", outcomes)
    record.save(attacks=record.summary["attacks"] | news)
    (record.folder / "progress.npz").unlink(missing_ok=True)


def _log(name: str, outcomes: Outcomes, record: Record) -> None:
    for part, told in record.summary["attacks"].items():
        if told["of"] == name:
            metrics = {
                "robust_accuracy": told["robust_accuracy"]["value"],
                "mean_l2": float(outcomes[f"{part}_l2"].mean()),
                "mean_linf": float(outcomes[f"{part}_linf"].mean()),
                "seconds": told["seconds"],
            }
            transferred = name == "transfer"
            record.results.log(
                metrics,
                n=told["robust_accuracy"]["n"],
                split="test",
                attack=part,
                norm=told["norm"],
                eps=told["eps"],
                source=part.removeprefix("transfer_").removesuffix("_refined") if transferred else "",
            )
