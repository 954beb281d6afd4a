"""Weights & Biases for real: offline runs written and read back, and everything that can go wrong with it.

Each scenario is a process of its own with a home of its own, so that the tester's keys and settings do not matter.
Nothing here needs a network.
"""

import hashlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from aerl.runtime.terminal import shortened
from aerl.tracking.results import read_results
from aerl.tracking.wandb import _wandb_id

KEY = "0123456789abcdef0123456789abcdef01234567"

# Every scenario starts with this: `tracker = start(folder)` and `log = record(folder, tracker)`.
PRELUDE = """
import logging, os, sys, time
from pathlib import Path
import aerl.tracking.wandb
from aerl.tracking.results import ResultLog
logging.basicConfig(format="%(message)s", stream=sys.stdout)
aerl.tracking.wandb._INIT_SECONDS = aerl.tracking.wandb._FINISH_SECONDS = 2
root, mode = Path(sys.argv[1]), sys.argv[2]

def start(folder, **options):
    folder.mkdir(exist_ok=True)
    return aerl.tracking.wandb.open_tracker(mode, folder, "digits-sl-" + folder.name, **{
        "group": "digits-alicnn", "job_type": "train", "name": "sl", "tags": ["sl", "test"],
        "config": {"trainer": {"lr": 2e-4, "out": Path("x")}, "seed": 0, "bad": float("nan")}, **options})

def record(folder, tracker):
    identity = dict(run_id=folder.name, seed=0, dataset="digits", model="alicnn", trainer="sl")
    return ResultLog(folder, identity, tracker)

def finish(tracker):
    began = time.monotonic()
    tracker.finish(0)
    print("finished in", round(time.monotonic() - began, 1), tracker.where()["mode"])
"""
THREE_EPOCHS = """
tracker = start(root / "a")
log = record(root / "a", tracker)
for epoch in range(3):
    log.log({"loss": 1.0}, n=1, split="train", step=epoch)
finish(tracker)
"""


def environment(**extra):
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB_", "XDG_")) and name not in ("NETRC", "HOME")
    }
    return {**kept, **extra}


def run(code, folder, mode: str = "auto", **extra):
    """What the scenario printed; its home has no key unless `extra` gives one."""
    (folder / "home").mkdir(exist_ok=True)
    env = environment(**{"HOME": str(folder / "home"), **extra})
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder), mode], env=env,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # W&B prints nothing on the terminal
    return done.stdout


def warnings(output):
    return [line for line in output.splitlines() if line.startswith("W&B")]


def read_back(folder):
    """The records of the one run below `folder`, by type; of an offline one, if online did not work."""
    (file,) = list(folder.glob("wandb/offline-run-*/*.wandb")) or folder.glob("wandb/run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    records = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record.get(record["type"], {}))
    return records


def history(records):
    return [entry["item"] for entry in records["history"]]


def summary(records):
    return {key: value for entry in records["summary"] for key, value in entry["update"].items()}


FULL = """
import json
import numpy as np
from PIL import Image
folder = root / "a"
tracker = start(folder, project="aerl-test", name="sl, seed 0")
log = record(folder, tracker)
for epoch in range(3):
    log.log({"loss": 1 / (epoch + 1), "accuracy": epoch / 4}, n=8, split="train", step=epoch)
    log.log({"accuracy": epoch / 2}, n=4, split="val", step=epoch)
log.log({"robust_accuracy": 0.25}, n=8, split="test", attack="pgd", norm="L2", eps=1.0)
tracker.table("attacks", ["attack", "eps", "robust accuracy"], [["pgd", 1.0, 0.25], ["fgsm", 0.1, None]])
Image.new("L", (4, 4), 128).save(root / "x.png")
tracker.pictures("pictures", [("an array", np.zeros((8, 8, 3), np.uint8)), ("a file", root / "x.png")])
tracker.summary({"clean_accuracy": {"value": np.float32(0.5), "n": 8}, "worst_case_accuracy": 0.25})
(folder / "summary.json").write_text("{}")
tracker.artifact("model-1", "model", {"results.jsonl": log.path}, {"seed": 0})
tracker.artifact("model-2", "model", {"summary.json": folder / "summary.json"}, {}, used=True)
finish(tracker)
print(json.dumps(tracker.where()))
tracker.history(4, {"train/loss": 0.0})  # after the end: nothing, and no error
"""


def test_an_offline_run_is_read_back(tmp_path):
    output = run(FULL, tmp_path)
    assert warnings(output) == []
    folder = tmp_path / "a"
    records = read_back(folder)

    (started,) = records["run"]
    names = ("project", "run_group", "job_type", "display_name", "tags")
    assert [started[name] for name in names] == ["aerl-test", "digits-alicnn", "train", "sl, seed 0", ["sl", "test"]]
    assert started["run_id"].startswith("digits-sl-a-")
    config = started["config"]["update"]
    assert config["trainer"] == {"lr": 2e-4, "out": "x"} and config["seed"] == 0

    epochs = [row for row in history(records) if "epoch" in row]
    losses = [(row["epoch"], row["train/loss"]) for row in epochs if "train/loss" in row]
    assert losses == [(0, 1), (1, 0.5), (2, 1 / 3)]
    assert [row["val/accuracy"] for row in epochs if "val/accuracy" in row] == [0, 0.5, 1]
    axes = {metric.get("glob_name"): metric.get("step_metric") for metric in records["metric"]}
    assert axes["train/*"] == axes["val/*"] == "epoch"

    final = summary(records)
    assert final["test/pgd/robust_accuracy"] == final["worst_case_accuracy"] == 0.25
    assert final["clean_accuracy"] == {"value": 0.5, "n": 8}
    assert final["pictures.captions"] == ["an array", "a file"]
    (files,) = folder.glob("wandb/offline-run-*/files")
    table = json.loads((files / final["attacks.path"]).read_text())
    assert table["columns"] == ["attack", "eps", "robust accuracy"]
    assert table["data"] == [["pgd", 1.0, 0.25], ["fgsm", 0.1, None]]
    for picture in final["pictures.filenames"]:
        assert (files / picture).read_bytes().startswith(b"\x89PNG")
    assert records["exit"][0].get("exit_code", 0) == 0

    model, used = (item for item in records["artifact"] if item["type"] == "model")
    (entry,), (copy,) = (item["manifest"]["contents"] for item in (model, used))
    digest = hashlib.sha256((folder / "results.jsonl").read_bytes()).hexdigest()
    assert json.loads(model["metadata"]) == {"seed": 0, "sha256": {"results.jsonl": digest}}
    assert entry["local_path"] == str(folder / "results.jsonl")
    assert copy["local_path"] != str(folder / "summary.json")
    assert used["use_after_commit"] and not model.get("use_after_commit")

    where = json.loads(output.splitlines()[-1])
    assert where["mode"] == "offline" and where["url"] is None and (folder / where["path"]) == files.parent
    assert not (tmp_path / "home/.local").exists() and not (tmp_path / "home/.cache/wandb").exists()


TWO = """
first = start(root / "a")
record(root / "a", first).log({"loss": 1.0}, n=1, split="train", step=0)
names = {"group": "g" * 200, "name": "é" * 200, "tags": ["t" * 70 + "1", "t" * 70 + "2", ""]}
second = start(root / "b", **names)  # the first was never finished: its job crashed
record(root / "b", second).log({"loss": 2.0}, n=1, split="train", step=0)
finish(second)
print("left", [name for name in os.environ if name.startswith("WANDB_DATA")])
"""


def test_two_runs_in_one_process_are_two_runs_with_names_that_the_server_accepts(tmp_path):
    output = run(TWO, tmp_path)
    assert warnings(output) == [] and "left []" in output
    a, b = read_back(tmp_path / "a"), read_back(tmp_path / "b")
    (started,) = b["run"]
    assert a["run"][0]["run_id"] != started["run_id"]
    assert len(started["run_group"]) <= 128 and len(started["display_name"]) <= 128
    assert len(set(started["tags"])) == 2 and all(len(tag) <= 64 for tag in started["tags"])
    assert shortened("g" * 200, 128) == started["run_group"] != shortened("g" * 201, 128)
    assert [[row["train/loss"] for row in history(records)] for records in (a, b)] == [[1], [2]]


def test_the_id_belongs_to_the_folder(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    stored = _wandb_id(tmp_path / "a", "lr=1e-3,x/y")
    assert re.fullmatch(r"lr-1e-3-x-y-[0-9a-f]{6}", stored)
    assert _wandb_id(tmp_path / "a", "lr=1e-3,x/y") == stored != _wandb_id(tmp_path / "b", "lr=1e-3,x/y")


# ------------------------------------------------------------------------------------------------- faults


class WandB(ThreadingHTTPServer):
    """As much of W&B's server as lets a run begin. `fault`: it is "well", "rejects" the key, or "stalls"."""

    daemon_threads = True

    def __init__(self, fault):
        super().__init__(("127.0.0.1", 0), Answer)
        self.fault, self.begun, self.url = fault, threading.Event(), f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def end(self):
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    def log_message(self, format, *arguments):
        pass

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        query = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode(errors="replace")
        if self.server.fault == "stalls":
            time.sleep(600)
        project = {"id": "p", "name": "aerl", "entity": {"id": "e", "name": "me"}}
        data = {"model": {**project, "bucket": None}} if "RunResumeStatus" in query else {}
        if "upsertBucket" in query:
            bucket = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "project": project}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
            self.server.begun.set()
        elif "CreateRunFiles" in query:  # without it W&B's service dies
            data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        body = json.dumps({"data": data}).encode()
        self.send_response(401 if self.server.fault == "rejects" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def refusing():
    """The address of a server that does not exist."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def silent():
    """The address of a server that accepts connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def rejecting():
    """The address of a server that does not know the key."""
    return WandB("rejects").url


def has_no_key(folder):
    """Whether the key is in no file."""
    return not any(KEY.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("mode", "server", "variables", "warned"),
    [
        ("auto", "refusing", {}, 1),
        ("auto", "silent", {}, 1),
        ("auto", "rejecting", {}, 1),
        ("auto", "refusing", {"WANDB_CONFIG_DIR": "settings"}, 0),  # where W&B is set to offline
        ("offline", "refusing", {"WANDB_MODE": "disabled"}, 0),  # the configuration precedes the environment
        ("auto", None, {"HOME": "/proc/self/nowhere"}, 0),  # cannot be written to
    ],
)
def test_without_a_server_a_run_is_offline_within_seconds(tmp_path, mode, server, variables, warned, request):
    if server is not None:
        variables = variables | {"WANDB_BASE_URL": request.getfixturevalue(server), "WANDB_API_KEY": KEY}
    if "WANDB_CONFIG_DIR" in variables:
        variables["WANDB_CONFIG_DIR"] = str(tmp_path)
        (tmp_path / "settings").write_text("[default]\nmode = offline\n")
    began = time.monotonic()
    output = run(THREE_EPOCHS, tmp_path, mode, **variables)
    assert len(warnings(output)) == warned == output.count("this run is recorded offline")
    assert time.monotonic() - began < 30  # 2 s of waiting, 2 s of giving up; the rest is a slow machine
    assert len(read_results(tmp_path / "a/results.jsonl")) == len(history(read_back(tmp_path / "a"))) == 3
    assert has_no_key(tmp_path)


LOST = """
aerl.tracking.wandb._INIT_SECONDS = 15
tracker = start(root / "a")
print("began", tracker.where(), flush=True)
sys.stdin.readline()
log = record(root / "a", tracker)
for epoch in range(3):
    log.log({"loss": 1.0}, n=1, split="train", step=epoch)
finish(tracker)
"""


def test_a_lost_server_delays_the_end_by_a_bounded_time(tmp_path):
    server = WandB("well")
    env = environment(HOME=str(tmp_path), WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + LOST, str(tmp_path), "auto"],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    began = process.stdout.readline()
    assert "'mode': 'online'" in began and "/me/aerl/runs/" in began
    server.end()
    output, _ = process.communicate("\n", timeout=60)
    (warning,) = warnings(output)
    assert warning.startswith("W&B stopped (Timed out finishing run.)")
    seconds, mode = output.splitlines()[-1].split()[2:]
    assert float(seconds) < 15 and mode == "interrupted"  # 2 s for the end, as much for the session, and a slow machine
    # All of it can still be uploaded by `wandb sync`.
    assert len(read_results(tmp_path / "a/results.jsonl")) == len(history(read_back(tmp_path / "a"))) == 3


KILLED = """
import signal
def kill_service():
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            print("killed")

first = start(root / "a")
log = record(root / "a", first)
log.log({"loss": 1.0}, n=1, split="train", step=0)
kill_service()
time.sleep(0.3)
for epoch in range(1, 4):
    log.log({"loss": 1.0}, n=1, split="train", step=epoch)
finish(first)
second = start(root / "b")
record(root / "b", second).log({"loss": 2.0}, n=1, split="train", step=0)
finish(second)
"""


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc")
def test_a_killed_service_is_one_warning_and_does_not_affect_the_next_run(tmp_path):
    output = run(KILLED, tmp_path)
    (warning,) = warnings(output)
    assert "killed" in output and warning.startswith("W&B stopped")
    assert len(read_results(tmp_path / "a/results.jsonl")) == 4
    assert [row["train/loss"] for row in history(read_back(tmp_path / "b"))] == [2]


def test_a_folder_that_wandb_cannot_use_is_one_warning(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/wandb").write_text("in the way")
    (warning,) = warnings(run(THREE_EPOCHS.replace("finish(tracker)", "assert tracker is None"), tmp_path))
    assert warning.startswith("W&B is off")
    assert len(read_results(tmp_path / "a/results.jsonl")) == 3


@pytest.mark.parametrize(("mode", "warned"), [("auto", 0), ("online", 1)])
def test_without_a_key_nothing_is_asked_at_a_terminal(tmp_path, mode, warned):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + THREE_EPOCHS, str(tmp_path), mode],
        env=environment(HOME=str(tmp_path), TERM="xterm"), stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    try:
        assert process.wait(60) == 0  # what it prints fits into the terminal's buffer
        lines = os.read(ours, 65536).decode().splitlines()
    finally:
        process.kill()
        os.close(ours)
    assert len(lines) == warned + 1 and lines[-1].startswith("finished")
    assert warned == 0 or ("no key" in lines[0] and "offline" in lines[0])


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(("mode", "variable"), [("disabled", "online"), ("auto", "disabled")])
def test_switched_off(tmp_path, mode, variable):
    output = run("print(start(root / 'a'), 'wandb' in sys.modules)", tmp_path, mode, WANDB_MODE=variable)
    assert f"None {mode == 'auto'}" in output  # only W&B itself knows its settings
    assert not list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize(("password", "online"), [(KEY, True), ('""', False)])
def test_a_netrc_entry_is_a_login(tmp_path, password, online, refusing):
    host = refusing.removeprefix("http://")
    (tmp_path / "netrc").write_text(f"machine {host} login user password {password}")
    code = "print('logged in', aerl.tracking.wandb.logged_in())"
    output = run(code, tmp_path, WANDB_BASE_URL=refusing, NETRC=str(tmp_path / "netrc"), WANDB_SILENT="true")
    assert f"logged in {online}" in output
