"""aerl from Python: the import, `aerl.evaluate` against the same attack called by hand, `aerl.load_runs`."""

import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import aerl
from aerl.models import AliCNN
from benchmarks.paired import ratio, time_in_turns

_LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"


def measure(rounds: int, scratch: Path, smoke: bool) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal)."""
    code = "import time; began = time.perf_counter(); import aerl; print(time.perf_counter() - began)"
    seconds = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(rounds)]
    count = 20 if smoke else 1_000
    folders = _runs(scratch, count)
    reading = time_in_turns({"load_runs": lambda: aerl.load_runs(folders)}, rounds)["load_runs"]
    return [
        ("import aerl", f"{statistics.median(seconds):.3f} s", "< 0.2 s"),
        _evaluation(rounds, 16 if smoke else 512, 2 if smoke else 40),
        (f"aerl.load_runs of {count} run folders", f"{statistics.median(reading):.2f} s", "< 3 s of 1,000"),
    ]


def _evaluation(rounds: int, samples: int, steps: int) -> tuple[str, str, str]:
    """PGD that takes all its steps with all images, by aerl.evaluate over by hand."""
    torch.manual_seed(0)
    model = AliCNN(num_classes=10, channels=3, size=(32, 32)).eval()
    x = torch.rand(samples, 3, 32, 32)
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = aerl.attacks.PGD(eps=0.5, steps=steps, drop_fooled=False)

    def by_hand() -> Tensor:
        found = torch.cat([attack(model, *batch) for batch in zip(x.split(128), y.split(128), strict=True)])
        with torch.no_grad():
            return torch.cat([model(part).argmax(1) for part in found.split(128)])

    candidates: dict[str, Callable[[], object]] = {
        "evaluate": lambda: aerl.evaluate(model, x, y, norm="L2", eps=0.5, attacks=attack, analyses=()),
        "by hand": by_hand,
    }
    seconds = time_in_turns(candidates, rounds)
    what = f"aerl.evaluate, PGD-{steps}, {samples} images 3x32x32: time over the same attack by hand"
    return what, f"{ratio(seconds['evaluate'], seconds['by hand']):.3f}", "<= 1.03"


def _runs(scratch: Path, count: int) -> Path:
    words = ("trainer.epochs=1", "attack=fgsm", "analysis=none", "logger=none", f"runs_dir={scratch}", "name=run")
    subprocess.run([sys.executable, str(_LAUNCH), *words], check=True, stdout=subprocess.DEVNULL)
    for number in range(count):
        folder = scratch / "many" / str(number)
        folder.mkdir(parents=True)
        for name in ("summary.json", "config.yaml"):
            shutil.copy(scratch / "run" / name, folder)
    return scratch / "many"
