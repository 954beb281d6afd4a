"""Files that would run code, where aerl reads files of others: nothing is executed, and one line tells."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from aerl.errors import UserError
from aerl.runtime.files import inside, read_json, read_yaml
from tests.conftest import ROOT
from tests.runs import forge

WORDS = ("trainer.epochs=1", "attack=fgsm", "evaluation.samples=20", "analysis=none", "logger=none", "name=r")
JUDGE = ("trainer=none", "checkpoint=runs/r", "attack=fgsm", "analysis=none", "logger=none", "name=j")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A run folder, shared: no test writes into it."""
    home = tmp_path_factory.mktemp("trained")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    command = [sys.executable, str(ROOT / "launch.py"), *WORDS]
    done = subprocess.run(command, cwd=home, env=env | {"AERL_DATA": str(data_dir)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "runs/r"


class Malicious:
    """Unpickled, it makes a folder, the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def half_done(run, seconds):
    """The run as a killed process leaves it: the same command goes on from its files."""
    forge(run / "summary.json", lambda told: told.update(status="running", seconds=seconds))


def best(run, bait, canary):
    torch.save({"model": bait}, run / "checkpoints/best.pt")
    forge(run / "summary.json", lambda told: told.pop("weights"))  # else its hash would tell


def last(run, bait, canary):
    half_done(run, {})
    torch.save({"model": bait}, run / "checkpoints/last.pt")


def outcomes(run, bait, canary):
    half_done(run, {"train": 1.0})
    np.savez(run / "outcomes.npz", clean_pred=np.array([bait], dtype=object))


def progress(run, bait, canary):
    half_done(run, {"train": 1.0})
    forge(run / "summary.json", lambda told: told.update(attacks={}))
    (run / "outcomes.npz").unlink()
    np.savez(run / "progress.npz", attack=np.array([bait], dtype=object))


def dataset(run, bait, canary):
    images = np.zeros((20, 8, 8), np.uint8)
    labels = np.array([bait] * 20, dtype=object)
    np.savez("mine.npz", X_train=images, X_test=images, y_train=labels, y_test=labels)


def target(run, bait, canary):
    net = {"_target_": "os.system", "command": f"mkdir {canary}"}
    forge(run / "config.yaml", lambda config: config["model"].update(net=net))


def interpolation(run, bait, canary):
    forge(run / "config.yaml", lambda config: config["model"]["net"].update(hidden="${oc.env:HOME}"))


def tag(run, bait, canary):
    text = (run / "config.yaml").read_text()
    path = run / "config.yaml"
    path.write_text(text + f'more: !!python/object/apply:os.mkdir ["{canary}"]\n')


@pytest.mark.parametrize(
    ("make", "words", "line"),
    [
        (best, JUDGE, "checkpoint=runs/r/checkpoints/best.pt: holds something other than tensors"),
        (last, WORDS, "checkpoint=runs/r/checkpoints/last.pt: holds something other than tensors"),
        (outcomes, WORDS, "runs/r/outcomes.npz: cannot be read (Object arrays cannot be loaded"),
        (progress, WORDS, "runs/r/progress.npz: cannot be read (Object arrays cannot be loaded"),
        (dataset, ("dataset=npz", "dataset.path=mine.npz"), "dataset.path=mine.npz: "),
        (target, JUDGE, "runs/r: config.yaml has model.net._target_=os.system"),
        (interpolation, JUDGE, "runs/r: config.yaml has model.net.hidden=${oc.env:HOME}"),
        (tag, JUDGE, "cannot read runs/r/config.yaml: could not determine a constructor"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_malicious_file_is_refused_and_not_executed(trained, launch, tmp_path, monkeypatch, make, words, line):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    shutil.copytree(trained, tmp_path / "runs/r")
    make(tmp_path / "runs/r", Malicious(canary), canary)
    assert not canary.exists()
    done = launch(*words)
    if make in (outcomes, progress):  # these are measured again
        assert done.returncode == 0 and line in done.stderr
    else:
        assert done.returncode == 1
        (error,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
        assert error.removeprefix("error: ").startswith(line)
    assert "Traceback" not in done.stderr and "No such file" not in done.stderr
    assert not canary.exists()
    assert not (tmp_path / "runs/j").exists()


def test_the_bait_is_real(tmp_path):
    """With the readers that aerl does not use, each kind of file makes the canary."""
    torch.save(Malicious(tmp_path / "torch"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    np.savez(tmp_path / "x.npz", x=np.array([Malicious(tmp_path / "numpy")], dtype=object))
    np.load(tmp_path / "x.npz", allow_pickle=True)["x"]
    yaml.unsafe_load(f'!!python/object/apply:os.mkdir ["{tmp_path / "yaml"}"]')
    assert {"torch", "numpy", "yaml"} <= {path.name for path in tmp_path.iterdir()}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize(
    "content",
    ["", BOMB, "a: &a [*a]", "[" * 100_000, "[" * 300 + "]" * 300, "[1, ", "\xff", "9" * 5000, "1" * 8_000_001,
     "a: 2020-99-99"],
    ids=["empty", "bomb", "in itself", "deep", "closed", "cut", "latin-1", "number", "large", "date"],
)  # fmt: skip
def test_text_that_cannot_be_read_is_one_line_at_once(tmp_path, read, content):
    path = tmp_path / "file"
    path.write_text(content, encoding="latin-1")
    if (read, content) in ((read_yaml, ""), (read_json, "[" * 300 + "]" * 300)):
        read(path)
        return
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"cannot read {path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_file_is_one_line(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe"):
        with pytest.raises(UserError, match=f"cannot read {path}: "):
            read(path)


def test_a_link_reaches_nothing_outside_its_folder(tmp_path):
    folder, snapshot = tmp_path / "run", tmp_path / "hub/snapshots/0123"
    for place in (folder / "figures", snapshot, tmp_path / "hub/blobs"):
        place.mkdir(parents=True)
    for path in (tmp_path / "secret", folder / "best.pt", tmp_path / "hub/blobs/abc"):
        path.touch()
    links = {
        folder / "linked.pt": "best.pt", tmp_path / "shortcut": folder, snapshot / "model": "../../blobs/abc",
        folder / "out": "../secret", folder / "etc": "/etc", folder / "nowhere": "none", folder / "circle": "circle",
        snapshot / "out": "../../../secret",
    }  # fmt: skip
    for link, target in links.items():
        link.symlink_to(target)
    for home, path in (
        (folder, folder / "best.pt"), (folder, folder / "linked.pt"), (folder, folder / "missing.pt"),
        (tmp_path / "shortcut", tmp_path / "shortcut/linked.pt"), (snapshot, snapshot / "model"),
    ):  # fmt: skip
        assert inside(home, path) == path
    for home, path in (
        (folder, folder / "out"), (folder, folder / "etc/passwd"), (folder, folder / "nowhere"),
        (folder, folder / "circle"), (folder, folder / "../secret"), (snapshot, snapshot / "out"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{path}: is a link"):
            inside(home, path)
