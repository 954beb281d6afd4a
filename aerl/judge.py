"""Judge a model: predict the test images, attack them, and write every outcome down as soon as it is known."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aerl import evaluate
from aerl.attacks import collect_warnings
from aerl.build import Parts, named
from aerl.config import Config
from aerl.data import Split, subset
from aerl.evaluate import Attack, Attacked, Outcomes
from aerl.files import atomic_write
from aerl.record import Record
from aerl.report.progress import progress

log = logging.getLogger("aerl")


def batch_size(parts: Parts, config: Config) -> int:
    """How many images go through the model at once."""
    return config.evaluation.batch_size or (512 if parts.hardware.device.type == "cuda" else 128)


def judge(parts: Parts, config: Config, record: Record) -> tuple[Outcomes, Split]:
    """All attacks on the test images; returns the outcomes and the images that they are of.

    What an earlier start of this run has finished is taken from its files. The test results are logged
    once more even then, because a killed process may have logged some of them.
    """
    split = subset(parts.data.test, config.evaluation.samples)
    size = batch_size(parts, config)
    torch.backends.cudnn.benchmark = (
        False  # batches shrink as samples are fooled: every size would be tuned anew
    )
    record.results.rewind(config.trainer.epochs if config.trainer else 0)
    outcomes = load_arrays(record.folder / "outcomes.npz") if record.summary["attacks"] else {}
    if not outcomes:
        record.summary["attacks"] = {}
        clean_pred = evaluate.predictions(parts.model, split, parts.hardware, size)
        outcomes = {"label": split.labels.numpy(), "clean_pred": clean_pred}
    clean = evaluate.accuracy(outcomes)
    record.results.log({"clean_accuracy": clean["value"]}, n=len(split), split="test")
    record.save(clean_accuracy=clean)

    done = {told["of"] for told in record.summary["attacks"].values()}
    for name, attack in parts.attacks.items():
        if name in done:
            log.info("%s: was done before", name)
        else:
            with named(f"attack.{name}"), collect_warnings() as warnings:
                attacked = _attack(name, attack, parts, split, outcomes, config.seed, size)
            threat = {key: evaluate.setting(attack, key, getattr(config, key)) for key in ("norm", "eps")}
            _write_down(name, attacked, threat, warnings, outcomes, record)
        _log(name, outcomes, record)

    attacks = record.summary["attacks"]
    worst = evaluate.accuracy(outcomes, list(attacks)) if attacks else None
    if worst is not None:
        record.results.log({"worst_case_accuracy": worst["value"]}, n=len(split), split="test")
    seconds = sum(told["seconds"] for told in attacks.values())
    record.save(
        robust_accuracy={part: told["robust_accuracy"]["value"] for part, told in attacks.items()},
        worst_case_accuracy=worst,
        seconds=record.summary["seconds"] | {"attack": seconds},
    )
    return outcomes, split


def _attack(
    name: str, attack: Attack, parts: Parts, split: Split, outcomes: Outcomes, seed: int, batch_size: int
) -> dict[str, Attacked]:
    """Run one attack behind a progress bar, whose running accuracy is of all test images, wrong ones included."""
    to_attack = int(evaluate.right(outcomes, []).sum())
    attacked, robust = 0, 0
    with progress(name, total=to_attack, unit="samples") as bar:

        def count(samples: int, survivors: int) -> None:
            nonlocal attacked, robust
            attacked, robust = attacked + samples, robust + survivors
            bar.update(samples, acc=robust / attacked * to_attack / len(split))

        return evaluate.run_attack(
            attack,
            parts.model,
            split,
            outcomes["clean_pred"],
            parts.hardware,
            name=name,
            seed=seed,
            batch_size=batch_size,
            progress=count,
        )


def _write_down(
    name: str,
    attacked: Mapping[str, Attacked],
    threat: Mapping[str, Any],
    warnings: list[str],
    outcomes: Outcomes,
    record: Record,
) -> None:
    """Add one attack to `outcomes` and to the run folder; the summary, last, says that it is done."""
    news = {}
    for part, found in attacked.items():
        evaluate.check_within(part, found, **threat)
        outcomes |= {f"{part}_pred": found.pred, f"{part}_l2": found.l2, f"{part}_linf": found.linf}
        accuracy = evaluate.accuracy(outcomes, [part])
        news[part] = {
            "of": name,
            **threat,
            "robust_accuracy": accuracy,
            "seconds": found.seconds,
            "warnings": warnings,
        }
    # The first adversarial images of each attack are kept for figures.
    examples = load_arrays(record.folder / "examples.npz") | {
        part: found.examples for part, found in attacked.items()
    }
    _save_arrays(record.folder / "examples.npz", examples)
    _save_arrays(record.folder / "outcomes.npz", outcomes)
    record.save(attacks=record.summary["attacks"] | news)


def _save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    atomic_write(path, lambda file: np.savez(file, **arrays))


def load_arrays(path: Path) -> Outcomes:
    """The arrays of an .npz of a run folder; none where there is no such file."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _log(name: str, outcomes: Outcomes, record: Record) -> None:
    for part, told in record.summary["attacks"].items():
        if told["of"] == name:
            metrics = {
                "robust_accuracy": told["robust_accuracy"]["value"],
                "mean_l2": float(outcomes[f"{part}_l2"].mean()),
                "mean_linf": float(outcomes[f"{part}_linf"].mean()),
                "seconds": told["seconds"],
            }
            n = told["robust_accuracy"]["n"]
            record.results.log(metrics, n=n, split="test", attack=part, norm=told["norm"], eps=told["eps"])
