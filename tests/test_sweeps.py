"""Multiruns that are cut, fail in part, or have a run to follow them; and what is said of them afterwards."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.conftest import ROOT
from tests.runs import wait_for

QUICK = ("trainer.epochs=1", "evaluation.samples=8", "attack=fgsm", "analysis=none", "logger=none")


def status(folder, place):
    done = subprocess.run(
        [sys.executable, "-m", "aerl.report.status", str(folder)], cwd=place, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture
def files(tmp_path):
    """A small dataset, and the name of another that is not there."""
    digits = load_digits()
    images, labels = (digits.images[:120] * 15).astype(np.uint8)[..., None], digits.target[:120]
    arrays = {
        "X_train": images[:100],
        "y_train": labels[:100],
        "X_test": images[100:],
        "y_test": labels[100:],
    }
    names = ["a.npz", "d.npz"]
    for name in names[:1]:
        np.savez(tmp_path / name, **arrays)
    return names


def test_the_same_command_does_the_jobs_that_failed(launch, tmp_path, files):
    words = ("-m", "dataset=npz", f"dataset.path={','.join(files)}", "seed=0,1,2", *QUICK)
    first = launch(*words)
    assert first.returncode == 1
    assert "6 jobs: 3 done, 3 failed, 0 left; the same command does what is not done" in first.stdout
    # Once where it happened, and once with the jobs that are not done.
    assert (first.stdout + first.stderr).count("dataset.path=d.npz: no such file") == 6
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/npz/**/summary.json")}
    assert len(finished) == 3
    assert "dataset.path" in first.stdout and "dataset.source.path" not in first.stdout  # one column is enough
    code, told = status("runs", tmp_path)
    assert code == 1 and "6 jobs: 3 done, 3 failed, 0 left" in told
    for job, seed in ((3, 0), (4, 1), (5, 2)):
        assert re.search(
            rf"failed: job {job} \(dataset.path=d.npz seed={seed}\), .*: dataset.path=d.npz: no such file",
            told,
        )
    assert f"the rest: python launch.py {' '.join(words)}\n" in told

    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    again = launch(*words)
    assert again.returncode == 0, again.stderr
    assert "6 jobs: 6 done, 0 failed, 0 left\n" in again.stdout
    assert again.stderr.count("was finished before") == 3 and again.stderr.count("training: ") == 3
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list(tmp_path.glob("runs/npz/**/summary.json"))) == 6
    code, told = status("runs", tmp_path)
    assert code == 0 and told.endswith("6 jobs: 6 done, 0 failed, 0 left\n")


def test_what_was_never_begun_is_left_and_other_jobs_are_another_multirun(launch, tmp_path, data_dir):
    """A SIGKILL in the second of four jobs: from outside, nobody can say more than when it last wrote."""
    words = ("-m", "seed=0,1,2,3", *QUICK)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *words, "trainer.epochs=200"], cwd=tmp_path,
        env={**os.environ, "AERL_DATA": str(data_dir)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("runs/digits/**/seed0/results.jsonl")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = (tmp_path / "runs/multirun").iterdir()
    code, told = status(folder, tmp_path)
    assert code == 1 and "4 jobs: 0 done, 0 failed, 1 unfinished, 3 left" in told
    assert re.search(r"unfinished: job 0 \(seed=0\), runs/digits/.*: running, or killed; last wrote .* ago", told)
    assert [f"left: job {n} (seed={n})" in told for n in (0, 1, 2, 3)] == [False, True, True, True]
    assert json.loads((folder / "jobs/plan.json").read_text())["jobs"][3][0] == "seed=3"
    assert launch("-m", "seed=0,1", *QUICK).returncode == 0  # others of the same trainer
    code, told = status("runs", tmp_path)
    assert code == 1 and "2 jobs: 2 done, 0 failed, 0 left" in told and "3 left" in told


def test_no_multirun_is_told_in_one_line(tmp_path):
    for folder, reason in ((tmp_path, "holds no multirun"), (tmp_path / "nowhere", "no such folder")):
        done = subprocess.run(
            [sys.executable, "-m", "aerl.report.status", str(folder)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.splitlines() == [
            f"error: {folder}: {reason}; runs that were started one by one: python -m aerl.report"
        ]


@pytest.mark.slow
def test_the_transfer_grid_ends_with_the_matrix_of_its_runs(launch, tmp_path):
    words = ("multirun_sweeps=transfer", *QUICK[1:], "trainer.epochs=3", "eps=0.5", "runs_dir=here")
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    (matrix,) = tmp_path.glob("here/multirun/*/matrix")
    rows = (matrix / "tables/transfer_matrix.csv").read_text().splitlines()
    assert len(rows) == 1 + 16
    told = json.loads((matrix / "summary.json").read_text())["transfer"]
    assert list(told["runs"]) == ["sl_seed0", "sl_adv_seed0", "rl_seed0", "rl_adv_seed0"]
    assert told["eps"] == 0.5 and told["n"] == 8  # as on the command line
    before = (matrix / "summary.json").stat().st_mtime_ns
    assert launch(*words).returncode == 0
    assert (matrix / "summary.json").stat().st_mtime_ns == before
