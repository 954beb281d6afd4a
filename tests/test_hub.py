"""A model handed on: out of a run folder, over a hub of our own making, and judged again from there."""

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
from aerl.training import checkpoint
from aerl.types import UserError
from tests.conftest import ROOT
from tests.runs import forge
from tests.test_wandb import environment

JUDGING = ("attack=fgsm", "norm=Linf", "eps=8/255", "evaluation.samples=40", "analysis=none")
QUIET = ("logger=none",)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A run folder that was trained, shared: no test writes into it."""
    home = tmp_path_factory.mktemp("hub")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    words = ("trainer.epochs=1", "trainer=rl", *JUDGING, *QUIET, "name=r")
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


def outcomes(folder):
    with np.load(folder / "outcomes.npz") as file:
        return dict(file)


def test_the_weights_are_the_same_bits_and_so_are_the_outcomes(trained, exported, launch, tmp_path):
    kept = checkpoint.tensors(trained / "checkpoints/best.pt")
    handed = checkpoint.tensors(exported / "model.safetensors")
    assert kept.keys() == handed.keys() and len(kept) > 10
    assert all(torch.equal(kept[name], handed[name]) and kept[name].dtype == handed[name].dtype for name in kept)
    done = launch("trainer=none", "checkpoint=model", *JUDGING, *QUIET, "name=again")
    assert done.returncode == 0, done.stderr
    there, here = outcomes(trained), outcomes(tmp_path / "runs/again")
    assert there.keys() == here.keys()
    assert all(np.array_equal(there[key], here[key]) for key in there)
    told = json.loads((tmp_path / "runs/again/summary.json").read_text())
    assert told["origin"]["trainer"] == "rl"

    # The judged run hands on the same model, with its own verdict.
    assert main(["export", str(tmp_path / "runs/again")]) == 1  # from elsewhere its checkpoint=model is unknown
    again = launch_hub(tmp_path, "export", "runs/again")
    assert again.returncode == 0, again.stderr
    copy = tmp_path / "runs/again/export"
    assert (copy / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert "trainer=none checkpoint=model" in (copy / "README.md").read_text()


def launch_hub(folder, *words):
    env = environment(HOME=str(folder / "home"), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "aerl.hub", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_card_is_one_that_the_hub_reads(trained, exported):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    told = json.loads((trained / "summary.json").read_text())
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("mit", "aerl", ["digits"])
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {
        "clean accuracy": told["clean_accuracy"]["value"],
        "worst-case accuracy, Linf eps 8/255": told["worst_case_accuracy"]["value"],
    }
    text = card.text
    digest = hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    assert digest in text and json.loads((exported / "summary.json").read_text())["weights"]["sha256"] == digest
    assert "python launch.py trainer.epochs=1 trainer=rl attack=fgsm norm=Linf eps=8/255" in text
    assert "python launch.py trainer=none checkpoint=FOLDER attack=fgsm norm=Linf eps=8/255" in text
    accuracy = told["worst_case_accuracy"]
    assert f"{100 * accuracy['value']:.1f} % ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f} %)" in text
    for path in exported.iterdir():  # nothing of this machine is handed on
        assert str(trained.parents[1]).encode() not in path.read_bytes()
    assert not {"runs_dir", "data_dir", "logger"} & set(yaml.safe_load((exported / "config.yaml").read_text()))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not one", "other architecture"])
def test_damaged_weights_are_told_in_one_line(exported, launch, tmp_path, damage):
    path = exported / "model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1000])
    elif damage == "flipped":
        content[-7] ^= 1
        path.write_bytes(content)
    elif damage == "not one":
        path.write_bytes(b"\x80\x04cos\nsystem\n")
    else:
        summary = json.loads((exported / "summary.json").read_text())
        summary["choices"]["model"] = "cnn"
        (exported / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError) as error:
        if damage == "other architecture":
            done = launch("trainer=none", "checkpoint=model", "attack=none", *QUIET, "analysis=none")
            assert done.returncode == 1
            raise UserError(done.stderr.strip().splitlines()[-1])
        checkpoint.load(checkpoint.find(str(exported)))
    assert "\n" not in str(error.value)
    told = "is not the file whose SHA-256 was recorded"
    assert {"other architecture": "checkpoint=model"}.get(damage, told) in str(error.value)
    if damage in ("truncated", "not one"):
        (exported / "summary.json").unlink()  # as if from elsewhere: the reader has to tell
        with pytest.raises(UserError, match="damaged or not a safetensors file"):
            checkpoint.load(path)


def altered(path):
    """One weight is another: the file still loads."""
    weights = torch.load(path)
    weights["model"]["net.fc2.bias"][0] += 1
    checkpoint.save({"model": weights["model"]}, path)


def test_altered_weights_of_a_run_are_refused_wherever_they_are_taken(trained, tmp_path, launch):
    recorded = json.loads((trained / "summary.json").read_text())["weights"]
    digest = hashlib.sha256((trained / "checkpoints/best.pt").read_bytes()).hexdigest()
    assert recorded == {"file": "checkpoints/best.pt", "sha256": digest}
    copy = shutil.copytree(trained, tmp_path / "copy")
    path = copy / "checkpoints/best.pt"
    altered(path)
    now = hashlib.sha256(path.read_bytes()).hexdigest()
    reason = (
        f"is not the file whose SHA-256 was recorded: that began with {digest[:12]}, this with {now[:12]}; "
        "restore it, or repeat with overwrite=true the command that recorded it"
    )
    for words in (
        ("trainer=none", "checkpoint=copy"),
        ("trainer.epochs=1", "attack=transfer", "attack.transfer.sources=[copy]"),
    ):
        done = launch(*words, *QUIET, "analysis=none")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(f"=copy/checkpoints/best.pt: {reason}")
    with pytest.raises(UserError, match=re.escape(reason)):
        export(copy)
    assert not (tmp_path / "runs").exists() and not (copy / "export").exists()
    forge(copy / "summary.json", lambda summary: summary.pop("weights"))
    assert checkpoint.tensors(checkpoint.find(str(copy)))


def test_a_judgement_does_not_go_on_with_other_weights(trained, tmp_path, launch):
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy/checkpoints/best.pt").rename(tmp_path / "mine.pth")
    judging = ("trainer=none", "checkpoint=mine.pth", *JUDGING, *QUIET, "name=judged")
    assert launch(*judging).returncode == 0
    path = tmp_path / "runs/judged/summary.json"
    summary = json.loads(path.read_text())
    assert summary["weights"] == {
        "file": "mine.pth",
        "sha256": hashlib.sha256((tmp_path / "mine.pth").read_bytes()).hexdigest(),
    }
    forge(path, lambda summary: summary.update(status="running"))  # as a killed process leaves it
    altered(tmp_path / "mine.pth")
    done = launch(*judging)
    assert done.returncode == 1
    assert re.search(r"^error: run folder runs/judged: checkpoint=mine.pth has changed", done.stderr, re.MULTILINE)


def test_what_cannot_be_exported_is_told(trained, tmp_path, capsys):
    def line(*words):
        assert main(["export", *map(str, words)]) == 1
        return capsys.readouterr().err

    assert re.fullmatch(r"error: .*nowhere: is no run folder.*\n", line(tmp_path / "nowhere"))
    copy = shutil.copytree(trained, tmp_path / "copy")
    forge(copy / "summary.json", lambda summary: summary.update(status="running"))
    assert "is running; only a finished run" in line(copy)
    forge(copy / "summary.json", lambda summary: summary.update(status="finished", trainer="none", origin=None))
    forge(copy / "config.yaml", lambda config: config.update(checkpoint="own"))
    assert "checkpoint=own" in line(copy)
    another = {"run_id": "another", "folder": str(trained)}
    forge(copy / "summary.json", lambda summary: summary.update(origin=another))
    forge(copy / "config.yaml", lambda config: config.update(checkpoint=str(trained)))
    assert "judged run another, which is not (or no longer) in" in line(copy)
    assert not (copy / "export").exists()


def test_without_a_token_the_export_is_kept(trained, tmp_path, no_token, capsys):
    assert main(["export", str(trained), "--out", str(tmp_path / "out"), "--push", "me/model"]) == 1
    told = capsys.readouterr()
    assert re.fullmatch(r"error: --push me/model: there is no token; .* The export is in .*out\n", told.err)
    assert checkpoint.tensors(tmp_path / "out/model.safetensors")


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

    def tell(self, value, status=200):
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            known = self.files and path.startswith("/api/models/me/model")
            if known:
                self.tell({"id": "me/model", "sha": COMMIT, "siblings": []})
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
            self.tell({"url": f"http://{self.headers['Host']}/me/model"})
        elif path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            kept = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            self.tell({"files": kept})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.tell(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/model/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            )
        elif path == "/api/validate-yaml":
            self.tell({"errors": [], "warnings": []})
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
    """Where `hf://me/model` came to lie, or the error; without the seconds that a whole run takes."""
    code = "from aerl.hub import local; print(local('hf://me/model'))"
    env = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_up_to_a_hub_and_judged_from_there_and_then_without_it(exported, trained, hub, launch, tmp_path):
    nobody = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "hf://me/model: no such model on the hub; a private one needs HF_TOKEN" in fetched(tmp_path, **hub)
    assert "the hub cannot be reached, and the model is not in its cache" in fetched(tmp_path, **nobody)
    command = [sys.executable, "-m", "aerl.hub", "export", str(trained), "--out", "up", "--push", "me/model"]
    env = {**os.environ, **hub, "HF_TOKEN": "hf_secret", "PYTHONPATH": str(ROOT)}
    pushed = subprocess.run([*command, "--private"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert pushed.returncode == 0, pushed.stderr
    assert "checkpoint=hf://me/model" in pushed.stdout
    assert set(Hub.files) == {"model.safetensors", "config.yaml", "summary.json", "README.md"}
    assert Hub.files["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert [made["name"] for made in Hub.created] == ["model"]
    assert Hub.created[0].get("private") is True or Hub.created[0].get("visibility") == "private"

    done = launch("trainer=none", "checkpoint=hf://me/model", *JUDGING, *QUIET, "name=far", **hub)
    assert done.returncode == 0, done.stderr
    there, here = outcomes(trained), outcomes(tmp_path / "runs/far")
    assert all(np.array_equal(there[key], here[key]) for key in there)
    assert fetched(tmp_path, **nobody) == fetched(tmp_path, **hub)  # from the cache
    del Hub.files["summary.json"]
    assert "is no model that aerl exported" in fetched(tmp_path, **hub, HF_HUB_CACHE=str(tmp_path / "empty"))


def test_a_name_that_is_none_is_refused_without_asking_anybody():
    with pytest.raises(UserError, match=r"checkpoint=hf://model: must be hf://OWNER/NAME or hf://OWNER/NAME@R"):
        checkpoint.find("hf://model")
