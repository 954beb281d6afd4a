"""What it costs to referee: FMN against PGD, and the audit with planted examples against AutoAttack."""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from aerl.analyses import AnalysisContext
from aerl.analyses.masking import masking
from aerl.analyses.planted import planted
from aerl.attacks import Adaptive, AttackSpec, AutoAttack, SampleGenerator, fmn, pgd
from aerl.data import DataSplits, subset, to_unit
from aerl.evaluation.evaluate import predict
from aerl.runtime.device import Hardware
from aerl.tracking.results import ResultLog
from benchmarks.paired import ratio, time_in_turns


def measure(
    models: Mapping[str, nn.Module], data: DataSplits, hardware: Hardware, rounds: int, *, samples: int, steps: int
) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal) on `samples` test images, of undefended and adversarially trained networks."""
    split = subset(data.test, samples)
    x, y = to_unit(split.images.to(hardware.device), hardware.memory_format), split.labels.to(hardware.device)
    rows = []
    for name, model in models.items():
        noise = SampleGenerator.for_images(x, 0)
        attack = partial(pgd, model, x, y, generator=noise, norm="L2", eps=0.5, steps=steps)
        candidates = {
            "fmn": partial(fmn, model, x, y, generator=noise, norm="L2"),
            "dropping": attack,
            "whole": partial(attack, drop_fooled=False),
        }
        seconds = time_in_turns(candidates, rounds)
        about = f"{name}, {samples} images"
        what = f"FMN (50 steps) over PGD-{steps} that takes all its steps, {about}"
        rows.append((what, f"{ratio(seconds['fmn'], seconds['whole']):.2f}", "<= 1"))
        what = f"FMN (50 steps) over PGD-{steps} that drops fooled images, {about}"
        rows.append((what, f"{ratio(seconds['fmn'], seconds['dropping']):.2f}", "-"))
    return [*rows, _audit(models["pgd_at"], data, hardware, rounds, samples, steps)]


def _audit(
    model: nn.Module, data: DataSplits, hardware: Hardware, rounds: int, samples: int, steps: int
) -> tuple[str, str, str]:
    split = subset(data.test, samples)
    clean = predict(model, split, hardware, 128)
    attacks = {"pgd": partial(pgd, norm="L2", eps=0.5, steps=steps), "adaptive": Adaptive(eps=0.5, steps=steps)}
    x, y = to_unit(split.images.to(hardware.device), hardware.memory_format), split.labels.to(hardware.device)
    right = torch.from_numpy(clean.pred == split.labels.numpy())

    def audit() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            identity = dict.fromkeys(("run_id", "dataset", "model", "trainer"), "") | {"seed": 0}
            context = AnalysisContext(
                model=model, images=split.images, labels=split.labels, class_names=data.class_names,
                outcomes={"label": split.labels.numpy(), **clean.columns("clean")}, adversarial={}, attacks={},
                figures=Path(scratch), log=ResultLog(Path(scratch), identity), norm="L2", eps=0.5, seed=0, trainer="sl",
                hardware=hardware, batch_size=128, save=lambda **news: None,
                specs={name: AttackSpec.of(attack) for name, attack in attacks.items()},
            )  # fmt: skip
            masking(context, samples=samples)
            planted(context, samples=samples)

    def autoattack() -> None:
        noise = SampleGenerator.for_images(x[right], 0)
        AutoAttack(norm="L2", eps=0.5)(model, x[right], y[right], generator=noise)

    seconds = time_in_turns({"audit": audit, "autoattack": autoattack}, rounds, warm_up=False)
    what = f"audit with planted examples over AutoAttack standard, pgd_at, {int(right.sum())} right images"
    return what, f"{ratio(seconds['audit'], seconds['autoattack']):.2f}", "<= 1"
