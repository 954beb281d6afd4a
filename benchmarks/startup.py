"""How long the command line takes to answer and to make its first training step, and where the time goes."""

import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

_LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
# One batch of the built-in digits: the epoch that is logged first is one step and a validation.
_ONE_STEP = ("dataset.train_samples=64", "trainer.epochs=1", "attack=none", "analysis=none", "logger=none")


def measure(rounds: int, scratch: Path, smoke: bool) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal)."""
    rows = []
    for words in (["--help"], ["--cfg", "job"]):
        seconds = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            subprocess.run([sys.executable, str(_LAUNCH), *words], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
        rows.append((f"launch.py {' '.join(words)}", f"{statistics.median(seconds[1:]):.2f} s", "< 1 s"))
    steps = [_first_step(scratch / f"step{turn}", scratch / "data") for turn in range(rounds + (not smoke))]
    warm = f"{statistics.median(steps[not smoke :]):.2f} s"
    rows.append(("launch.py, until the first training step is logged, warm", warm, "< 6 s"))
    for what, words in (
        ("launch.py --help", ["--help"]),
        ("launch.py, a run of one step", [*_ONE_STEP, *_where(scratch / "imports", scratch / "data")]),
    ):
        rows.append((f"{what}: imports, the three largest", imports(words), ""))
    return rows


def _where(folder: Path, data_dir: Path) -> list[str]:
    return [f"data_dir={data_dir}", f"runs_dir={folder.parent}", f"name={folder.name}"]


def _first_step(folder: Path, data_dir: Path) -> float:
    """Seconds from the start of the process to the first line of results.jsonl."""
    log = folder / "results.jsonl"
    command = [sys.executable, str(_LAUNCH), *_ONE_STEP, *_where(folder, data_dir)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = None
    while seconds is None:
        if log.exists() and log.stat().st_size:
            seconds = time.perf_counter() - began
        elif process.poll() is not None:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}, without a result")
        time.sleep(0.005)
    process.wait()
    return seconds


def imports(words: list[str]) -> str:
    """Seconds of Python's own count (-X importtime) by top-level package, of launch.py with `words`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(_LAUNCH), *words], capture_output=True, text=True, check=True
    )
    seconds: Counter[str] = Counter()
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr):
        seconds[module.partition(".")[0]] += int(own) / 1e6
    largest = ", ".join(f"{package} {spent:.2f} s" for package, spent in seconds.most_common(3))
    return f"{largest} of {seconds.total():.2f} s"
