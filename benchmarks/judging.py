"""What a number to be believed costs: the suite and the masking audit against AutoAttack standard, as whole runs."""

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
        [*command, f"runs_dir={folder.parent}", f"name={folder.name}"], check=True, capture_output=True
    )
    told: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return told


def measure(cifar10: Path | None, scratch: Path, rounds: int, smoke: bool) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal), on a plainly and on a PGD-trained AliCNN of cifar10_small, or of digits."""
    data = ["dataset=digits"] if cifar10 is None else ["dataset=cifar10_small", f"dataset.path={cifar10}"]
    samples = 24 if smoke else 500 if cifar10 is not None else 120
    eps = "eps=1" if cifar10 is None else "eps=0.5"  # where an undefended net has nothing left
    quick = ["trainer.epochs=2"] if smoke else []
    for trainer in ("sl", "pgd_at"):
        _run(scratch / trainer, *data, f"trainer={trainer}", *quick, eps, "attack=none", "analysis=none")

    def judged(trainer: str, *words: str) -> dict[str, Any]:
        return _run(scratch / "judged", "trainer=none", f"checkpoint={scratch / trainer}", eps,
                    f"evaluation.samples={samples}", *words)  # fmt: skip

    audit = ("attack=none", "analysis=masking", f"analysis.masking.samples={samples}")
    suite, plain, robust = [], [], []
    audits: dict[str, list[float]] = {"sl": [], "pgd_at": []}
    for _ in range(rounds):
        ours = judged("sl", "attack=suite", "analysis=none")
        theirs = judged("sl", "attack=autoattack", "analysis=none")
        suite.append(ours["seconds"]["attack"])
        plain.append(theirs["seconds"]["attack"])
        robust.append(judged("pgd_at", "attack=autoattack", "analysis=none")["seconds"]["attack"])
        for trainer, seconds in audits.items():
            seconds.append(judged(trainer, *audit)["masking"]["seconds"])
    accuracies = " against ".join(f"{told['worst_case_accuracy']['value']:.1%}" for told in (ours, theirs))
    what = f"attack=suite, {samples} samples, trainer=sl: AutoAttack standard's time over the suite's"
    rows = [(what, f"{ratio(plain, suite):.1f} (robust: {accuracies})", ">= 3, no higher accuracy")]
    for trainer, seconds in audits.items():
        what = f"analysis=masking, {samples} samples, trainer={trainer}: time over AutoAttack's on the PGD-trained net"
        rows.append((what, f"{ratio(seconds, robust):.2f}", "<= 1"))
    return rows
