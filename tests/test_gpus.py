"""Multiruns on one machine: real worker processes on fictitious GPUs, joblib's launcher, submitit's local mode."""

import itertools
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from aerl.runtime import gpus
from tests.conftest import ROOT
from tests.runs import begin, log_of, same_end, summary_of, wait_for

WORDS = ("analysis=none", "logger=none", "attack=none", "evaluation.samples=40")

# Claims a GPU for some seconds.
HOLDER = """
import logging, os, sys, time
from aerl.runtime import gpus
logging.basicConfig(format="%(message)s", level=logging.INFO)
gpus._SECONDS_BETWEEN_TRIES = 0.01
gpus.claim()
gpus.claim()  # a second job of the same worker
began = time.monotonic()
print("has", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
time.sleep(float(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], began, time.monotonic())
"""


@pytest.fixture
def holder(tmp_path):
    """`holder("0,1", seconds)` starts a process that holds one of these GPUs so long."""
    started = []

    def start(visible, seconds):
        env = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        command, pipe = [sys.executable, "-c", HOLDER, str(seconds)], subprocess.PIPE
        started.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_no_two_processes_hold_the_same_gpu_and_surplus_processes_queue(holder):
    processes = [holder("4,7", 0.2) for _ in range(6)]
    held: dict[str, list[tuple[float, float]]] = {}
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        name, began, ended = output.splitlines()[-1].split()
        held.setdefault(name, []).append((float(began), float(ended)))
    assert set(held) == {"4", "7"} and sum(map(len, held.values())) == 6
    for times in held.values():
        times.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))


def test_a_killed_holder_releases_its_gpu(holder):
    first = holder("0", 60)
    assert first.stdout.readline() == "has 0\n"
    second = holder("0", 0)
    assert second.stderr.readline().startswith("waiting: ")
    assert second.poll() is None
    first.kill()
    output, errors = second.communicate(timeout=60)
    assert output.startswith("has 0\n") and errors == "on GPU 0\n"


@pytest.mark.parametrize(
    ("given", "names"),
    [("0,2", ["0", "2"]), ("", []), ("-1", []), ("1,-1,0", ["1"]), ("NoDevFiles", []),
     ("GPU-5d3c, MIG-07a1", ["GPU-5d3c", "MIG-07a1"])],
)  # fmt: skip
def test_the_visible_gpus_are_those_that_cuda_sees(monkeypatch, given, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert gpus.visible() == names


@pytest.mark.gpu
def test_without_a_variable_all_gpus_of_the_machine_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(gpus.visible()) == torch.cuda.device_count() > 0


def test_a_grid_file_may_choose_the_launcher_and_each_worker_has_its_gpu(launch, tmp_path):
    (tmp_path / "multirun_sweeps").mkdir()
    (tmp_path / "multirun_sweeps/mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /hydra/launcher: gpus\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper: {params: {seed: '0,1', dataset.train_samples: '1280,9999'}}\n"
    )
    words = ("multirun_sweeps=mine", "trainer.epochs=1", "runs_dir=out", *WORDS)
    done = launch("--config-dir", str(tmp_path), *words, CUDA_VISIBLE_DEVICES="5,6", TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert sorted(re.findall(r"^job \d: on GPU (\d)$", done.stderr, re.MULTILINE)) == ["5", "6"]
    assert re.search(r"^job 2: training: 1,280 images", done.stderr, re.MULTILINE)
    assert re.search(r"^sl\s+2\s+[\d.]+ ± ", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^failed: job \d .*: dataset.train_samples=9999: ", done.stdout, re.MULTILINE)) == 2
    assert "Traceback" not in done.stderr
    folders = {path.parent for path in (tmp_path / "out").glob("*/*/*/*/*/summary.json")}
    assert {folder.name for folder in folders} == {"seed0", "seed1"}
    assert all(summary_of(folder)["status"] == "finished" for folder in folders)


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
def test_at_a_signal_the_workers_save_and_no_further_job_starts(tmp_path, data_dir, group):
    words = ("hydra/launcher=gpus", "hydra.launcher.n_jobs=2", "seed=0,1,2", "trainer.epochs=60")
    process = begin(tmp_path, data_dir, "-m", *words, *WORDS, new_session=True, CUDA_VISIBLE_DEVICES="")
    started = "runs/*/*/*/*/*/results.jsonl"
    wait_for(lambda: len(list(tmp_path.glob(started))) == 2, process)
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    folders = [path.parent for path in tmp_path.glob(started)]
    assert [summary_of(folder)["status"] for folder in folders] == ["stopped", "stopped"]
    assert all((folder / "checkpoints/last.pt").exists() for folder in folders)
    assert len(re.findall(r"^failed: job .*: stopped by SIGTERM; the same command", output, re.MULTILINE)) == 3


@pytest.mark.slow
def test_a_job_that_submitit_preempts_saves_resumes_and_ends_as_if_undisturbed(tmp_path, data_dir, launch):
    """Local mode: its own process, its own signal, its own requeueing."""
    words = ("trainer=rl", "trainer.epochs=8", "seed=0")
    local = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "name=cut")
    process = begin(tmp_path, data_dir, "-m", *local, *words, *WORDS)
    wait_for((tmp_path / "runs/cut/results.jsonl").exists, process)
    (controller,) = (path.parent.name for path in tmp_path.glob("runs/.submitit/*/*_log.out"))
    (job,) = subprocess.run(["pgrep", "-P", controller], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(job), signal.SIGUSR2)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert re.search(r"^rl\s+1\s+[\d.]+", output, re.MULTILINE)
    assert re.search(r"after epoch \d", log_of(tmp_path / "runs/cut"))
    assert launch(*words, *WORDS, "name=straight").returncode == 0
    same_end(tmp_path / "runs/cut", tmp_path / "runs/straight")


@pytest.mark.parametrize(("option", "extra"), [("gpus", "joblib"), ("slurm", "slurm")])
def test_without_its_extra_a_launcher_names_what_to_install(launch, tmp_path, option, extra):
    """Hydra finds no plugin; everything else works."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pkgutil\nreal = pkgutil.walk_packages\n"
        "pkgutil.walk_packages = lambda *args, **kwargs: (\n"
        "    module for module in real(*args, **kwargs) if not module.name.startswith('hydra_plugins.'))\n"
    )
    done = launch("-m", "seed=0,1", f"hydra/launcher={option}", PYTHONPATH=str(tmp_path))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"error: hydra/launcher={option}: ")
    assert f"pip install -e '.[{extra}]'" in line
    assert launch("seed=1", "--cfg", "job", PYTHONPATH=str(tmp_path)).stdout.startswith("seed: 1\n")
