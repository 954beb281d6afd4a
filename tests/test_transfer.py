"""Transfer: examples made once on each source and kept, the attack, the matrix, and sources that are refused."""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from aerl.attacks import Crafted, SampleGenerator, Transfer, attacking, collect_warnings, pgd
from aerl.attacks.projections import norms
from aerl.errors import UserError
from aerl.evaluation.statistics import wilson
from aerl.models import AliCNN
from aerl.tracking.results import read_results
from aerl.training import checkpoint
from tests.conftest import ROOT
from tests.runs import forge

SETTINGS = {"norm": "L2", "eps": 0.5, "steps": 5, "step_size": None, "loss": "log_odds"}


class Counting(nn.Module):
    """A small network at random weights that counts the images put through it."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.net(x)


def images(count=24):
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 4, (32,), generator=generator)
    x = torch.randint(0, 256, (32, 1, 8, 8), generator=generator) / 255
    return x[:count], y[:count]


# --------------------------------------------------------------------------------------- kept examples


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_crafted_examples_are_those_of_pgd(tmp_path, norm):
    model, (x, y) = Counting(), images()
    settings = {**SETTINGS, "norm": norm, "eps": {"L2": 0.5, "Linf": 0.03}[norm]}
    made = Crafted(model, tmp_path, seed=3, **settings)(x, y)
    noise = SampleGenerator.for_images(x, 3, "transfer")
    assert torch.equal(made, pgd(model, x, y, generator=noise, drop_fooled=False, **settings))
    assert norms(made - x, norm).max() <= settings["eps"] * (1 + 1e-6)
    assert made.min() >= 0 and made.max() <= 1


def test_nothing_is_crafted_twice_whatever_the_batches(tmp_path):
    model, (x, y) = Counting(), images()
    made = Crafted(model, tmp_path, seed=0, **SETTINGS)(x, y)
    again = Crafted(model, tmp_path, seed=0, **SETTINGS)
    model.seen = 0
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    for rows in order.split(7):
        assert torch.equal(again(x[rows], y[rows]), made[rows])
    assert model.seen == 0
    other, label = images(30)
    found = again(other, label)  # six new ones, the rest as before
    assert torch.equal(found[:24], made)
    assert 0 < model.seen <= 6 * (SETTINGS["steps"] + 2)
    torch.testing.assert_close(found, Crafted(model, tmp_path / "new", seed=0, **SETTINGS)(other, label))


def test_examples_depend_on_label_model_seed_and_settings(tmp_path):
    model, (x, y) = Counting(), images(4)
    made = [
        Crafted(model, tmp_path, seed=0, **SETTINGS)(x, y),
        Crafted(model, tmp_path, seed=0, **SETTINGS)(x, (y + 1) % 4),
        Crafted(Counting(seed=1), tmp_path, seed=0, **SETTINGS)(x, y),
        Crafted(model, tmp_path, seed=1, **SETTINGS)(x, y),
        Crafted(model, tmp_path, seed=0, **{**SETTINGS, "eps": 0.4})(x, y),
    ]
    assert not any(torch.equal(made[i], made[j]) for i in range(5) for j in range(i))
    assert len(list(tmp_path.iterdir())) == 4
    with torch.no_grad():
        model.net[0].bias += 1
    Crafted(model, tmp_path, seed=0, **SETTINGS)(x, y)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_crafted_again(tmp_path, caplog, damage):
    model, (x, y) = Counting(), images()
    crafted = Crafted(model, tmp_path, seed=0, **SETTINGS)
    made = torch.cat([crafted(x[:12], y[:12]), crafted(x[12:], y[12:])])
    path, _ = sorted(tmp_path.glob("*/*.npz"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes({"cut": content[:700], "flipped": content}[damage])
    model.seen = 0
    again = Crafted(model, tmp_path, seed=0, **SETTINGS)
    found = torch.cat([again(x[:12], y[:12]), again(x[12:], y[12:])])
    assert torch.equal(found, made)
    assert str(path) in caplog.text
    assert 0 < model.seen <= 12 * (SETTINGS["steps"] + 2)


def test_examples_depend_on_source_code_and_buffers(tmp_path, monkeypatch):
    source = """
from torch import nn, ones
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 4)
        self.register_buffer("scale", ones(1), persistent=False)
    def forward(self, x):
        return self.linear(x.flatten(1)) * SIGN * self.scale
"""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    x, y = images(4)

    def crafted(sign, scale=1.0):
        (tmp_path / "changing_net.py").write_text(source.replace("SIGN", str(sign)))
        sys.modules.pop("changing_net", None)
        torch.manual_seed(0)
        model = nn.Sequential(importlib.import_module("changing_net").Net())
        model[0].scale *= scale
        return Crafted(model, tmp_path / "store", seed=0, **SETTINGS)(x, y)

    first, same, other, scaled = crafted(1), crafted(1), crafted(-1), crafted(1, 2.0)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert len(list((tmp_path / "store").iterdir())) == 3 and scaled.shape == x.shape


def test_two_at_once_share_what_either_has_made(tmp_path):
    model, (x, y) = Counting(), images()
    first, second = (Crafted(model, tmp_path, seed=0, **SETTINGS) for _ in range(2))
    second(x[:4], y[:4])  # knows the folder by now
    first(x, y)
    model.seen = 0
    second(x, y)
    assert model.seen == 0


# ------------------------------------------------------------------------------------------ the attack


def test_refinement_starts_where_the_transferred_examples_are(tmp_path):
    """What is fooled already stays, and of the rest some are fooled, within eps of the clean image."""
    source, target, (x, _) = Counting(), Counting(seed=1), images()
    with attacking(target), torch.no_grad():
        y = target(x).argmax(1)
    attack = Transfer(
        sources=["s"], eps=0.5, steps=5, load=lambda runs, key: dict.fromkeys(runs, source), store=tmp_path
    )
    found = attack(target, x, y, generator=SampleGenerator.for_images(x, 0))
    assert list(found) == ["s", "s_refined"]
    with attacking(target), torch.no_grad():
        right = {part: target(x_adv).argmax(1) == y for part, x_adv in found.items()}
    assert right["s"].any() and not right["s"].all()
    assert torch.equal(found["s_refined"][~right["s"]], found["s"][~right["s"]])
    assert right["s_refined"].sum() < right["s"].sum()
    assert norms(found["s_refined"] - x, "L2").max() <= 0.5 * (1 + 1e-6)
    plain = Transfer(sources=["s"], eps=0.5, steps=5, refine=False, load=attack.load, store=tmp_path)
    assert list(plain(target, x, y, generator=SampleGenerator.for_images(x, 0))) == ["s"]


def test_a_model_without_a_gradient(tmp_path):
    class Rounding(Counting):
        def forward(self, x):
            return super().forward(x.mul(8).round().div(8)).detach()

    target, (x, y) = Rounding(seed=1), images()
    attack = Transfer(sources=["s"], eps=0.5, steps=5, load=lambda runs, key: {"s": Counting()}, store=tmp_path)
    with collect_warnings() as warnings:
        found = attack(target, x, y, generator=SampleGenerator.for_images(x, 0))
    assert torch.equal(found["s"], found["s_refined"]) and not torch.equal(found["s"], x)
    (warning,) = warnings
    assert warning.startswith("not refined: the model's logits do not depend differentiably on the image")


# ------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def home(tmp_path_factory, data_dir):
    """A folder with two small trained runs `a` and `b`, of seeds 0 and 1."""
    home = tmp_path_factory.mktemp("home")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    env |= {"AERL_DATA": str(data_dir), "HOME": str(home), "MPLCONFIGDIR": str(data_dir / "matplotlib")}
    words = ["-m", "seed=0,1", "trainer.epochs=3", "attack=none", "analysis=none", "logger=none"]
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for seed, name in enumerate("ab"):
        (folder,) = home.glob(f"runs/*/*/*/*/seed{seed}")
        folder.rename(home / name)
    return home


@pytest.fixture(scope="module")
def judged(home, data_dir):
    """`a`, judged by transfer from a twin of its own and from `b`; and the matrix of all three."""
    shutil.copytree(home / "a", home / "twin")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "AERL"))}
    env |= {"AERL_DATA": str(data_dir), "HOME": str(home), "MPLCONFIGDIR": str(data_dir / "matplotlib")}
    words = [
        "trainer=none", "checkpoint=a", "attack=transfer", "attack.transfer.sources=[twin,b]",
        "attack.transfer.steps=10", "analysis=transfer_matrix", "analysis.transfer_matrix.runs=[a,b]",
        "analysis.transfer_matrix.steps=10", "evaluation.samples=60", "name=judged", "logger=none",
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "runs/judged"


@pytest.fixture(scope="module")
def white_box(home, judged, data_dir):
    """Whether `a` and `b` are right under PGD on themselves, by hand: bool (60,) each."""
    from hydra import compose, initialize_config_dir

    from aerl.build import build_data, load_model
    from aerl.config.compose import read
    from aerl.data import subset, to_unit

    right = {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = read(compose("config", overrides=[f"data_dir={data_dir}"]))
        data = build_data(config)
        test = subset(data.test, 60)
        x, y = to_unit(test.images, torch.channels_last), test.labels
        for run in "ab":
            model = load_model(str(home / run), config, data)
            assert not model.training
            noise = SampleGenerator.for_images(x, 0, "transfer")
            x_adv = pgd(model, x, y, generator=noise, norm="L2", eps=1.0, steps=10, drop_fooled=False)
            with attacking(model), torch.no_grad():
                right[run] = (model(x_adv).argmax(1) == y).numpy()
    return right


def test_transfer_from_a_twin_is_the_white_box_attack(judged, white_box):
    outcomes = dict(np.load(judged / "outcomes.npz"))
    summary = json.loads((judged / "summary.json").read_text())
    parts = [f"transfer_{name}{refined}" for name in ("sl_seed0", "sl_seed1") for refined in ("", "_refined")]
    assert list(summary["attacks"]) == parts
    clean = outcomes["clean_pred"] == outcomes["label"]
    right = {part: clean & (outcomes[f"{part}_pred"] == outcomes["label"]) for part in parts}
    assert clean.sum() > 30
    assert (right["transfer_sl_seed0"] == clean & white_box["a"]).all()
    assert right["transfer_sl_seed1"].sum() > right["transfer_sl_seed0"].sum()
    for name in ("sl_seed0", "sl_seed1"):
        assert (right[f"transfer_{name}_refined"] <= right[f"transfer_{name}"]).all()
    assert all((outcomes[f"{part}_l2"] <= 1 + 1e-5).all() for part in parts)
    assert (outcomes["transfer_sl_seed1_l2"][clean] > 0.9).all()  # all of them, to the end


def test_the_matrix_and_its_diagonal(judged, white_box):
    with (judged / "tables/transfer_matrix.csv").open() as file:
        rows = {(row["source"], row["target"]): row for row in csv.DictReader(file)}
    names = ["sl_seed0", "sl_seed1"]
    assert list(rows) == [(source, target) for source in names for target in names]
    for name, run in zip(names, "ab", strict=True):
        assert float(rows[name, name]["accuracy"]) == white_box[run].mean()
    summary = json.loads((judged / "summary.json").read_text())
    transfer = summary["transfer"]
    assert transfer["runs"] == {"sl_seed0": "a", "sl_seed1": "b"} and transfer["n"] == 60 and transfer["eps"] == 1.0
    assert transfer["clean"]["sl_seed0"] == summary["clean_accuracy"]
    for (source, target), row in rows.items():
        value, low, high = (float(row[key]) for key in ("accuracy", "low", "high"))
        assert (low, high) == wilson(round(60 * value), 60)
        assert transfer["accuracy"][source][target] == {"value": value, "low": low, "high": high, "n": 60}
        assert float(row["source_clean_accuracy"]) == transfer["clean"][source]["value"]
        assert float(row["target_clean_accuracy"]) == transfer["clean"][target]["value"]
    results = [r for r in read_results(judged / "results.jsonl") if r.metric == "transfer_accuracy"]
    assert {(r.attack, r.source, r.value, r.n, r.eps) for r in results} == {
        (f"transfer_{source}_to_{target}", source, float(row["accuracy"]), 60, 1.0)
        for (source, target), row in rows.items()
    }
    assert (judged / "figures/transfer_matrix.png").read_bytes()[:4] == b"\x89PNG"


def test_equal_models_share_examples(judged, data_dir):
    """Equal weights and settings: one folder for the attack's source `twin` and the matrix's `a`, one for `b`."""
    assert len(list((data_dir / "crafted").iterdir())) == 2


def altered(home, name, *, config=None, summary=None, weights=None):
    """A copy of run `a` in which something is different."""
    shutil.copytree(home / "a", home / name)
    for file, change in (("config.yaml", config), ("summary.json", summary)):
        if change is not None:
            forge(home / name / file, change)
    if weights is not None:
        checkpoint.save({"model": weights}, home / name / "checkpoints/best.pt")


def test_sources_that_cannot_be_used_are_refused(launch, home):
    altered(
        home, "alien", config=lambda c: c["dataset"].update(name="cifar10", size=32, channels=3, source={}),
        summary=lambda s: s["choices"].update(dataset="cifar10"),
    )  # fmt: skip
    altered(home, "evil", config=lambda c: c["model"]["net"].update(_target_="os.getcwd"))
    altered(home, "garbled", summary=lambda s: s.update(choices={"dataset": "digits", "model": "../x=1"}))
    three = AliCNN(num_classes=3, channels=1, size=(8, 8)).state_dict()
    weights = {f"net.{name}": tensor for name, tensor in three.items()}
    weights |= {f"normalize.{name}": torch.ones(1, 1, 1, 1) for name in ("mean", "std")}
    altered(home, "classes", weights=weights, summary=lambda s: s.pop("weights"))
    (home / "alone").mkdir()
    shutil.copy(home / "a/checkpoints/best.pt", home / "alone/best.pt")
    refused = {
        "nowhere": "no such file or folder", "alone/best.pt": "expected a run folder", "alien": "cifar10",
        "evil": "model.net._target_=os.getcwd", "garbled": "model=../x=1",
        "classes/checkpoints/best.pt": "net.fc2.weight is (3, 1024)",
    }  # fmt: skip
    sources = ",".join(f"[b,{run}]" for run in refused)
    words = ("attack=transfer", "analysis=none", "logger=none", "name=refused", "runs_dir=none", "trainer.epochs=1")
    done = launch("-m", *words, f"attack.transfer.sources={sources}", cwd=home)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, (run, reason) in zip(errors, refused.items(), strict=False):
        assert line.startswith(f"error: attack.transfer.sources={run}: ") and reason in line
    assert len(errors) >= len(refused) and not list((home / "none").rglob("summary.json"))


def test_wrong_runs_of_the_matrix_are_refused(home, data_dir):
    from hydra import compose, initialize_config_dir

    from aerl.build import build
    from aerl.config.compose import read

    for runs, line in (
        ([], "analysis.transfer_matrix.runs=[]: name the run folders to compare"),
        ([home / "b", home / "x"], f"analysis.transfer_matrix.runs={home / 'x'}: no such file or folder; .*"),
    ):
        words = [f"data_dir={data_dir}", "attack=none", "analysis=transfer_matrix"]
        listed = f"analysis.transfer_matrix.runs=[{','.join(map(str, runs))}]"
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = read(compose("config", overrides=[*words, listed]))
            with pytest.raises(UserError) as error:
                build(config)
        assert re.fullmatch(line.replace("[", r"\["), str(error.value))


# ------------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ({"x": ("rl", 0, "cnn"), "y": ("sl", 0, "cnn")}, ["rl_seed0", "sl_seed0"]),
        ({"x": ("rl", 0, "cnn"), "y": ("rl", 0, "AliCNN")}, ["cnn_rl_seed0", "alicnn_rl_seed0"]),
        ({"x": ("rl", 0, "cnn"), "My run": ("rl", 0, "cnn")}, ["x", "my-run"]),
        ({"eps=1/s": ("rl", 0, "cnn"), "eps=2/s": ("rl", 0, "cnn")}, ["eps-1_s", "eps-2_s"]),
        ({"x": ("rl", 0, "cnn"), "x/": ("rl", 0, "cnn")}, ["rl_seed0_1", "rl_seed0_2"]),
    ],
)  # fmt: skip
def test_run_names(tmp_path, runs, names):
    from aerl.config.compose import run_names

    for run, (trainer, seed, model) in runs.items():
        (tmp_path / run).mkdir(parents=True, exist_ok=True)
        (tmp_path / run / "config.yaml").write_text("{}")
        summary = {"trainer": trainer, "seed": seed, "model": model}
        (tmp_path / run / "summary.json").write_text(json.dumps(summary))
    assert run_names([f"{tmp_path}/{run}" for run in runs]) == names
