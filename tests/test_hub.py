"""A model exported from a run folder, pushed to a hub of our own, and evaluated from there."""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import yaml

from aerl.errors import UserError
from aerl.hub import export, main
from aerl.runtime.files import load_arrays, sha256
from aerl.runtime.paths import FILES
from aerl.training import checkpoint
from tests.conftest import ROOT
from tests.runs import forge, summary_of
from tests.test_wandb import environment

EVALUATION = ("attack=fgsm", "norm=Linf", "eps=8/255", "evaluation.samples=40", "analysis=none")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A run folder that was trained, shared: no test writes into it."""
    home = tmp_path_factory.mktemp("hub")
    command = [sys.executable, str(ROOT / "launch.py"), "trainer.epochs=1", "trainer=rl", *EVALUATION, "logger=none"]
    env = environment(AERL_DATA=str(data_dir))
    done = subprocess.run([*command, "name=r"], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "runs/r"


@pytest.fixture
def exported(trained, tmp_path):
    return export(trained, tmp_path / "model", "mit")


def same_outcomes(*folders):
    one, other = (load_arrays(folder / "outcomes.npz") for folder in folders)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_weights_and_outcomes_are_the_same_bits(trained, exported, launch, tmp_path, monkeypatch):
    before = checkpoint.tensors(trained / "checkpoints/best.pt")
    after = checkpoint.tensors(exported / "model.safetensors")
    assert before.keys() == after.keys() and len(before) > 10
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    done = launch("trainer=none", "checkpoint=model", *EVALUATION, "logger=none", "name=again")
    assert done.returncode == 0, done.stderr
    again = tmp_path / "runs/again"
    same_outcomes(trained, again)
    assert summary_of(again)["origin"]["trainer"] == "rl"
    weights = "model/model.safetensors"
    assert summary_of(again)["weights"] == {"file": weights, "sha256": sha256(tmp_path / weights)}

    # The run that evaluated it exports the same model, with its own results.
    assert main(["export", str(again)]) == 1  # from elsewhere its checkpoint=model is unknown
    monkeypatch.chdir(tmp_path)
    copy = export(again)
    assert (copy / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert "trainer=none checkpoint=model" in (copy / "README.md").read_text()


def test_results_are_exported_for_other_tools(trained, exported):
    summary, info = summary_of(trained), json.loads((exported / "model_info.json").read_text())
    assert info["clean_acc"] == f"{100 * summary['clean_accuracy']['value']:.2f}" and info["eps"] == "8/255"
    assert info["reported"] == f"{100 * summary['worst_case_accuracy']['value']:.2f}" and info["autoattack_acc"] is None
    samples, outcomes = json.loads((exported / "samples.json").read_text()), load_arrays(trained / "outcomes.npz")
    assert [sample["index"] for sample in samples] == outcomes["index"].tolist()
    robust = sum(sample["distance"] is None for sample in samples) / len(samples)
    assert robust == pytest.approx(summary["worst_case_accuracy"]["value"])
    evidence = load_arrays(trained / "evidence.npz")
    expected = dict(zip(evidence.get("row", ()), evidence.get("images", ()), strict=True))
    for row, sample in enumerate(samples):
        image = expected.get(row)
        assert sample["sha256"] == (None if image is None else hashlib.sha256(image.tobytes()).hexdigest())


def test_card_is_one_that_the_hub_reads(trained, exported):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    summary = summary_of(trained)
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("mit", "aerl", ["digits"])
    worst = summary["worst_case_accuracy"]
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        "clean accuracy": summary["clean_accuracy"]["value"], "worst-case accuracy, Linf eps 8/255": worst["value"],
    }  # fmt: skip
    assert summary["weights"] == {"file": "checkpoints/best.pt", "sha256": sha256(trained / "checkpoints/best.pt")}
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


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def alter(path):
    """Change one weight: the file still loads."""
    weights = torch.load(path)
    weights["model"]["net.fc2.bias"][0] += 1
    checkpoint.save({"model": weights["model"]}, path)


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n"), alter])
def test_changed_weights_are_refused(trained, exported, tmp_path, damage):
    copy = shutil.copytree(trained, tmp_path / "copy")
    damage(copy / "checkpoints/best.pt")
    with pytest.raises(UserError, match=r"best.pt: .*SHA-256"):
        checkpoint.load(checkpoint.find(str(copy)))
    with pytest.raises(UserError, match=r"best.pt: .*SHA-256"):
        export(copy)
    assert not (copy / "export").exists()
    if damage is not alter:
        damage(exported / "model.safetensors")
        with pytest.raises(UserError, match="SHA-256"):
            checkpoint.load(checkpoint.find(str(exported)))
        (exported / "summary.json").unlink()  # as if from elsewhere
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(exported / "model.safetensors")


def test_what_cannot_be_exported(trained, tmp_path, monkeypatch, capsys):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(tmp_path / "none"))

    def error(*words):
        assert main(["export", *map(str, words)]) == 1
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        return line

    assert "no summary.json" in error(tmp_path / "nowhere")
    assert "--push me/model: no token" in error(trained, "--out", tmp_path / "out", "--push", "me/model")
    assert checkpoint.tensors(tmp_path / "out/model.safetensors")
    copy = shutil.copytree(trained, tmp_path / "copy")
    forge(copy / "summary.json", lambda summary: summary.update(status="running"))
    assert "status: running" in error(copy)
    forge(copy / "summary.json", lambda summary: summary.update(status="finished", trainer="none", origin=None))
    forge(copy / "config.yaml", lambda config: config.update(checkpoint="own"))
    assert "checkpoint=own" in error(copy)
    forge(copy / "config.yaml", lambda config: config.update(checkpoint=str(trained)))
    forge(copy / "summary.json", lambda summary: summary.update(weights={"file": "best.pt", "sha256": "another"}))
    assert "SHA-256" in error(copy)
    assert not (copy / "export").exists()


# ------------------------------------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as uploading and downloading one model takes."""

    def log_message(self, *arguments):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, files = self.path.partition("?")[0], self.server.files
        name = path.removeprefix("/me/model/resolve/main/")
        if path.startswith("/api/models/me/model") and files:
            self.answer({"id": "me/model", "sha": COMMIT, "siblings": []})
        elif name in files:
            self.answer(files[name], ETag=f'"{hashlib.sha256(files[name]).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif path.startswith("/api"):
            self.answer(status=404, X_Error_Code="RepoNotFound")
        else:
            self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path, here = self.path.partition("?")[0], f"http://{self.headers['Host']}/me/model"
        assert path == "/api/validate-yaml" or self.headers["Authorization"] == "Bearer hf_secret"
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": here})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{here}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(tmp_path):
    """A hub of this test's own, and the environment that a process needs to use it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf")}
    yield server, environment | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()
    server.server_close()


def python(code, folder, **variables):
    env = environment(HOME=str(folder / "home"), PYTHONPATH=str(ROOT), **variables)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


def fetched(folder, **variables):
    """The folder of `hf://me/model`, or the error."""
    done = python("from aerl.runtime.paths import local; print(local('hf://me/model'))", folder, **variables)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_push_fetch_and_evaluate(exported, trained, hub, launch, tmp_path):
    server, online = hub
    offline = {**online, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "hf://me/model: not on the hub" in fetched(tmp_path, **online)
    assert "the hub cannot be reached, and the model is not in its cache" in fetched(tmp_path, **offline)
    words = ["export", str(trained), "--out", "up", "--push", "me/model", "--private"]
    pushed = python(
        f"from aerl.hub import main; raise SystemExit(main({words}))", tmp_path, HF_TOKEN="hf_secret", **online
    )
    assert pushed.returncode == 0, pushed.stderr
    assert "checkpoint=hf://me/model" in pushed.stdout
    assert set(server.files) == {*FILES, "README.md", "outcomes.npz", "model_info.json", "samples.json"}
    assert server.files["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    (created,) = server.created
    assert created["name"] == "model" and (created.get("private") or created.get("visibility") == "private")

    done = launch("trainer=none", "checkpoint=hf://me/model", *EVALUATION, "logger=none", "name=far", **online)
    assert done.returncode == 0, done.stderr
    same_outcomes(trained, tmp_path / "runs/far")
    assert fetched(tmp_path, **offline) == fetched(tmp_path, **online)  # from the cache
    del server.files["summary.json"]
    assert "or without model.safetensors" in fetched(tmp_path, **online, HF_HUB_CACHE=str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"checkpoint=hf://model: must be hf://OWNER/NAME"):
        checkpoint.find("hf://model")
