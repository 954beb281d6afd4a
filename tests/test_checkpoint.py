"""Checkpoints: complete or absent, and never code."""

import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch

from aerl.errors import UserError
from aerl.models import AliCNN, Classifier
from aerl.tracking.results import write_summary
from aerl.training import checkpoint


def classifier(classes: int = 10, mean: float = 0.5) -> Classifier:
    return Classifier(AliCNN(num_classes=classes, channels=1, size=(8, 8), hidden=16), (mean,), (0.5,))


def refused(match: str, call, *args) -> None:
    with pytest.raises(UserError, match=match) as error:
        call(*args)
    assert "\n" not in str(error.value)


def test_weights_come_back_with_their_normalisation(tmp_path):
    saved, model = classifier(mean=0.1), classifier()
    checkpoint.save({"model": saved.state_dict(), "epoch": 3}, tmp_path / "best.pt")
    assert checkpoint.load_weights(model, tmp_path / "best.pt")
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model.eval()(x), saved.eval()(x))
    assert model.normalize.mean.item() == pytest.approx(0.1)


def test_a_bare_state_dict_lacks_normalisation(tmp_path):
    net, model = classifier().net, classifier()
    torch.save(net.state_dict(), tmp_path / "paper.pth")
    assert not checkpoint.load_weights(model, tmp_path / "paper.pth")
    torch.testing.assert_close(model.net.fc1.weight, net.fc1.weight)


def usual_layouts(net):
    """As training scripts keep the weights of `net`."""
    state = net.state_dict()
    return {
        "beside other tensors": {"state_dict": {"criterion.weight": torch.ones(2)}
                                 | {f"model.{name}": tensor for name, tensor in state.items()}},
        "in a Sequential": {f"1.{name}": tensor for name, tensor in state.items()},
        "averaged": torch.optim.swa_utils.AveragedModel(net).state_dict(),
        "under another key": {"ema_state_dict": state},
        "with its average": {"state_dict": state, "ema_state_dict": {name: 2 * t for name, t in state.items()}},
        "without counters": {name: tensor for name, tensor in state.items() if "num_batches" not in name},
    }  # fmt: skip


@pytest.mark.parametrize("layout", usual_layouts(classifier().net))
def test_weights_in_the_usual_layouts(tmp_path, layout):
    net, model = classifier().net, classifier()
    torch.save(usual_layouts(net)[layout], tmp_path / "w.pt")
    assert not checkpoint.load_weights(model, tmp_path / "w.pt")
    torch.testing.assert_close(model.net.fc1.weight, net.fc1.weight)


def test_weights_that_do_not_fit(tmp_path):
    path, load = tmp_path / "best.pt", lambda: checkpoint.load_weights(classifier(), tmp_path / "best.pt")
    state, other = classifier().state_dict(), classifier().state_dict()
    for content, match in (
        (classifier(classes=100).state_dict(), r"net\.fc2\.weight is \(100, 16\), in the model \(10, 16\).*dataset="),
        ({"net.other": torch.zeros(1), "normalize.mean": torch.zeros(1)}, "another architecture"),
        (state | {"net.more": torch.zeros(1)}, "another architecture .*more is unknown"),
        ({"a": state, "b": other}, "several sets of weights"),
        (state | {"net.fc2.bias": torch.full((10,), torch.nan)}, r"net\.fc2\.bias has 10 values that are not finite"),
        (
            state | {"net.fc2.bias": torch.ones(10, dtype=torch.int64)},
            r"bias is torch\.int64, in the model torch\.float32",
        ),
        (state | {"normalize.std": torch.zeros(1, 1, 1, 1)}, r"normalize\.std must be greater than 0"),
        (state | {"net.fc2.bias": torch.ones(1).expand(1 << 28, 10)}, "another architecture .*bias is missing"),
        ({}, "neither one of aerl's checkpoints nor a state_dict"),
    ):
        checkpoint.save({"model": content}, path)
        refused(match, load)


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    state = {"epoch": 1}
    state |= {f"again{i}": state for i in range(100)}
    checkpoint.save(state, tmp_path / "w.pt")
    refused("neither one of aerl's", lambda: checkpoint.load_weights(classifier(), tmp_path / "w.pt"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x80\x02.", None])
def test_damaged(tmp_path, content):
    path = tmp_path / "last.pt"
    checkpoint.save({"model": classifier().state_dict()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    refused(r"last\.pt: ", checkpoint.load, path)


def test_a_pickle_that_would_run_code_is_refused_unexecuted(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"model": Malicious()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Malicious()))
    for name in ("evil.pt", "evil.pkl"):
        refused(name, checkpoint.load, tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_find_prefers_best_and_names_what_is_missing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    best = {"status": "finished", "weights": {"file": "checkpoints/best.pt"}}
    evaluated = {"status": "finished", "trainer": "none", "checkpoint": "OTHER"}
    refused("no such file or folder", checkpoint.find, str(tmp_path / "nowhere"))
    refused("not a run folder", checkpoint.find, str(tmp_path))
    (tmp_path / "config.yaml").touch()
    for summary, match in (
        ({"status": "running"}, "training is not finished"), (evaluated, "use checkpoint=OTHER"),
        (best, r"best\.pt is missing"),
    ):  # fmt: skip
        write_summary(tmp_path, summary)
        refused(match, checkpoint.find, str(tmp_path))
    (tmp_path / "checkpoints/best.pt").touch()
    assert checkpoint.find(str(tmp_path)).name == "best.pt"


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from aerl.training import checkpoint
from aerl.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
checkpoint.save({"model": {"w": torch.zeros(10)}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    checkpoint.save({"model": {"w": torch.zeros(1_000_000)}}, path)
except UserError as error:
    print(error)
"""


def test_a_disk_that_refuses_leaves_the_old_checkpoint(tmp_path):
    """A real process whose files may not grow beyond 200 kB."""
    assert resource.RLIMIT_FSIZE is not None
    path = tmp_path / "last.pt"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and f"cannot write {path}: File too large" in done.stdout
    assert checkpoint.load(path)["model"]["w"].shape == (10,)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
