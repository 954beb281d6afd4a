"""One run on two processes of a real torchrun (gloo), against the same run on one process."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.runs import begin, ended, results_of, same_end, summary_of, wait_for

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# Without dropout, which each process draws for itself.
NET = ("model=foreign", "model.net._target_=tests.test_distributed.net", "model.mean=[0.3]", "model.std=[0.3]")
QUICK = (*NET, "evaluation.samples=40", "evaluation.batch_size=2", "logger=none", "analysis=none", "eps=0.3")


def net(num_classes: int, channels: int, size: tuple[int, int]) -> torch.nn.Module:
    """The second process's own first weights are useless; the first one's must be used."""
    nn = torch.nn
    features = 8 * (size[0] // 2) * (size[1] // 2)
    convolution = nn.Conv2d(channels, 8, 3, padding=1)
    if os.environ.get("RANK") == "1":
        nn.init.zeros_(convolution.weight)
    return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(features, num_classes))


class OnlyTheSecondFails(torch.nn.Linear):
    """A network that only the process of rank 1 cannot train."""

    def __init__(self, num_classes: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__(channels * size[0] * size[1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x) > 2 and os.environ.get("RANK") == "1":  # not in the probe at the start
            raise ValueError("a fault of this process alone")
        return super().forward(x.flatten(1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def start(place: Path, data_dir: Path):  # type: ignore[no-untyped-def]
    """`start(TORCHRUN, "trainer=rl", ...)`: the command line in `place`, on two processes or, with (), on one."""

    def start(torchrun: tuple[str, ...], *words: str) -> "subprocess.Popen[str]":
        ddp = ("hardware=ddp", "hardware.device=cpu") if torchrun and "hardware=cpu" not in words else ()
        return begin(place, data_dir, *words, *ddp, launcher=torchrun)

    return start


def values(folder: Path) -> list[float]:
    return [value for *_, value in results_of(folder)]


@pytest.fixture(scope="module")
def trained(place, start):
    """With an adversary, but nothing drawn at random: on one process, and on two."""
    words = ("trainer=sl_adv", "trainer.adversary.start_epoch=1", "trainer.epochs=3", "attack=fgsm", *QUICK,
             "dataset.augmentation={hflip: 0, vflip: 0, translate: 0}", "analysis=[curve]", "analysis.curve.samples=8",
             )  # fmt: skip
    for name, torchrun in (("one", ()), ("two", TORCHRUN)):
        done = ended(start(torchrun, *words, f"name={name}"))
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("worst case") == 1  # one process prints
    return place / "runs/one", place / "runs/two"


def test_without_random_draws_training_equals_that_of_one_process(trained):
    one, two = trained
    assert [line[:-1] for line in results_of(one)] == [line[:-1] for line in results_of(two)]
    np.testing.assert_allclose(values(one), values(two), rtol=1e-5)
    weights = [torch.load(folder / "checkpoints/last.pt")["model"] for folder in trained]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-4, atol=1e-6)
    # The first process alone writes.
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert (two / "figures/curve.png").exists()
    assert summary_of(two)["status"] == "finished" and summary_of(two)["environment"]["processes"] == "2"


def test_the_outcomes_are_those_of_one_process(trained, start, place):
    """Bit for bit, with attacks in stages."""
    words = ("trainer=none", f"checkpoint={trained[0]}", *QUICK, "evaluation.samples=6",
             "attack=[noise,pgd,autoattack]", "attack.pgd.restarts=2", "attack.pgd.steps=20",
             "attack.autoattack.batch_size=2", "attack.autoattack.queries=30", "evaluation.survivors_only=true",
             )  # fmt: skip
    for name, torchrun in (("evaluated-one", ()), ("evaluated-two", TORCHRUN)):
        done = ended(start(torchrun, *words, f"name={name}"))
        assert done.returncode == 0, done.stderr
    for name in ("outcomes.npz", "examples.npz"):
        one, two = (dict(np.load(place / f"runs/evaluated-{n}" / name)) for n in ("one", "two"))
        assert one.keys() == two.keys() and len(one) >= 3
        assert all(np.array_equal(one[key], two[key]) for key in one)
    assert values(place / "runs/evaluated-one")[:2] == values(place / "runs/evaluated-two")[:2]


def test_a_multirun_continues_after_a_job_that_fails_in_all_processes(start, place):
    words = ("-m", "trainer.batch_size=32,33,64", "trainer.epochs=1", "attack=fgsm", *QUICK, "runs_dir=swept")
    done = ended(start(TORCHRUN, *words))
    assert done.returncode == 1
    assert done.stderr.count("error: trainer.batch_size=33: ") == 1
    finished = [summary_of(path.parent)["status"] for path in place.glob("swept/digits/**/summary.json")]
    assert sorted(finished) == ["failed", "finished", "finished"]
    assert "failed: job 1 (trainer.batch_size=33)" in done.stdout
    assert (place / "swept/multirun").is_dir()


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_others(start, place):
    words = ("trainer.epochs=1", *QUICK, "model.net._target_=tests.test_distributed.OnlyTheSecondFails", "name=alone")
    done = ended(start(TORCHRUN, *words))
    assert done.returncode == 1
    assert "error: process 1 of 2: " in done.stderr and "ValueError: a fault of this process alone" in done.stderr


@pytest.mark.slow
def test_at_a_signal_all_stop_at_the_same_step_and_resume(start, place):
    """Twice in training, and in an attack; then it ends as an undisturbed run, bit for bit.

    The network has dropout, and BatchNorm, which on the CPU sees only the share of its process.
    """
    words = ("trainer=rl", "trainer.epochs=4", "trainer.batch_size=16", "model=cnn", "model.net.width=0.05",
             "attack=[pgd]", "attack.pgd.steps=300", "attack.pgd.drop_fooled=false", *QUICK[len(NET):])  # fmt: skip
    folder, within = place / "runs/stopped", 0
    for sign in ("results.jsonl", "results.jsonl", "progress.npz"):
        process = start(TORCHRUN, *words, "name=stopped")
        known = (folder / sign).stat().st_size if (folder / sign).is_file() else 0
        wait_for(lambda: (path := folder / sign).is_file() and path.stat().st_size > known, process)  # noqa: B023
        time.sleep(0.3 if sign == "results.jsonl" else 0)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)  # which torchrun forwards
        assert ended(process).returncode != 0
        assert time.monotonic() - began < 20
        assert summary_of(folder)["status"] == "stopped"
        within += "step" in torch.load(folder / "checkpoints/last.pt")
    assert within == 2
    for name in ("stopped", "straight"):
        done = ended(start(TORCHRUN, *words, f"name={name}"))
        assert done.returncode == 0, done.stderr
    same_end(folder, place / "runs/straight")


def alive(folder: Path) -> list[int]:
    """The processes with this run folder's name in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"name={folder.name}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_killing_torchrun_ends_its_processes_at_once(start, place):
    folder = place / "runs/orphans"
    process = start(TORCHRUN, "trainer=rl", "trainer.epochs=200", *QUICK, "name=orphans")
    wait_for((folder / "results.jsonl").is_file, process)
    assert len(alive(folder)) == 3
    process.kill()
    process.communicate()
    time.sleep(0.5)
    assert alive(folder) == []


def script(tmp_path: Path, text: str, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    (tmp_path / "script.py").write_text(text)
    command = [sys.executable, *TORCHRUN[:-1], f"--nproc-per-node={processes}", str(tmp_path / "script.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


BATCHNORM = """
import torch
from torch import nn
from aerl.runtime import ddp
ddp.init_process_group("cpu")
rank = ddp.rank()
torch.manual_seed(rank)
# The last layer is unused, as in networks with auxiliary outputs.
model = nn.ModuleList([nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)])
model.forward = lambda x: model[1](model[0](x)).pow(3).mean()
first = model[0].weight.clone()
wrapped = ddp.data_parallel(model)
assert torch.equal(model[0].weight, first) == (rank == 0)  # all have the weights of the first
x = torch.randn(8, 3)
for _ in range(2):
    model.zero_grad()
    own = torch.autograd.grad(model(x), model[0].weight)[0]
    model[1].reset_running_stats()
    wrapped(x).backward()
    torch.testing.assert_close(model[0].weight.grad, ddp.total(own) / ddp.world_size())
ddp.broadcast_weights(model)
for tensor in (model[1].running_mean, model[1].running_var):
    assert all(torch.equal(tensor, other) for other in ddp.gather(tensor))
ddp.destroy_process_group()
assert not torch.distributed.is_initialized()
"""


def test_gradients_are_averaged_and_batchnorm_has_the_statistics_of_the_first(tmp_path):
    done = script(tmp_path, BATCHNORM, processes=3)
    assert done.returncode == 0, done.stderr
    assert "unused" not in done.stderr


HANGING = """
import os, signal
from datetime import timedelta
from aerl.runtime import ddp
ddp._TIMEOUT = timedelta(seconds=5)
ddp.init_process_group("cpu")
with ddp.end_together():
    ddp.gather("both are here")
    if ddp.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    ddp.gather("only the first")
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(tmp_path):
    began = time.monotonic()
    done = script(tmp_path, HANGING)
    assert done.returncode == 1 and time.monotonic() - began < 120
    assert "error: process 0 of 2: " in done.stderr


def test_torchrun_and_the_configuration_must_agree(start):
    for torchrun, words in (((), "hardware=ddp"), (TORCHRUN, "hardware=cpu")):
        done = ended(start(torchrun, words))
        assert done.returncode == 1 and "error: hardware.distributed=" in done.stderr
