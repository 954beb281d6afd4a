"""Weights & Biases for real: offline runs written and read back, and everything that can go wrong with it.

Each scenario is a process of its own, with a home of its own, so that no key, setting or session of the
person who runs the tests has a say. Nothing here needs a network.
"""

import hashlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aerl.config.names import shortened
from aerl.tracking.results import read_results
from aerl.tracking.wandb import _wandb_id

KEY = "0123456789abcdef0123456789abcdef01234567"

# Every scenario starts with this: `tracker = start(folder)` and `log = record(folder, tracker)`.
PRELUDE = """
import logging, os, sys, time
from pathlib import Path
from aerl.tracking.results import ResultLog
from aerl.tracking.wandb import open_tracker
logging.basicConfig(format="%(message)s", stream=sys.stdout)
root, mode = Path(sys.argv[1]), sys.argv[2]

def start(folder, **options):
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    tracker = open_tracker(mode, folder, "digits-sl-" + folder.name, **{
        "group": "digits-alicnn", "job_type": "train", "tags": ["sl", "test"],
        "config": {"trainer": {"lr": 2e-4, "out": Path("x")}, "seed": 0, "bad": float("nan")},
        "init_timeout": 2, "finish_timeout": 2, **options})
    print("opened in", round(time.monotonic() - began, 1))
    return tracker

def record(folder, tracker):
    identity = dict(run_id=folder.name, seed=0, dataset="digits", model="alicnn", trainer="sl")
    return ResultLog(folder, identity, tracker)

def finish(tracker):
    began = time.monotonic()
    tracker.finish()
    print("finished in", round(time.monotonic() - began, 1), tracker.mode)
"""


def environment(**extra: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB_", "XDG_")) and name not in ("NETRC", "HOME")
    }
    return {**kept, **extra}


def run(code: str, folder: Path, mode: str = "auto", **extra: str) -> str:
    """What the scenario printed; the W&B of a home without a key unless `extra` says otherwise."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    extra = {"HOME": str(home), **extra}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder), mode],
        env=environment(**extra), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # W&B says nothing on the terminal
    return done.stdout


def seconds(output: str, word: str) -> float:
    return float(next(line for line in output.splitlines() if line.startswith(word)).split()[2])


def warnings(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("W&B")]


def read_back(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of the one run below `folder`, by type; of an offline one, where online did not work."""
    (file,) = list(folder.glob("wandb/offline-run-*/*.wandb")) or folder.glob("wandb/run-*/*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    records: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record.get(record["type"], {}))
    return records


def history(records: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [entry["item"] for entry in records["history"]]


def summary(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {key: value for entry in records["summary"] for key, value in entry["update"].items()}


FULL = """
import json
import numpy as np
folder = root / "a"
tracker = start(folder, project="aerl-test", name="sl, seed 0")
log = record(folder, tracker)
for epoch in range(3):
    log.log({"loss": 1 / (epoch + 1), "accuracy": epoch / 4}, n=8, split="train", step=epoch)
    log.log({"accuracy": epoch / 2}, n=4, split="val", step=epoch)
log.log({"robust_accuracy": 0.25}, n=8, split="test", attack="pgd", norm="L2", eps=1.0)
tracker.table("attacks", ["attack", "eps", "robust accuracy"], [["pgd", 1.0, 0.25], ["fgsm", 0.1, None]])
tracker.pictures("pictures", [("an array", np.zeros((8, 8, 3), np.uint8)), ("a file", Path(sys.argv[3]))])
tracker.summary({"clean_accuracy": {"value": np.float32(0.5), "n": 8}, "worst_case_accuracy": 0.25})
files = {"results.jsonl": log.path}
tracker.artifact("model-1", "model", files, {"seed": 0})
tracker.artifact("model-2", "model", files, {}, used=True, changing=["results.jsonl"])
finish(tracker)
print(json.dumps(tracker.where()))
tracker.history(4, {"train/loss": 0.0})  # after the end: nothing, and no error
"""


def test_an_offline_run_is_read_back(tmp_path: Path) -> None:
    png = tmp_path / "x.png"
    png.write_bytes(_png())
    output = run(FULL.replace("sys.argv[3]", repr(str(png))), tmp_path)
    assert warnings(output) == []
    assert seconds(output, "finished") < 5
    folder = tmp_path / "a"
    records = read_back(folder)

    (started,) = records["run"]
    assert started["project"] == "aerl-test"
    assert started["run_group"] == "digits-alicnn"
    assert started["job_type"] == "train"
    assert started["display_name"] == "sl, seed 0"
    assert started["tags"] == ["sl", "test"]
    assert started["run_id"].startswith("digits-sl-a-")
    config = started["config"]["update"]
    assert config["trainer"] == {"lr": 2e-4, "out": "x"}
    assert config["seed"] == 0

    epochs = [row for row in history(records) if "epoch" in row]
    assert [(row["epoch"], row["train/loss"]) for row in epochs if "train/loss" in row] == [
        (0, 1), (1, 0.5), (2, 1 / 3),
    ]  # fmt: skip
    assert [row["val/accuracy"] for row in epochs if "val/accuracy" in row] == [0, 0.5, 1]
    axes = {metric.get("glob_name"): metric.get("step_metric") for metric in records["metric"]}
    assert axes["train/*"] == axes["val/*"] == "epoch"

    final = summary(records)
    assert final["test/pgd/robust_accuracy"] == 0.25
    assert final["clean_accuracy"] == {"value": 0.5, "n": 8}
    assert final["worst_case_accuracy"] == 0.25
    assert final["attacks.nrows"] == 2
    assert final["pictures.captions"] == ["an array", "a file"]

    (files,) = folder.glob("wandb/offline-run-*/files")
    table = json.loads((files / final["attacks.path"]).read_text())
    assert table["columns"] == ["attack", "eps", "robust accuracy"]
    assert table["data"] == [["pgd", 1.0, 0.25], ["fgsm", 0.1, None]]
    for picture in final["pictures.filenames"]:
        assert (files / picture).read_bytes().startswith(b"\x89PNG")
    assert records["exit"] == [{}] or records["exit"][0].get("exit_code", 0) == 0

    model, used = (item for item in records["artifact"] if item["type"] == "model")
    (entry,), (copy,) = (item["manifest"]["contents"] for item in (model, used))
    digest = hashlib.sha256((folder / "results.jsonl").read_bytes()).hexdigest()
    assert json.loads(model["metadata"]) == {"seed": 0, "sha256": {"results.jsonl": digest}}
    assert entry["local_path"] == str(folder / "results.jsonl") != copy["local_path"]
    assert used["use_after_commit"] and not model.get("use_after_commit")

    place = json.loads(output.splitlines()[-1])
    assert place["mode"] == "offline" and place["url"] is None
    assert (folder / place["path"]) == files.parent  # where the table sends the reader
    assert not (tmp_path / "home" / ".local").exists()  # artifacts are staged in the run folder


def _png() -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (4, 4), 128).save(stream, "png")
    return stream.getvalue()


TWO = """
first = start(root / "a")
record(root / "a", first).log({"loss": 1.0}, n=1, split="train", step=0)
names = {"group": "g" * 200, "name": "é" * 200, "tags": ["t" * 70 + "1", "t" * 70 + "2", ""]}
second = start(root / "b", **names)  # the first was never finished: its job crashed
record(root / "b", second).log({"loss": 2.0}, n=1, split="train", step=0)
finish(second)
print("left", [name for name in os.environ if name.startswith("WANDB_DATA")])
"""


def test_two_runs_in_one_process_are_two_runs(tmp_path: Path) -> None:
    output = run(TWO, tmp_path)
    assert warnings(output) == []
    assert "left []" in output
    a, b = read_back(tmp_path / "a"), read_back(tmp_path / "b")
    assert a["run"][0]["run_id"] != b["run"][0]["run_id"]
    (started,) = b["run"]  # names within W&B's lengths, and still distinct
    assert len(started["run_group"]) <= 128 and len(started["display_name"]) <= 128
    assert len(set(started["tags"])) == 2 and all(len(tag) <= 64 for tag in started["tags"])
    assert shortened("g" * 200, 128) == started["run_group"] != shortened("g" * 201, 128)
    assert [row["train/loss"] for row in history(a)] == [1]
    assert [row["train/loss"] for row in history(b)] == [2]


def test_a_folder_keeps_its_id_and_another_folder_has_another(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    stored = _wandb_id(tmp_path / "a", "lr=1e-3,x/y")
    assert re.fullmatch(r"lr-1e-3-x-y-[0-9a-f]{6}", stored)
    assert _wandb_id(tmp_path / "a", "lr=1e-3,x/y") == stored != _wandb_id(tmp_path / "b", "lr=1e-3,x/y")


# ---------------------------------------------------------------------------------- what goes wrong

GOES_ON = """
tracker = start(root / "a")
log = record(root / "a", tracker)
for epoch in range(3):
    log.log({"loss": 1.0}, n=1, split="train", step=epoch)
finish(tracker)
"""


@pytest.fixture
def refusing() -> str:
    """The address of a server that is not there."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes every connection and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("server", ["refusing", "silent"])
def test_a_server_out_of_reach_means_offline_within_the_time(
    tmp_path: Path, server: str, request: pytest.FixtureRequest
) -> None:
    url, began = request.getfixturevalue(server), time.monotonic()
    output = run(GOES_ON, tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert len(warnings(output)) == 1
    assert "this run is recorded offline" in output
    assert time.monotonic() - began < 15  # 2 s of waiting, 2 s of giving up; the rest is a slow machine
    assert len(read_results(tmp_path / "a" / "results.jsonl")) == 3
    assert len(history(read_back(tmp_path / "a"))) == 3
    for path in tmp_path.rglob("*"):  # the key is in no file, no log
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


# As much of the server as lets a run begin; stopped in mid-run, as a network is that goes away.
LOST = """
import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROJECT = {"id": "p", "name": "aerl", "entity": {"id": "e", "name": "me"}}
BUCKET = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "project": PROJECT}

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass
    def do_POST(self):
        query = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if "upsertBucket" in query:
            data = {"upsertBucket": {"bucket": BUCKET, "inserted": True}}
        else:
            data = {"model": {**PROJECT, "bucket": None}} if "RunResumeStatus" in query else {}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}", WANDB_API_KEY="%s")
tracker = start(root / "a", init_timeout=15)
print("began", tracker.where())
server.shutdown()
server.server_close()
log = record(root / "a", tracker)
for epoch in range(3):
    log.log({"loss": 1.0}, n=1, split="train", step=epoch)
finish(tracker)
"""


def test_a_server_lost_in_mid_run_delays_the_end_by_a_bounded_time(tmp_path: Path) -> None:
    output = run(LOST % KEY, tmp_path)
    assert "'mode': 'online'" in output and "/me/aerl/runs/" in output
    (warning,) = warnings(output)
    assert warning.startswith("W&B stopped (Timed out finishing run.)")
    assert seconds(output, "finished") < 15  # 2 s for the end, as much for the session, and a slow machine
    assert output.rstrip().endswith("interrupted")
    assert len(read_results(tmp_path / "a" / "results.jsonl")) == 3
    assert len(history(read_back(tmp_path / "a"))) == 3  # all of it is there for `wandb sync`


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
def test_a_killed_service_costs_one_warning_and_not_the_next_run(tmp_path: Path) -> None:
    output = run(KILLED, tmp_path)
    assert "killed" in output
    (warning,) = warnings(output)
    assert warning.startswith("W&B stopped")
    assert len(read_results(tmp_path / "a" / "results.jsonl")) == 4
    assert [row["train/loss"] for row in history(read_back(tmp_path / "b"))] == [2]


def test_a_home_that_cannot_be_written_to_is_no_obstacle(tmp_path: Path) -> None:
    assert warnings(run(GOES_ON, tmp_path, HOME="/proc/self/nowhere")) == []
    assert len(history(read_back(tmp_path / "a"))) == 3


UNWRITABLE = """
(root / "a").mkdir()
(root / "a" / "wandb").write_text("in the way")
tracker = start(root / "a")
record(root / "a", tracker).log({"loss": 1.0}, n=1, split="train", step=0)
print("tracker", tracker)
"""


def test_a_folder_wandb_cannot_use_costs_one_warning(tmp_path: Path) -> None:
    output = run(UNWRITABLE, tmp_path)
    (warning,) = warnings(output)
    assert warning.startswith("W&B is off")
    assert "tracker None" in output
    assert len(read_results(tmp_path / "a" / "results.jsonl")) == 1


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_key_nothing_is_asked_at_a_terminal(tmp_path: Path, mode: str) -> None:
    (tmp_path / "home").mkdir()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + GOES_ON, str(tmp_path), mode],
        env=environment(HOME=str(tmp_path / "home"), TERM="xterm"),
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    try:
        output = _until_end(ours, process)
    finally:
        process.kill()
        os.close(ours)
    assert process.wait() == 0, output
    lines = output.replace("\r", "").splitlines()
    said = [line for line in lines if not line.startswith(("opened", "finished"))]
    assert len(said) == (1 if mode == "online" else 0), said
    assert all("no key" in line and "offline" in line for line in said)


def _until_end(terminal: int, process: subprocess.Popen[bytes]) -> str:
    """What the process prints on the terminal until it ends, for a minute at the most."""
    output, deadline = b"", time.monotonic() + 60
    os.set_blocking(terminal, False)
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        try:
            output += os.read(terminal, 65536)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # the other end is closed
            break
        if ended:
            break
    assert process.poll() is not None or process.wait(5) == 0, "it waits for an answer"
    return output.decode(errors="replace")


# ---------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(("mode", "variable"), [("disabled", "online"), ("auto", "disabled")])
def test_switched_off(tmp_path: Path, mode: str, variable: str) -> None:
    output = run("print(start(root / 'a'), 'wandb' in sys.modules)", tmp_path, mode, WANDB_MODE=variable)
    assert f"None {mode == 'auto'}" in output  # only W&B itself can say what its settings mean
    assert not list(tmp_path.rglob("*.wandb"))


def test_the_configuration_goes_before_the_environment(tmp_path: Path) -> None:
    run(GOES_ON, tmp_path, "offline", WANDB_MODE="disabled")
    assert len(history(read_back(tmp_path / "a"))) == 3


def test_offline_in_wandbs_settings_file_counts(tmp_path: Path, refusing: str) -> None:
    settings = tmp_path / "home" / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nmode = offline\n")
    assert warnings(run(GOES_ON, tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=refusing)) == []


@pytest.mark.parametrize(("password", "online"), [(KEY, True), ('""', False)])
def test_a_netrc_entry_is_a_login(tmp_path: Path, password: str, online: bool, refusing: str) -> None:
    host = refusing.removeprefix("http://")
    (tmp_path / "netrc").write_text(f"machine {host} login user password {password}")
    code = "from aerl.tracking.wandb import logged_in; print('logged in', logged_in())"
    output = run(code, tmp_path, WANDB_BASE_URL=refusing, NETRC=str(tmp_path / "netrc"), WANDB_SILENT="true")
    assert f"logged in {online}" in output
