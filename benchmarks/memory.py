"""Memory of CIFAR-10, measured in processes of their own: above an interpreter that has imported torch."""

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import sys, torch, pathlib
# Not ru_maxrss, which a process inherits from the one that started it.
status = pathlib.Path("/proc/self/status")
peak = lambda: int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
from aerl.data import prepare
from aerl.data.sources import cifar
before = peak()
data = prepare(
    lambda: cifar(variant="cifar10", path=sys.argv[1] or None, data_dir=sys.argv[2]),
    identity={"path": sys.argv[1] or None, "variant": "cifar10"}, data_dir=pathlib.Path(sys.argv[2]),
    name="cifar10", size=None, channels=None, val_fraction=0.1, split_seed=42,
)
data.train.images[::997].float().mean()
print(peak() - before)
"""


def peak_megabytes(path: Path | None, data_dir: Path) -> float:
    """Peak resident memory that loading CIFAR-10 adds, in MB: from `path`, or torchvision's download."""
    command = [sys.executable, "-c", _SCRIPT, "" if path is None else str(path), str(data_dir)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(cifar10: Path, scratch: Path) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal): the first start prepares and caches, the second reads the cache."""
    cache = scratch / "memory"
    return [
        (
            f"CIFAR-10 in memory, {start} start: peak above torch",
            f"{peak_megabytes(cifar10, cache):.0f} MB",
            "<= 700 MB",
        )
        for start in ("first", "second")
    ]
