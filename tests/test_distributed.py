"""One run on two processes that a real torchrun starts, against the same run on one. They talk by gloo."""

import contextlib
import json
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
from tests.runs import results_of, same_end, wait_for

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
DDP = ("hardware=ddp", "hardware.device=cpu")
# Without dropout, which each process draws for itself.
NET = (
    "model=foreign",
    "model.net._target_=tests.test_distributed.net",
    "model.mean=[0.3]",
    "model.std=[0.3]",
)
QUICK = (*NET, "evaluation.samples=40", "evaluation.batch_size=2", "logger=none", "analysis=none", "eps=0.3")


def net(num_classes: int, channels: int, size: tuple[int, int]) -> torch.nn.Module:
    """Its first weights are the first process's: the second one's own are useless."""
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
        if self.training and len(x) > 2 and os.environ.get("RANK") == "1":  # not yet when it is tried at the start
            raise ValueError("a fault of this process alone")
        return super().forward(x.flatten(1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def start(place: Path, data_dir: Path):  # type: ignore[no-untyped-def]
    """`start(TORCHRUN, "trainer=rl", ...)`: the command line in `place`, on two processes or, with (), on one."""

    def popen(torchrun: tuple[str, ...], *words: str) -> subprocess.Popen[str]:
        command = [
            *(torchrun or (sys.executable,)),
            str(ROOT / "launch.py"),
            *words,
            *(DDP if torchrun and "hardware=cpu" not in words else ()),
        ]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
        env |= {"AERL_DATA": str(data_dir), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        return subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return popen


def ended(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def values(folder: Path) -> list[float]:
    return [value for *_, value in results_of(folder)]


@pytest.fixture(scope="module")
def trained(place, start):
    """RL with an adversary, which draws actions, shifts and attacks: on one process, and on two."""
    words = ("trainer=rl_adv", "trainer.adversary.start_epoch=1", "trainer.epochs=3", "attack=fgsm", *QUICK,
             "dataset.augmentation.translate=0.1", "analysis=[curve]", "analysis.curve.samples=8")  # fmt: skip
    for name, torchrun in (("one", ()), ("two", TORCHRUN)):
        done = ended(start(torchrun, *words, f"name={name}"))
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("worst case") == 1  # one process speaks
    return place / "runs/one", place / "runs/two"


def test_training_shares_its_batches_and_stays_the_same(trained):
    one, two = trained
    assert [told[:-1] for told in results_of(one)] == [told[:-1] for told in results_of(two)]
    np.testing.assert_allclose(values(one), values(two), rtol=1e-5)
    weights = [torch.load(folder / "checkpoints/last.pt")["model"] for folder in trained]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-4, atol=1e-6)


def test_one_process_writes_and_says_how_many_there_were(trained):
    one, two = trained
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert "curve.png" in {path.name for path in (two / "figures").iterdir()}  # by attacks of the first alone
    summary = json.loads((two / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["environment"]["processes"] == "2"
    assert (two / "run.log").read_text().count("going on after") == 0


def test_the_outcomes_are_those_of_one_process(trained, start, place):
    """Of three batches of a first stage and of all sorts of later ones, to the last bit."""
    words = ("trainer=none", f"checkpoint={trained[0]}", *QUICK, "evaluation.samples=6",
             "attack=[noise,pgd,autoattack]", "attack.pgd.restarts=2", "attack.pgd.steps=20",
             "attack.autoattack.batch_size=2", "attack.autoattack.queries=30", "evaluation.survivors_only=true",
             )  # fmt: skip
    for name, torchrun in (("judged-one", ()), ("judged-two", TORCHRUN)):
        done = ended(start(torchrun, *words, f"name={name}"))
        assert done.returncode == 0, done.stderr
    for name in ("outcomes.npz", "examples.npz"):
        one, two = (dict(np.load(place / f"runs/judged-{n}" / name)) for n in ("one", "two"))
        assert one.keys() == two.keys() and len(one) >= 3
        assert all(np.array_equal(one[key], two[key]) for key in one)
    assert values(place / "runs/judged-one")[:2] == values(place / "runs/judged-two")[:2]


def test_a_multirun_goes_on_after_a_job_that_fails(start, place):
    """Both processes fail in it, and neither is left behind in it."""
    words = ("-m", "trainer.batch_size=32,33,64", "trainer.epochs=1", "attack=fgsm", *QUICK, "runs_dir=swept")
    done = ended(start(TORCHRUN, *words))
    assert done.returncode == 1
    assert (
        done.stderr.count("trainer.batch_size=33: batches of 33 images cannot be shared evenly by the 2 processes") == 1
    )
    finished = [json.loads(path.read_text())["status"] for path in place.glob("swept/digits/**/summary.json")]
    assert sorted(finished) == ["failed", "finished", "finished"]
    assert "failed: job 1 (trainer.batch_size=33)" in done.stdout
    assert (place / "swept/multirun").is_dir()


def test_a_process_that_fails_alone_takes_the_others_with_it(start, place):
    words = (
        "trainer.epochs=1",
        *QUICK,
        "model.net._target_=tests.test_distributed.OnlyTheSecondFails",
        "name=alone",
    )
    done = ended(start(TORCHRUN, *words))
    assert done.returncode == 1
    assert "error: process 1 of 2: training stopped at epoch 1 of 1, step 1 of " in done.stderr
    assert "model.net: ValueError: a fault of this process alone" in done.stderr


@pytest.mark.slow
def test_told_to_end_all_stop_at_the_same_step_and_go_on(start, place):
    """In training, twice, and in an attack; then it ends as one that nobody disturbed, to the bit.

    The network has dropout, and BatchNorm, which on the CPU sees the share of its process alone.
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
        process.send_signal(signal.SIGTERM)  # which torchrun hands on
        assert ended(process).returncode != 0
        assert time.monotonic() - began < 20
        assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
        within += "step" in torch.load(folder / "checkpoints/last.pt")
    assert within == 2
    for name in ("stopped", "whole"):
        done = ended(start(TORCHRUN, *words, f"name={name}"))
        assert done.returncode == 0, done.stderr
    same_end(folder, place / "runs/whole")


def alive(folder: Path) -> list[int]:
    """The processes that were started with this run folder's name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"name={folder.name}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_killed_torchrun_takes_its_processes_with_it_at_once(start, place):
    folder = place / "runs/orphans"
    process = start(TORCHRUN, "trainer=rl", "trainer.epochs=200", *QUICK, "name=orphans")
    wait_for((folder / "results.jsonl").is_file, process)
    assert len(alive(folder)) == 3
    process.kill()
    process.communicate()
    time.sleep(0.5)
    assert alive(folder) == []


THREE = """
import torch
from aerl.runtime import ddp
ddp.init_process_group("cpu")
rank = ddp.rank()
constant, changing = torch.full((3,), 0.1), torch.tensor([0.1, float(rank), torch.nan if rank == 2 else 1])
ddp.average([constant, changing], differing=True)
assert torch.equal(constant, torch.full((3,), 0.1)) and changing[:2].tolist() == [torch.tensor(0.1).item(), 1]
assert changing[2].isnan()
model = torch.nn.BatchNorm1d(2)
model.weight.data.fill_(rank)
model.running_mean.fill_(rank)
ddp.broadcast_weights(model)
assert model.weight.tolist() == model.running_mean.tolist() == [0, 0]
ddp.destroy_process_group()
assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
def test_three_processes_keep_constants_average_the_rest_and_begin_alike(tmp_path):
    (tmp_path / "three.py").write_text(THREE)
    command = [*TORCHRUN[:-1], "--nproc-per-node=3", str(tmp_path / "three.py")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_adversary_that_drops_and_restarts_draws_as_in_one_process(start, place):
    words = ("trainer=pgd_at", "trainer.epochs=2", "norm=L2", "trainer.adversary.attack.steps=3", "attack=fgsm", *QUICK,
             "+trainer.adversary.attack.restarts=2", "trainer.adversary.attack.drop_fooled=true")  # fmt: skip
    for name, torchrun in (("draws-one", ()), ("draws-two", TORCHRUN)):
        done = ended(start(torchrun, *words, f"name={name}"))
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(place / f"runs/draws-{n}/checkpoints/last.pt")["model"] for n in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-6)
    np.testing.assert_allclose(values(place / "runs/draws-one"), values(place / "runs/draws-two"), rtol=1e-5)


def test_torchrun_and_the_configuration_must_agree(start, place):
    alone = ended(start((), "hardware=ddp"))
    assert alone.returncode == 1 and alone.stderr.splitlines() == [
        "error: hardware.distributed=true: needs a process for each GPU: "
        "torchrun --standalone --nproc-per-node=gpu launch.py hardware=ddp ..."
    ]
    each = ended(start(TORCHRUN, "hardware=cpu"))
    assert each.returncode == 1
    assert "error: hardware.distributed=false: torchrun has started 2 processes" in each.stderr
