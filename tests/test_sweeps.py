"""Multiruns that are cut, fail in part, or have a run to follow them; and what is reported afterwards."""

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from aerl.report.status import main
from aerl.tracking.results import write_summary
from tests.conftest import ROOT, environment
from tests.runs import wait_for

QUICK = ("trainer.epochs=1", "evaluation.samples=8", "attack=fgsm", "analysis=none", "logger=none")


@pytest.fixture
def status(tmp_path, monkeypatch, capsys):
    """`status(folder)` is exit code and output of `python -m aerl.report.status FOLDER`."""
    monkeypatch.chdir(tmp_path)

    def run(folder):
        code = main([str(folder)])
        return code, capsys.readouterr().out

    return run


def test_same_command_does_only_the_jobs_that_failed(launch, tmp_path, status):
    digits = load_digits()
    images, labels = (digits.images[:120] * 15).astype(np.uint8)[..., None], digits.target[:120]
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, X_train=images[:100], y_train=labels[:100], X_test=images[100:], y_test=labels[100:])
    words = ("-m", "dataset=npz", "dataset.path=a.npz,b.npz,c.npz", "seed=0,1", *QUICK)
    first = launch(*words)
    assert first.returncode == 1
    assert "6 jobs: 4 done, 2 failed, 0 left" in first.stdout
    # Once where it happened, and once with the jobs that are not done.
    assert (first.stdout + first.stderr).count("dataset.path=c.npz: no such file") == 4
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/npz/**/summary.json")}
    assert len(finished) == 4
    assert "dataset.path" in first.stdout and "dataset.source.path" not in first.stdout  # one column is enough
    code, text = status("runs")
    assert code == 1 and "6 jobs: 4 done, 2 failed, 0 left" in text
    for job, seed in ((4, 0), (5, 1)):
        job = rf"failed: job {job} \(dataset.path=c.npz seed={seed}\), .*: dataset.path=c.npz: no such file"
        assert re.search(job, text)
    assert f"the rest: python launch.py {' '.join(words)}\n" in text

    (tmp_path / "b.npz").rename(tmp_path / "c.npz")  # the jobs of b are done, and do not need it
    again = launch(*words)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already finished") == 4 and again.stderr.count("training: ") == 2
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    code, text = status("runs")
    assert code == 0 and text.endswith("6 jobs: 6 done, 0 failed, 0 left\n")


def test_killed_multirun_and_another_one(launch, tmp_path, data_dir, status):
    """A SIGKILL in the first of three jobs: from outside, only the time of its last write is known."""
    words = ("-m", "seed=0,1,2", *QUICK)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *words, "trainer.epochs=200"], cwd=tmp_path,
        env=environment(data_dir, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("runs/digits/**/seed0/results.jsonl")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = (tmp_path / "runs/multirun").iterdir()
    code, text = status(folder)
    assert code == 1 and "3 jobs: 0 done, 0 failed, 1 unfinished, 2 left" in text
    assert re.search(r"unfinished: job 0 \(seed=0\), runs/digits/.*: running, or killed; last wrote .* ago", text)
    assert [f"left: job {n} (seed={n})" in text for n in (0, 1, 2)] == [False, True, True]
    assert json.loads((folder / "jobs/plan.json").read_text())["jobs"][2][0] == "seed=2"
    assert launch("-m", "seed=0", *QUICK).returncode == 0  # another multirun of the same trainer
    code, text = status("runs")
    assert code == 1 and "1 jobs: 1 done, 0 failed, 0 left" in text and "2 left" in text


def test_no_run_is_one_line(tmp_path, capsys):
    for folder, reason in ((tmp_path, "holds no run"), (tmp_path / "nowhere", "no such folder")):
        assert main([str(folder)]) == 1
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith(f"error: {folder}: {reason}")
        assert output.err.count("\n") == 1


@pytest.mark.slow
def test_the_transfer_grid_ends_with_the_matrix_of_its_runs(launch, tmp_path):
    words = ("multirun_sweeps=transfer", *QUICK[1:], "trainer.epochs=3", "eps=0.5", "runs_dir=here")
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    (matrix,) = tmp_path.glob("here/multirun/*/matrix")
    rows = (matrix / "tables/transfer_matrix.csv").read_text().splitlines()
    assert len(rows) == 1 + 16
    text = json.loads((matrix / "summary.json").read_text())["transfer"]
    assert list(text["runs"]) == ["sl_seed0", "sl_adv_seed0", "rl_seed0", "rl_adv_seed0"]
    assert text["eps"] == 0.5 and text["n"] == 8  # as on the command line
    before = (matrix / "summary.json").stat().st_mtime_ns
    assert launch(*words).returncode == 0
    assert (matrix / "summary.json").stat().st_mtime_ns == before


def test_single_runs_are_counted(tmp_path, capsys):
    for name, status, error in (("a", "finished", None), ("b", "failed", "lr=9: too large"), ("c", "running", None)):
        (tmp_path / name).mkdir()
        write_summary(tmp_path / name, {"status": status, "error": error})
    assert main([str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "single runs: 3 runs: 1 done, 1 failed, 1 unfinished" in output and "b: lr=9: too large" in output
    (tmp_path / "b/summary.json").unlink()
    (tmp_path / "c/summary.json").unlink()
    assert main([str(tmp_path)]) == 0
