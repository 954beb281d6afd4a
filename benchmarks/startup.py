"""How long the command line takes to answer, as whole processes."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

_LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"


def measure(rounds: int) -> list[tuple[str, str, str]]:
    """Rows of (what, measured, goal)."""
    rows = []
    for words in (["--help"], ["--cfg", "job"]):
        seconds = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            subprocess.run([sys.executable, str(_LAUNCH), *words], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
        rows.append((f"launch.py {' '.join(words)}", f"{statistics.median(seconds[1:]):.2f} s", "< 1 s"))
    return rows
