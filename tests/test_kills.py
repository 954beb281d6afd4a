"""Killed at fifty random moments, whatever it was doing, a run ends as if it had never been disturbed."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from aerl.results import read_results
from tests.conftest import ROOT
from tests.runs import FREQUENT

KILLS = 50
WORDS = (
    "trainer=rl_adv", "trainer.epochs=8", "trainer.adversary.start_epoch=4", "eps=0.4", "evaluation.samples=60",
    "evaluation.batch_size=10", "attack=[fgsm,pgd,autoattack]", "attack.pgd.steps=20", "attack.pgd.drop_fooled=false",
    "attack.autoattack.attacks=[apgd-ce,square]", "attack.autoattack.batch_size=10", "attack.autoattack.queries=300",
    "logger=none", "name=cut", "analysis=[pictures,norms,curve,masking]", "analysis.masking.samples=12",
    "analysis.masking.steps=10", "analysis.masking.queries=10", "analysis.curve.steps=5",
)  # fmt: skip


def start(place, data_dir):
    place.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    env |= {"PYTHONPATH": str(ROOT), "AERL_DATA": str(data_dir), "HOME": str(place)}
    env |= {"MPLCONFIGDIR": str(data_dir / "matplotlib")}
    with (place / "stderr").open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", FREQUENT, *WORDS],
            cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
        )  # fmt: skip


def phase(folder):
    """What a run was doing when it was killed."""
    if not (folder / "summary.json").exists():
        return "start-up"
    summary = json.loads((folder / "summary.json").read_text())
    if summary["status"] == "finished":
        return "page"
    if "train" not in summary["seconds"]:
        return "training"
    return "analyses" if "robust_accuracy" in summary else "attacks"


def without_times(value):
    if isinstance(value, dict):
        other = ("seconds", "run_id", "environment")
        return {key: without_times(item) for key, item in value.items() if key not in other}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def end(folder):
    """All that a run has left, but for times."""
    left = {}
    for name in ("best", "last"):
        state = torch.load(folder / f"checkpoints/{name}.pt", weights_only=True)["model"]
        left |= {f"{name}/{key}": tensor.numpy() for key, tensor in state.items()}
    for name in ("outcomes", "examples"):
        with np.load(folder / f"{name}.npz") as file:
            left |= {f"{name}/{key}": file[key] for key in file.files}
    told = [
        (r.metric, r.value, r.n, r.split, r.attack, r.norm, r.eps, r.step)
        for r in read_results(folder / "results.jsonl")
        if r.metric not in ("seconds", "images_per_second")
    ]
    tables = {path.name: path.read_text() for path in (folder / "tables").iterdir()}
    return left, told, tables, without_times(json.loads((folder / "summary.json").read_text()))


@pytest.mark.slow
def test_fifty_kills_are_fifty_identical_ends(tmp_path, data_dir):
    """One after another on the same folder, until the run gets through before it is killed; then on a new one."""
    began = time.monotonic()
    assert start(tmp_path / "whole", data_dir).wait(600) == 0
    duration = time.monotonic() - began
    whole = end(tmp_path / "whole/runs/cut")
    assert len(set(whole[1])) == len(whole[1]) > 60
    moments, kills, folders = random.Random(0), collections.Counter(), 0
    while kills.total() < KILLS:
        place = tmp_path / str(folders)
        # Every third folder prepares the dataset itself, so that it may be killed in that.
        data = place / "data" if folders % 3 == 0 else data_dir
        while True:
            process = start(place, data)
            try:
                # Mostly as long as a whole run takes; the last kills of a chain come in what is left of it.
                limit = moments.uniform(0, duration) if kills.total() < KILLS else 600
                code = process.wait(limit)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills[phase(place / "runs/cut")] += 1
        assert code == 0, (place / "stderr").read_text()
        for there, here in zip(whole, end(place / "runs/cut"), strict=True):
            if isinstance(there, dict) and isinstance(next(iter(there.values())), np.ndarray):
                assert there.keys() == here.keys()
                assert [key for key in there if not np.array_equal(there[key], here[key])] == []
            else:
                assert there == here
        folders += 1
    print(
        f"{dict(kills)} in {folders} folders; {duration:.0f} s undisturbed, {time.monotonic() - began:.0f} s in all"
    )
    assert {"start-up", "training", "attacks", "analyses"} <= set(kills)
