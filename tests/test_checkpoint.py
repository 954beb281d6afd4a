"""Checkpoints: whole or absent, and never code."""

import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch

from aerl.models import AliCNN, Classifier
from aerl.tracking.results import write_summary
from aerl.training import checkpoint
from aerl.types import UserError


def classifier(classes: int = 10, hidden: int = 16) -> Classifier:
    return Classifier(AliCNN(num_classes=classes, channels=1, size=(8, 8), hidden=hidden), (0.5,), (0.5,))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_weights_come_back_with_their_normalisation(tmp_path):
    saved, model = Classifier(classifier().net, (0.1,), (0.2,)), classifier()
    checkpoint.save({"model": saved.state_dict(), "epoch": 3}, tmp_path / "best.pt")
    assert checkpoint.load_weights(model, tmp_path / "best.pt")
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), saved.eval()(x))
    assert model.normalize.mean.item() == pytest.approx(0.1)


def test_a_bare_state_dict_loads_and_is_said_to_lack_normalisation(tmp_path):
    net, model = classifier().net, classifier()
    torch.save(net.state_dict(), tmp_path / "paper.pth")
    assert not checkpoint.load_weights(model, tmp_path / "paper.pth")
    torch.testing.assert_close(model.net.fc1.weight, net.fc1.weight)


def test_truncated(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save({"model": classifier().state_dict()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"last\.pt: damaged") as error:
        checkpoint.load(path)
    one_line(error)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x80\x02."])
def test_garbage(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path / "x.pt")
    one_line(error)


def test_a_pickle_that_would_run_code_is_refused_unexecuted(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"model": Malicious()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Malicious()))
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(UserError) as error:
            checkpoint.load(tmp_path / name)
        one_line(error)
    assert not (tmp_path / "pwned").exists()


def test_another_number_of_classes_and_another_architecture(tmp_path):
    checkpoint.save({"model": classifier(classes=100).state_dict()}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"net\.fc2\.weight is \(100, 16\), in the model \(10, 16\)") as error:
        checkpoint.load_weights(classifier(), tmp_path / "best.pt")
    assert "dataset=" in one_line(error)
    checkpoint.save({"model": {"net.other": torch.zeros(1), "normalize.mean": torch.zeros(1)}}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="is of another architecture") as error:
        checkpoint.load_weights(classifier(), tmp_path / "best.pt")
    one_line(error)


def test_find_prefers_best_and_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        checkpoint.find(str(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        checkpoint.find(str(tmp_path / "nowhere"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.pt").touch()
    (tmp_path / "config.yaml").touch()
    write_summary(tmp_path, {"status": "running"})
    with pytest.raises(UserError, match="its training is not finished"):
        checkpoint.find(str(tmp_path))
    write_summary(tmp_path, {"status": "finished", "weights": {"file": "checkpoints/best.pt"}})
    with pytest.raises(UserError, match=r"best\.pt is missing"):
        checkpoint.find(str(tmp_path))
    (tmp_path / "checkpoints/best.pt").touch()
    assert checkpoint.find(str(tmp_path)).name == "best.pt"


def test_a_disk_that_refuses_leaves_the_old_checkpoint_whole(tmp_path):
    """A real process whose files may not grow beyond 200 kB: the second, larger checkpoint does not fit."""
    script = """
import resource, signal, sys, torch
from pathlib import Path
from aerl.training import checkpoint
from aerl.types import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
checkpoint.save({"model": {"w": torch.zeros(10)}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    checkpoint.save({"model": {"w": torch.zeros(1_000_000)}}, path)
except UserError as error:
    print(error)
"""
    assert resource.RLIMIT_FSIZE is not None
    path = tmp_path / "last.pt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert f"cannot write {path}: File too large" in done.stdout
    assert checkpoint.load(path)["model"]["w"].shape == (10,)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
