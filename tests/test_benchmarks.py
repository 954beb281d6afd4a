"""The benchmarks run, and what they compute from measurements is right."""

import re
import signal
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.attacks import missing
from benchmarks.scaling import exponent, headline, makespan
from tests.conftest import ROOT


@pytest.mark.slow  # .ci/run does all parts
def test_smoke_prints_the_rows_of_every_part(tmp_path):
    out = tmp_path / "table.md"
    parts = [word for part in ("training", "attacks", "memory") for word in ("--only", part)]
    command = [sys.executable, "-m", "benchmarks", "--smoke", *parts, "--net", "alicnn", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", out.read_text(), re.MULTILINE)[1:]
    for trainer in ("sl", "rl", "rl_adv"):
        for what in ("over the paper's loop", "over the bare step's", "share of the matmul peak"):
            (ratio,) = [value for name, value, _ in rows if name.startswith(f"{trainer}, ") and what in name]
            assert float(re.match(r"[\d.]+", ratio)[0]) > 0
    for model in ("undefended", "pgd_at"):
        for norm in ("L2", "Linf"):
            mine = [name for name, _, _ in rows if f"{norm} eps" in name and f"{model} model" in name]
            assert {name.split(": ")[-1].split("'")[0] for name in mine} >= {"torchattacks", "foolbox", "art"} - {
                *missing()
            }
            assert sum("over the bare loop" in name for name in mine) == 1
    assert sum("peak memory" in name for name, _, _ in rows) == 2


def test_exponent_and_makespan():
    assert exponent([1, 2, 4], [3.0, 3 * 2**1.5, 3 * 4**1.5]) == pytest.approx(1.5)
    assert makespan([1.0, 3.0, 2.0], 64) == makespan([1.0, 3.0, 2.0], 2) == 3.0
    assert makespan([2.0, 2.0, 2.0], 2) == 4.0


def test_the_headline_grid_costs_what_its_parts_do():
    """Epochs of so many images, and attacks of so many passes, at one a second."""
    hours = headline({"sl": 1.0, "rl": 1.0, "rl_adv": 0.5}, passes_per_second=float("inf"))
    assert len(hours) == 27
    assert hours[0] == pytest.approx(100 * 45_000 / 3600)
    assert hours[-1] == pytest.approx(100 * 114_021 * (0.333 / 0.5 + 0.667) / 3600)
    speeds = dict.fromkeys(("sl", "rl", "rl_adv"), float("inf"))
    hours = headline(speeds, passes_per_second=1.0, robust={"sl": 0.0, "rl": 0.5, "rl_adv": 1.0})
    assert hours[0] == pytest.approx(10_000 * 330 / 3600)
    assert hours[9] == pytest.approx(10_000 * (330 + 6_500) / 3600)


def test_what_needs_a_gpu_names_what_is_left(tmp_path, monkeypatch, capsys):
    (tmp_path / "training-cnn.txt").touch()  # done before
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path), "--dry-run"])
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # this process keeps its own
    gpu.main()
    done = capsys.readouterr()
    left = re.search(r"^left: (.*)$", done.out, re.MULTILINE)[1].split(", ")
    assert "training-cnn" not in left and {"tests", "training-alicnn", "results"} <= set(left)
    assert len(re.findall(r"^\+ ", done.err, re.MULTILINE)) == len(left)


@pytest.mark.parametrize(
    ("code", "seconds", "output"),
    [("import time; time.sleep(60)", 0.2, None), ("raise SystemExit(3)", 60, None), ("print(7)", 60, "7\n")],
)
def test_only_a_step_that_succeeds_counts_as_done(tmp_path, code, seconds, output):
    assert gpu.run("step", [sys.executable, "-c", code], tmp_path, seconds=seconds) == (output is not None)
    files = list(tmp_path.glob("*.txt"))
    assert [file.read_text() for file in files] == ([output] if output else [])
