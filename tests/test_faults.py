"""Faults of others while a whole run goes on: Weights & Biases, hubs and dataset servers, full disks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from aerl.tracking.results import read_results
from tests.conftest import ROOT
from tests.runs import results_of, wait_for
from tests.test_wandb import KEY, history, read_back, refusing, silent

assert refusing and silent  # fixtures: servers out of reach
WORDS = ("trainer.epochs=6", "attack=[fgsm,pgd]", "evaluation.samples=20", "analysis=pictures", "name=r")

# ----------------------------------------------------------------------------------- Weights & Biases


class WandB(ThreadingHTTPServer):
    """As much of W&B's server as lets a run begin. `fault`: it is "well", "rejects" the key, or "stalls"."""

    daemon_threads = True

    def __init__(self, fault: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.fault, self.begun, self.url = fault, threading.Event(), f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def end(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: WandB

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        query = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode(errors="replace")
        if self.server.fault == "stalls":
            time.sleep(600)
        project = {"id": "p", "name": "aerl", "entity": {"id": "e", "name": "me"}}
        if "upsertBucket" in query:
            bucket = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "project": project}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            self.server.begun.set()
        elif "CreateRunFiles" in query:  # without it W&B's service dies of itself
            data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        else:
            data = {"model": {**project, "bucket": None}} if "RunResumeStatus" in query else {}
        body = json.dumps({"data": data}).encode()
        self.send_response(401 if self.server.fault == "rejects" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def begin(tmp_path, data_dir, *words, **environment):
    """The real command line, in a process that the test can wait for or do something to."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    env |= {"AERL_DATA": str(data_dir), "HOME": str(tmp_path), "MPLCONFIGDIR": str(data_dir / "matplotlib")}
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    return subprocess.Popen(
        command, cwd=tmp_path, env=env | environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def service(process):
    """The process id of W&B's service, which any thread of the run may have started."""
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("no service")


def is_whole(tmp_path, process):
    """All results are there, exit code 0, one line about W&B; returns that line and the summary."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    folder = tmp_path / "runs/r"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and list(summary["attacks"]) == ["fgsm", "pgd"]
    results = read_results(folder / "results.jsonl")
    assert [r.step for r in results if (r.metric, r.split) == ("accuracy", "val")] == [1, 2, 3, 4, 5, 6]
    assert [r.metric for r in results][-1] == "worst_case_accuracy"
    assert (folder / "report.html").is_file()
    (line,) = [line for line in err.splitlines() if line.startswith("W&B")]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    return line, summary


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rejects", "refuses", "stalls"])
def test_a_run_that_cannot_begin_at_wandb_is_recorded_offline(tmp_path, data_dir, fault, refusing):
    server = None if fault == "refuses" else WandB(fault)
    url = refusing if server is None else server.url
    process = begin(tmp_path, data_dir, *WORDS, WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    line, summary = is_whole(tmp_path, process)
    assert line.startswith("W&B cannot be used online") and "recorded offline" in line
    assert summary["wandb"]["mode"] == "offline"
    rows = [row for row in history(read_back(tmp_path / "runs/r")) if "val/accuracy" in row]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    if server is not None:
        server.end()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["service killed", "server gone", "server stalls", "key revoked"])
def test_a_run_that_loses_wandb_on_its_way_is_whole_on_the_disk(tmp_path, data_dir, fault):
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
    line, summary = is_whole(tmp_path, process)
    assert line.startswith("W&B stopped")
    assert summary["wandb"]["mode"] == "interrupted"
    if fault != "service killed":  # which had not written anything yet
        rows = [row for row in history(read_back(tmp_path / "runs/r")) if "val/accuracy" in row]
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]  # for `wandb sync`


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds W&B's service in /proc")
@pytest.mark.parametrize("asked", [False, True])
def test_a_service_of_wandb_that_does_not_answer_is_given_up(tmp_path, data_dir, asked):
    """In a minute and a half; in twenty seconds if the run is asked to end. Nothing of it stays behind."""
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
        assert told(tmp_path / "runs/r")["status"] == "stopped"
    else:
        line, summary = is_whole(tmp_path, process)
        assert line.startswith("W&B stopped (no answer within ")
        assert summary["wandb"]["mode"] == "interrupted"
        assert time.monotonic() - began < 150
    wait_for(lambda: not Path(f"/proc/{core}").exists(), subprocess.Popen(["sleep", "20"]), 10)


# ----------------------------------------------------------------------------------- where data come from


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("dataset=huggingface", "dataset.path=me/x"), "dataset.path=me/x: is not on disk, and the hub does not"),
        (("trainer=none", "checkpoint=hf://me/x"), "checkpoint=hf://me/x: the hub cannot be reached"),
        (("dataset=cifar10",), "dataset=cifar10: cannot be downloaded ("),
    ],
)  # fmt: skip
@pytest.mark.parametrize("server", ["refusing", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_dead_server_of_data_or_models_is_told_in_one_line(tmp_path, request, words, line, server):
    """Nothing is left but what the run would have prepared anyway."""
    url = request.getfixturevalue(server)
    process = begin(
        tmp_path, tmp_path / "data", *words, HF_HUB_OFFLINE="0", HF_ENDPOINT=url, https_proxy=url,
        HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    out, err = process.communicate(timeout=60)  # a silent server is waited for during 20 s
    assert process.returncode == 1 and out == ""
    (said,) = [text for text in err.splitlines() if not text.startswith(("preparing ", "downloading "))]
    assert said.startswith(f"error: {line}")
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
    """Take all the space that is left."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def told(folder):
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_stage_is_told_and_the_run_goes_on(tmp_path, data_dir, disk, launch):
    """Full in training, then in an attack, then in the analyses: each time one line, and at last a whole run."""
    words = ("trainer.epochs=8", "attack=[fgsm,pgd]", "attack.pgd.steps=200", "evaluation.samples=60",
             "attack.pgd.drop_fooled=false", "evaluation.batch_size=5", "analysis=[curve,norms]", "logger=none",
             "name=r")  # fmt: skip
    runs = disk(tmp_path / "runs", 40)
    folder = runs / "r"
    stages = {
        "training": lambda: (folder / "results.jsonl").exists(),
        "attack": lambda: "fgsm" in told(folder).get("attacks", {}),
        "analyses": lambda: "robust_accuracy" in told(folder),
    }
    for stage, reached in stages.items():
        process = begin(tmp_path, data_dir, *words)
        wait_for(reached, process, 240)
        fill(runs)
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 1, (stage, err)
        assert "Traceback" not in err and "Logging error" not in err, (stage, err)
        (line,) = [text for text in err.splitlines() if text.startswith("error: ")]
        assert "cannot write" in line and "No space left on device; free some space and repeat" in line
        (runs / "filler").unlink()
    assert launch(*words).returncode == 0
    assert launch(*words, "runs_dir=whole").returncode == 0
    assert results_of(runs / "r") == results_of(tmp_path / "whole/r")


@pytest.mark.slow
def test_a_disk_full_of_wandb_costs_wandb_only(tmp_path, data_dir, disk):
    full = disk(tmp_path / "runs/r/wandb", 1)
    process = begin(tmp_path, data_dir, *WORDS, "logger.mode=offline")
    wait_for((tmp_path / "runs/r/results.jsonl").exists, process, 240)
    fill(full)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    assert told(tmp_path / "runs/r")["status"] == "finished"
    assert len(read_results(tmp_path / "runs/r/results.jsonl")) > 50
