"""A run that is killed at a hundred random moments ends as if it had never been disturbed."""

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from aerl.tracking.results import read_results
from tests.conftest import ROOT
from tests.runs import FREQUENT, summary_of
from tests.test_distributed import TORCHRUN

WORDS = (
    "trainer=rl_adv", "trainer.epochs=8", "trainer.adversary.start_epoch=4", "eps=0.4", "evaluation.samples=60",
    "evaluation.batch_size=10", "attack=[fgsm,pgd,autoattack]", "attack.pgd.steps=20", "attack.pgd.drop_fooled=false",
    "attack.autoattack.attacks=[apgd-ce,square]", "attack.autoattack.batch_size=10", "attack.autoattack.queries=300",
    "logger=none", "analysis=[pictures,norms,curve,masking]", "analysis.masking.samples=12",
    "analysis.masking.steps=10", "analysis.masking.queries=10", "analysis.curve.steps=5",
)  # fmt: skip
SHORT = ("trainer.epochs=4", "evaluation.samples=30", "attack=[fgsm,pgd]", "attack.pgd.steps=10", "analysis=norms")


@dataclass(frozen=True)
class Disturbance:
    """How often, in which command, and what is killed: the whole process group, or W&B's service alone."""

    kills: int
    words: tuple[str, ...]
    torchrun: bool = False
    victim: str = "everything"


DISTURBANCES = {
    "run": Disturbance(40, (*WORDS, "name=cut")),
    "overwrite": Disturbance(20, (*WORDS, "name=cut", "overwrite=true")),
    "multirun": Disturbance(15, ("-m", "seed=0,1", *SHORT, "logger=none")),
    "ddp": Disturbance(10, (*SHORT, "logger=none", "name=cut", "hardware=ddp", "hardware.device=cpu"), torchrun=True),
    "wandb": Disturbance(15, (*SHORT, "logger.mode=offline", "name=cut"), victim="wandb-core"),
}  # fmt: skip
CHANGING = ("seconds", "run_id", "environment", "files", "results", "trained", "evaluated", "seal", "wish", "wandb")


def start(place, data_dir, disturbance):
    place.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    env |= {"PYTHONPATH": str(ROOT), "AERL_DATA": str(data_dir), "HOME": str(place)}
    env |= {"MPLCONFIGDIR": str(data_dir / "matplotlib")}
    (place / "frequent.py").write_text(FREQUENT)
    launcher = TORCHRUN if disturbance.torchrun else ()
    with (place / "stderr").open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, *launcher, str(place / "frequent.py"), *disturbance.words],
            cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
        )  # fmt: skip


def kill(process, victim):
    if victim == "everything":
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if victim.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)


def phase(folder):
    """What a run was doing when it was killed."""
    if not (folder / "summary.json").exists():
        return "start-up"
    summary = summary_of(folder)
    if summary["status"] == "finished":
        return "page"
    if "train" not in summary["seconds"]:
        return "training"
    return "analyses" if "robust_accuracy" in summary else "attacks"


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in CHANGING}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def ends(place):
    """Everything that the runs in a folder have left, except times."""
    return {path.parent.name: end_of_run(path.parent) for path in sorted((place / "runs").rglob("summary.json"))}


def end_of_run(folder):
    left = {}
    for name in ("best", "last"):
        state = torch.load(folder / f"checkpoints/{name}.pt", weights_only=True)["model"]
        left |= {f"{name}/{key}": tensor.numpy().tobytes() for key, tensor in state.items()}
    for name in ("outcomes", "examples"):
        with np.load(folder / f"{name}.npz") as file:
            left |= {f"{name}/{key}": file[key].tobytes() for key in file.files}
    left["results"] = [
        (r.metric, r.value, r.n, r.split, r.attack, r.norm, r.eps, r.step)
        for r in read_results(folder / "results.jsonl")
        if r.metric not in ("seconds", "images_per_second")
    ]
    assert len(set(left["results"])) == len(left["results"]) > 20
    for path in (folder / "tables").iterdir():
        left[path.name] = pd.read_csv(path).drop(columns="seconds", errors="ignore").to_csv()
    left["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "wandb" not in path.parts)
    return left | {"summary": without_times(summary_of(folder))}


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_hundred_kills_are_a_hundred_identical_ends(tmp_path, data_dir, name):
    """One after another on the same folder, until the run gets through before it is killed; then on a new one."""
    disturbance, began = DISTURBANCES[name], time.monotonic()
    assert start(tmp_path / "straight", data_dir, disturbance).wait(600) == 0
    duration = time.monotonic() - began
    straight = ends(tmp_path / "straight")
    moments, kills, folders = random.Random(name), collections.Counter(), 0
    while kills.total() < disturbance.kills:
        place = tmp_path / str(folders)
        if name == "overwrite":  # of what is finished
            shutil.copytree(tmp_path / "straight", place)
        # Every third folder prepares the dataset itself, so that it may be killed in that.
        data = place / "data" if folders % 3 == 0 else data_dir
        code = None
        while code is None:
            process = start(place, data, disturbance)
            # Mostly as long as a whole run takes; the last kills of a chain come in what is left of it.
            limit = moments.uniform(0, duration) if kills.total() < disturbance.kills else 600
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                kill(process, disturbance.victim)
                kills[phase(place / "runs/cut")] += 1
                if process.returncode is None:  # it continues without the service
                    code = process.wait(600)
        assert code == 0, (place / "stderr").read_text()
        assert ends(place) == straight
        folders += 1
        if name == "overwrite":
            shutil.rmtree(place)
    print(f"{name}: {dict(kills)} in {folders} folders; {duration:.0f} s undisturbed")
    if name == "run" and disturbance.kills >= 40:
        assert {"start-up", "training", "attacks", "analyses"} <= set(kills)
