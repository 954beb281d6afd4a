"""The cost of a robustness number: the suite and the masking audit against AutoAttack standard, as whole runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.paired import ratio

_LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"


def _run(folder: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(_LAUNCH), *words, "logger=none", "overwrite=true"]
    subprocess.run(
        [*command, f"runs_dir={folder.parent}", f"name={folder.name}"], check=True, stdout=subprocess.DEVNULL
    )
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def measure(cifar10: Path | None, scratch: Path, rounds: int, smoke: bool) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal), on a plainly and on a PGD-trained AliCNN of cifar10_small, or of digits."""
    data = ["dataset=digits"] if cifar10 is None else ["dataset=cifar10_small", f"dataset.path={cifar10}"]
    samples = 24 if smoke else 500 if cifar10 is not None else 120
    # An undefended net keeps a handful of images at the first and none at the second.
    few, none = (1.0, 1.5) if cifar10 is None else (0.5, 1.0)
    quick = ["trainer.epochs=2"] if smoke else []
    for trainer in ("sl", "pgd_at"):
        words = (f"trainer={trainer}", f"eps={few}", *quick, "attack=none", "analysis=none")
        _run(scratch / trainer, *data, *words)

    def evaluated(trainer: str, eps: float, *words: str) -> dict[str, Any]:
        return _run(scratch / "evaluated", "trainer=none", f"checkpoint={scratch / trainer}", f"eps={eps}",
                    f"evaluation.samples={samples}", *words)  # fmt: skip

    def attacked(trainer: str, eps: float, attack: str) -> tuple[float, float]:
        """Seconds of the attacks, and the accuracy that they leave."""
        summary = evaluated(trainer, eps, f"attack={attack}", "analysis=none")
        return summary["seconds"]["attack"], summary["worst_case_accuracy"]["value"]

    audit = ("attack=none", "analysis=masking", f"analysis.masking.samples={samples}")
    suite: dict[float, list[tuple[float, float]]] = {few: [], none: []}
    plain: dict[float, list[tuple[float, float]]] = {few: [], none: []}
    robust: list[float] = []
    audits: dict[str, list[float]] = {"sl": [], "pgd_at": []}
    for _ in range(rounds):
        for eps in suite:
            suite[eps].append(attacked("sl", eps, "suite"))
            plain[eps].append(attacked("sl", eps, "autoattack"))
        robust.append(attacked("pgd_at", few, "autoattack")[0])
        for trainer, seconds in audits.items():
            seconds.append(evaluated(trainer, few, *audit)["masking"]["seconds"])
    rows = []
    for eps in suite:
        (ours, left), (theirs, theirs_left) = zip(*suite[eps], strict=True), zip(*plain[eps], strict=True)
        what = f"attack=suite, {samples} samples, trainer=sl, eps {eps:g}: AutoAttack standard's time over it"
        accuracies = f"robust: {left[-1]:.1%} against {theirs_left[-1]:.1%}"
        rows.append((what, f"{ratio(list(theirs), list(ours)):.1f} ({accuracies})", ">= 3, no higher accuracy"))
    for trainer, seconds in audits.items():
        what = f"analysis=masking, {samples} samples, trainer={trainer}: time over AutoAttack's on the PGD-trained net"
        rows.append((what, f"{ratio(seconds, robust):.2f}", "<= 1"))
    return rows
