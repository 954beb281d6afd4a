"""A model exported from a run folder, pushed to a hub of our own, and evaluated from there."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml

from aerl.hub import export, main
from aerl.runtime.files import load_arrays, sha256
from aerl.training import checkpoint
from aerl.types import UserError
from tests.conftest import ROOT
from tests.runs import forge, summary_of
from tests.test_wandb import environment

EVALUATION = ("attack=fgsm", "norm=Linf", "eps=8/255", "evaluation.samples=40", "analysis=none")
QUIET = ("logger=none",)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A run folder that was trained, shared: no test writes into it."""
    home = tmp_path_factory.mktemp("hub")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    words = ("trainer.epochs=1", "trainer=rl", *EVALUATION, *QUIET, "name=r")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *words],
        cwd=home, env=env | {"AERL_DATA": str(data_dir)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return home / "runs/r"


@pytest.fixture
def exported(trained, tmp_path):
    return export(trained, tmp_path / "model", "mit")


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", str(tmp_path / "none"))


def same_outcomes(*folders):
    one, other = (load_arrays(folder / "outcomes.npz") for folder in folders)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


def launch_hub(folder, *words, **variables):
    env = environment(HOME=str(folder / "home"), PYTHONPATH=str(ROOT), **variables)
    command = [sys.executable, "-m", "aerl.hub", "export", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_weights_and_outcomes_are_the_same_bits(trained, exported, launch, tmp_path):
    before = checkpoint.tensors(trained / "checkpoints/best.pt")
    after = checkpoint.tensors(exported / "model.safetensors")
    assert before.keys() == after.keys() and len(before) > 10
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    done = launch("trainer=none", "checkpoint=model", *EVALUATION, *QUIET, "name=again")
    assert done.returncode == 0, done.stderr
    same_outcomes(trained, tmp_path / "runs/again")
    assert summary_of(tmp_path / "runs/again")["origin"]["trainer"] == "rl"

    # The run that evaluated it exports the same model, with its own results.
    assert main(["export", str(tmp_path / "runs/again")]) == 1  # from elsewhere its checkpoint=model is unknown
    again = launch_hub(tmp_path, "runs/again")
    assert again.returncode == 0, again.stderr
    copy = tmp_path / "runs/again/export"
    assert (copy / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert "trainer=none checkpoint=model" in (copy / "README.md").read_text()


def test_card_is_one_that_the_hub_reads(trained, exported):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    summary = summary_of(trained)
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("mit", "aerl", ["digits"])
    worst = summary["worst_case_accuracy"]
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        "clean accuracy": summary["clean_accuracy"]["value"], "worst-case accuracy, Linf eps 8/255": worst["value"],
    }  # fmt: skip
    digest = sha256(exported / "model.safetensors")
    assert summary_of(exported)["weights"]["sha256"] == digest
    for text in (
        digest,
        "python launch.py trainer.epochs=1 trainer=rl attack=fgsm norm=Linf eps=8/255",
        "python launch.py trainer=none checkpoint=FOLDER attack=fgsm norm=Linf eps=8/255",
        f"| {100 * worst['value']:.1f} % ({100 * worst['low']:.1f} to {100 * worst['high']:.1f} %) | yes |\n",
    ):
        assert text in card.text
    for path in exported.iterdir():  # nothing of this machine
        assert str(trained.parents[1]).encode() not in path.read_bytes()
    assert not {"runs_dir", "data_dir", "logger"} & set(yaml.safe_load((exported / "config.yaml").read_text()))


@pytest.mark.parametrize("damage", [lambda content: content[:-1000], lambda content: b"\x80\x04cos\nsystem\n"])
def test_damaged_weights_are_refused(exported, damage):
    path = exported / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="SHA-256 is"):
        checkpoint.load(checkpoint.find(str(exported)))
    (exported / "summary.json").unlink()  # as if from elsewhere
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        checkpoint.load(path)


def altered(path):
    """One weight is another: the file still loads."""
    weights = torch.load(path)
    weights["model"]["net.fc2.bias"][0] += 1
    checkpoint.save({"model": weights["model"]}, path)


def test_altered_weights_of_a_run_are_refused(trained, tmp_path, launch):
    best = trained / "checkpoints/best.pt"
    assert summary_of(trained)["weights"] == {"file": "checkpoints/best.pt", "sha256": sha256(best)}
    copy = shutil.copytree(trained, tmp_path / "copy")
    altered(copy / "checkpoints/best.pt")
    reason = "best.pt: SHA-256 is"
    for words in (
        ("trainer=none", "checkpoint=copy"),
        ("trainer.epochs=1", "attack=transfer", "attack.transfer.sources=[copy]"),
    ):
        done = launch(*words, *QUIET, "analysis=none")
        assert done.returncode == 1 and reason in done.stderr.splitlines()[-1]
    with pytest.raises(UserError, match=reason):
        export(copy)
    assert not (tmp_path / "runs").exists() and not (copy / "export").exists()
    forge(copy / "summary.json", lambda summary: summary.pop("weights"))
    assert checkpoint.tensors(checkpoint.find(str(copy)))


def test_an_evaluation_does_not_go_on_with_other_weights(trained, tmp_path, launch):
    shutil.copy(trained / "checkpoints/best.pt", tmp_path / "mine.pth")
    words = ("trainer=none", "checkpoint=mine.pth", *EVALUATION, *QUIET, "name=evaluated")
    assert launch(*words).returncode == 0
    folder = tmp_path / "runs/evaluated"
    assert summary_of(folder)["weights"] == {"file": "mine.pth", "sha256": sha256(tmp_path / "mine.pth")}
    forge(folder / "summary.json", lambda summary: summary.update(status="running"))  # as a killed process leaves it
    altered(tmp_path / "mine.pth")
    done = launch(*words)
    assert done.returncode == 1
    assert re.search(r"^error: run folder runs/evaluated: checkpoint=mine.pth has changed", done.stderr, re.MULTILINE)


def test_what_cannot_be_exported(trained, tmp_path, no_token, capsys):
    def line(*words):
        assert main(["export", *map(str, words)]) == 1
        return capsys.readouterr().err

    assert re.fullmatch(r"error: .*nowhere: has no summary.json.*\n", line(tmp_path / "nowhere"))
    assert re.fullmatch(r"error: --push me/model: no token; .*\n",
                        line(trained, "--out", tmp_path / "out", "--push", "me/model"))  # fmt: skip
    assert checkpoint.tensors(tmp_path / "out/model.safetensors")
    copy = shutil.copytree(trained, tmp_path / "copy")
    forge(copy / "summary.json", lambda summary: summary.update(status="running"))
    assert "is running; only a finished run" in line(copy)
    forge(copy / "summary.json", lambda summary: summary.update(status="finished", trainer="none", origin=None))
    forge(copy / "config.yaml", lambda config: config.update(checkpoint="own"))
    assert "checkpoint=own" in line(copy)
    another = {"run_id": "another", "folder": str(trained)}
    forge(copy / "summary.json", lambda summary: summary.update(origin=another))
    forge(copy / "config.yaml", lambda config: config.update(checkpoint=str(trained)))
    assert "evaluated run another, which is not (or no longer) in" in line(copy)
    assert not (copy / "export").exists()


# ------------------------------------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as uploading and downloading one model takes."""

    files: ClassVar[dict] = {}
    created: ClassVar[list] = []

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send(self, value, status=200):
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            if self.files and path.startswith("/api/models/me/model"):
                self.send({"id": "me/model", "sha": COMMIT, "siblings": []})
            else:
                self.answer(404, X_Error_Code="RepoNotFound")
        elif match := re.fullmatch(r"/me/model/resolve/main/(.+)", path):
            content = self.files.get(match[1])
            if content is None:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                tag = hashlib.sha256(content).hexdigest()
                self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.partition("?")[0]
        assert path == "/api/validate-yaml" or self.headers["Authorization"] == "Bearer hf_secret"
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.send({"url": f"http://{self.headers['Host']}/me/model"})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.send({"files": modes})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/me/model/commit/{COMMIT}"
            self.send({"commitUrl": url, "commitOid": COMMIT, "success": True})
        elif path == "/api/validate-yaml":
            self.send({"errors": [], "warnings": []})
        else:
            self.answer(404)


@pytest.fixture
def hub(tmp_path):
    """A hub of this test's own; what a process needs to use it."""
    Hub.files, Hub.created = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()


def fetched(folder, **environment):
    """The folder of `hf://me/model`, or the error; without the seconds that a whole run takes."""
    code = "from aerl.hub import local; print(local('hf://me/model'))"
    env = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_push_fetch_and_evaluate(exported, trained, hub, launch, tmp_path):
    nobody = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "hf://me/model: no such model" in fetched(tmp_path, **hub)
    assert "the hub cannot be reached, and the model is not in its cache" in fetched(tmp_path, **nobody)
    pushed = launch_hub(tmp_path, str(trained), "--out", "up", "--push", "me/model", "--private",
                        HF_TOKEN="hf_secret", **hub)  # fmt: skip
    assert pushed.returncode == 0, pushed.stderr
    assert "checkpoint=hf://me/model" in pushed.stdout
    assert set(Hub.files) == {"model.safetensors", "config.yaml", "summary.json", "README.md"}
    assert Hub.files["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    (created,) = Hub.created
    assert created["name"] == "model" and (created.get("private") or created.get("visibility") == "private")

    done = launch("trainer=none", "checkpoint=hf://me/model", *EVALUATION, *QUIET, "name=far", **hub)
    assert done.returncode == 0, done.stderr
    same_outcomes(trained, tmp_path / "runs/far")
    assert fetched(tmp_path, **nobody) == fetched(tmp_path, **hub)  # from the cache
    del Hub.files["summary.json"]
    assert "it lacks one of model.safetensors" in fetched(tmp_path, **hub, HF_HUB_CACHE=str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"checkpoint=hf://model: must be hf://OWNER/NAME"):
        checkpoint.find("hf://model")
