"""Faults of other programs during a run: Weights & Biases, hubs and dataset servers, full disks."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aerl.tracking.results import read_results
from tests.runs import begin, ended, results_of, summary_of, wait_for
from tests.test_wandb import KEY, WandB, has_no_key, history, read_back, refusing, silent

assert refusing and silent  # fixtures: servers out of reach
WORDS = ("trainer.epochs=6", "attack=[fgsm,pgd]", "evaluation.samples=20", "analysis=pictures", "name=r")


# ----------------------------------------------------------------------------------- Weights & Biases


def service(process):
    """The process id of W&B's service, which any thread of the run may have started."""
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("no service")


def check_complete(tmp_path, process, warning):
    """All results exist, the exit code is 0, and one line is about W&B."""
    done, folder = ended(process), tmp_path / "runs/r"
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    summary = summary_of(folder)
    assert summary["status"] == "finished" and list(summary["attacks"]) == ["fgsm", "pgd"]
    results = read_results(folder / "results.jsonl")
    assert [r.step for r in results if (r.metric, r.split) == ("accuracy", "val")] == [1, 2, 3, 4, 5, 6]
    assert results[-1].metric == "worst_case_accuracy"
    assert (folder / "report.html").is_file()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("W&B")]
    assert line.startswith(warning) and summary["wandb"]["mode"] == "interrupted"
    assert has_no_key(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["service killed", "server gone", "server stalls", "key revoked"])
def test_a_run_that_loses_wandb_is_complete_on_the_disk(tmp_path, data_dir, fault):
    server = WandB("well")
    process = begin(tmp_path, data_dir, *WORDS, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    wait_for((tmp_path / "runs/r/results.jsonl").exists, process, 240)
    assert server.begun.is_set()
    if fault == "service killed":
        os.kill(service(process), signal.SIGKILL)
    elif fault == "server gone":
        server.end()
    else:
        server.fault = "stalls" if fault == "server stalls" else "rejects"
    check_complete(tmp_path, process, "W&B stopped")
    if fault != "service killed":  # which had not written anything yet
        rows = [row for row in history(read_back(tmp_path / "runs/r")) if "val/accuracy" in row]
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]  # for `wandb sync`


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds W&B's service in /proc")
@pytest.mark.parametrize("asked", [False, True])
def test_a_service_of_wandb_that_does_not_answer_is_given_up(tmp_path, data_dir, asked):
    """In a minute and a half; in twenty seconds if the run is asked to end. No process remains."""
    process = begin(tmp_path, data_dir, *WORDS, "logger.mode=offline")
    wait_for((tmp_path / "runs/r/results.jsonl").exists, process, 240)
    core = service(process)
    os.kill(core, signal.SIGSTOP)
    began = time.monotonic()
    if asked:
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75 and time.monotonic() - began < 30
        assert "W&B stopped" in err and "Traceback" not in err
        assert summary_of(tmp_path / "runs/r")["status"] == "stopped"
    else:
        check_complete(tmp_path, process, "W&B stopped (no answer within ")
        assert time.monotonic() - began < 150
    wait_for(lambda: not Path(f"/proc/{core}").exists(), subprocess.Popen(["sleep", "20"]), 10)


# ----------------------------------------------------------------------------------- where data come from


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("dataset=huggingface", "dataset.path=me/x"), "dataset.path=me/x: "),
        (("trainer=none", "checkpoint=hf://me/x"), "checkpoint=hf://me/x: "),
        (("dataset=cifar10",), "dataset=cifar10: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("server", ["refusing", pytest.param("silent", marks=pytest.mark.slow)])
def test_an_unreachable_server_of_data_or_models_is_one_line(tmp_path, request, words, line, server):
    url = request.getfixturevalue(server)
    process = begin(
        tmp_path, tmp_path / "data", *words, HF_HUB_OFFLINE="0", HF_ENDPOINT=url, https_proxy=url,
        HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    done = ended(process, 60)  # a silent server gets 20 s
    assert done.returncode == 1 and done.stdout == ""
    (error,) = [text for text in done.stderr.splitlines() if not text.startswith(("preparing ", "downloading "))]
    assert error.startswith(f"error: {line}")
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------- full disks


@pytest.fixture
def disk(tmp_path):
    """`disk(folder, megabytes)` mounts a small file system there."""
    mounted = []

    def mount(folder, megabytes):
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("only root can mount a small file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_at_any_stage_and_the_run_resumes(tmp_path, data_dir, disk, launch):
    words = ("trainer.epochs=8", "attack=[fgsm,pgd]", "attack.pgd.steps=200", "evaluation.samples=60",
             "attack.pgd.drop_fooled=false", "evaluation.batch_size=5", "analysis=[curve,norms]", "logger=none",
             "name=r")  # fmt: skip
    runs = disk(tmp_path / "runs", 40)
    folder = runs / "r"
    stages = {
        "training": lambda: (folder / "results.jsonl").exists(),
        "attack": lambda: "fgsm" in summary_of(folder).get("attacks", {}),
        "analyses": lambda: "robust_accuracy" in summary_of(folder),
    }
    for stage, reached in stages.items():
        process = begin(tmp_path, data_dir, *words)
        wait_for(lambda: (folder / "summary.json").exists() and reached(), process, 240)  # noqa: B023
        fill(runs)
        err = ended(process).stderr
        assert process.returncode == 1, (stage, err)
        assert "Traceback" not in err and "Logging error" not in err, (stage, err)
        (line,) = [text for text in err.splitlines() if text.startswith("error: ")]
        assert "cannot write" in line and "No space left on device" in line
        (runs / "filler").unlink()
    assert launch(*words).returncode == 0
    assert launch(*words, "runs_dir=straight").returncode == 0
    assert results_of(runs / "r") == results_of(tmp_path / "straight/r")


@pytest.mark.slow
def test_a_full_disk_of_wandb_does_not_affect_the_run(tmp_path, data_dir, disk):
    full = disk(tmp_path / "runs/r/wandb", 1)
    process = begin(tmp_path, data_dir, *WORDS, "logger.mode=offline")
    wait_for((tmp_path / "runs/r/results.jsonl").exists, process, 240)
    fill(full)
    done = ended(process)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert summary_of(tmp_path / "runs/r")["status"] == "finished"
    assert len(read_results(tmp_path / "runs/r/results.jsonl")) > 50
