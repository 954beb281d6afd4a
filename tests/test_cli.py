"""The command line: what it explains, composes and refuses."""

import random
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from aerl.build import build, check
from aerl.config.cli import prepare_words
from aerl.config.compose import inherit_from_checkpoint, read
from aerl.config.errors import explain
from aerl.config.names import leaves
from aerl.config.targets import bind
from aerl.runtime.terminal import one_line
from tests.conftest import ROOT, environment
from tests.runs import BARE, summary_of

CONF = ROOT / "conf"
PREPARING = ("preparing ", "there is no labelled test split: ")  # the first test that needs the data


def test_help_names_every_group_and_option(launch):
    text = launch("--help").stdout
    for group in ("dataset", "model", "trainer", "attack", "analysis", "hardware", "logger", "experiment"):
        options = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        assert f"{group}: {options}" in text
    assert "multirun_sweeps=quick" in text
    assert "launch.py -sc install=bash" in text


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"]])
def test_help_and_cfg_import_nothing_slow(words):
    """Their second is spent in Hydra; any of these would double it. The time itself is benchmarked."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "launch.py"), *words],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert "hydra" in imported
    assert not imported & {"torch", "wandb", "datasets", "matplotlib", "pyautoattack", "sklearn", "numpy"}
    assert "pydantic" not in imported or "--help" not in words


def test_tab_completion_completes_options(launch):
    done = launch("-sc", "query=bash", COMP_LINE="python launch.py trainer=rl", COMP_POINT="27")
    assert {"trainer=rl", "trainer=rl_adv"} <= set(done.stdout.split())


# Overrides, and a part of the one line about them; nothing is left behind.
WRONG = [
    ("dataset=nope", "no such option; known: cifar10, "),
    ("trainer=r", "did you mean rl?"),
    ("attack=[pgd,xyz]", "attack=xyz: no such option; known: adaptive, "),
    ("trainer.batchsize=3", "trainer.batchsize: no such key; did you mean batch_size?"),
    ("trainer.adversary.weight=2", "trainer.adversary.weight: no such key"),
    ("model.net.depth=1", "model.net.depth=1: no such key; known: hidden"),
    ("trainer.optimizer.momentum=0.9", "trainer.optimizer.momentum=0.9: no such key; known: amsgrad, betas"),
    (
        "trainer=pgd_at dataset=cifar10 trainer.optimizer._target_=torch.optim.AdamW",
        "trainer.optimizer.momentum=0.9: no such key; known: amsgrad, betas, capturable, differentiable, eps, foreach, "
        "fused, lr, maximize, weight_decay; '~trainer.optimizer.momentum' leaves it out",
    ),
    ("trainer.schedule.milestones=[30]", "trainer.schedule.milestones=[30]: belong to trainer.schedule.kind=step"),
    ("epochs=3", "epochs: no such key; did you mean trainer.epochs="),
    ("trainer.lr=0.1", "trainer.lr: no such key; did you mean trainer.optimizer.lr="),
    ("seed=0,1", "seed=0,1: several values; -m seed=0,1 runs one job for each"),
    ("attack=pgd,fgsm", "'attack=[pgd,fgsm]' takes them together"),
    ("trainer.epochs=[1,2]", "-m trainer.epochs=1,2 runs one job for each"),
    ("+trainer.new=1", "trainer.new=1: no such key"),
    ("+new=1", "new=1: no such key"),
    ("+attack.pgd.step=1", "no such key; did you mean steps?"),
    ("+trainer.act.exploration=.1", "trainer.act.exploration=0.1: no such key; known: none"),
    ("~dataset.source", "dataset.source: cannot be deleted"),
    ("attack=[pgd", "attack=[pgd: expected key=value"),
    ("checkpoint=runs/a=b,c", "needs quotes around its special characters: \"checkpoint='runs/a=b,c'\""),
    ("trainer=[sl,rl]", "trainer=[sl,rl]: expected one option"),
    ("trainer=null", "trainer=null: expected one option"),
    ("trainer.epochs=many", "integer"),
    ("trainer.batch_size=0", "greater than or equal to 1"),
    ("eps=-1", "greater than or equal to 0"),
    ("eps=8/0", "divides by zero"),
    ("eps=[0.25,-1]", "eps.1=-1: should be greater than or equal to 0"),
    ("eps=[]", "eps=[]: expected a number, or a list of them"),
    ("norm=Linf eps=[1/255,8]", "eps=8: pixels are in [0, 1]"),
    ("+radii=[0.5]", "radii: no such key; eps=[0.25,0.5] takes several"),
    ("norm=L3", "'L1', 'L2' or 'Linf'"),
    ("norm=L1 attack=pgd_paper", "attack.pgd_paper.norm=L1: should be 'L2' or 'Linf'"),
    ("norm=L1 attack=fmn", "attack.fmn.norm=L1: should be 'L2' or 'Linf'"),
    ("norm=Linf eps=8", "eps=8: pixels are in [0, 1]; did you mean 8/255?"),
    ("model.mean=[nan]", "model.mean.0=nan: must be finite"),
    ("trainer.optimizer.lr='inf'", "trainer.optimizer.lr=inf: must be finite"),
    ("trainer.optimizer.lr=-1", "trainer.optimizer: ValueError: Invalid learning rate: -1"),
    ("trainer.optimizer._target_=torch.optim.Adamm", "cannot be imported"),
    ("trainer.select=val_adversarial_accuracy", "needs trainer.adversary"),
    ("trainer.until=50", "trainer.until=50: "),
    ("trainer=gce trainer.act.q=2", "trainer.act.q=2: "),
    ("trainer=reinforce trainer.objective.baseline=leave_one_out", "draws=1, try draws=2"),
    ("trainer=reinforce trainer.act.expected=true", "draws nothing; use aerl.training.objectives.policy_gradient"),
    ("trainer=label_smoothing trainer.probability_floor=1e-6", "has no floor; expected 0"),
    (
        "trainer=rl dataset.augmentation.cutmix=1",
        "cutmix=1: mixes the labels of two images, and an action has one class",
    ),
    ("trainer=reinforce dataset.augmentation.mixup=.2", "mixup=0.2: mixes the labels of two images"),
    ("dataset.augmentation.cropp=4", "dataset.augmentation.cropp: no such key; did you mean crop?"),
    ("attack.pgd.steps=2.5", "integer"),
    ("attack=pgd attack.pgd.restarts=2 attack.pgd.random_start=false", "attack.pgd.restarts=2: "),
    ("attack=transfer", "attack.transfer.sources: must be given"),
    ("analysis=compare analysis.compare.runs=[x]", "analysis.compare.runs.0=x: must be a run folder"),
    ("analysis=corruptions analysis.corruptions.folder=here", "analysis.corruptions.folder=here: has no labels.npy"),
    ("dataset=npz dataset.path=test_only.npz", "has no X_train; it only evaluates: trainer=none checkpoint=RUN"),
    ("trainer=none", "checkpoint=null: "),
    ("trainer=none checkpoint=nowhere", "no such file or folder"),
    ("trainer=none checkpoint=damaged.pt", "damaged or not a PyTorch file"),
    ("dataset=huggingface", "dataset.path: must be given"),
    ("dataset=npz dataset.path=nowhere.npz", "no such file"),
    ("dataset=npz dataset.path=tiny.npz", "model=alicnn: 4x4 images are too small"),
    ("dataset.train_samples=9999", "the training split has 1293 images"),
    ("evaluation.samples=361", "the test split has 360 images"),
    ("hardware.threads=100000", "less than or equal to 1024"),
    ("name=", "name=: must name a folder below runs_dir"),
    ("name=../x", "name=../x: must name a folder below runs_dir"),
    ("name=-x", "name=-x: must name a folder below runs_dir"),
    (f"name={'n' * 256}", "at most 255 bytes"),
    (f"name={'n/' * 2000}n", "at most 255 bytes"),
    ("name='a\tb'", "must name a folder below runs_dir"),
    ("runs_dir=", "at least 1 character"),
    ("data_dir=file", "cannot hold the prepared data"),
    ("dataset=npz dataset.path=~/nowhere.npz", "/home/nowhere.npz: no such file"),
    ("model=[alicnn,cnn]", "model=[alicnn,cnn]: expected one option"),
    ("~trainer", "~trainer: expected one option"),
    ("recipe=nope", "recipe=nope: no such option; known: "),
    ("hydra.run.dir=zz", "hydra.run.dir=zz: not supported"),
    (f"seed={'9' * 5000}", "seed=9"),
    (f"+{'k' * 100_000}=1", "too long"),
    ("model=réseau", "model=réseau: needs quotes"),
    ("seed", "seed: expected key=value"),
    ("trainer=sl,rl", "trainer=sl,rl"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty home, a folder with files that the overrides name."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    Path("damaged.pt").write_bytes(b"PK\x03\x04 not really")
    Path("file").write_text("in the way")
    images = {f"X_{part}": np.zeros((40, 4, 4, 3), dtype=np.uint8) for part in ("train", "test")}
    images["X_train"][::2], images["X_test"][1::2] = 1, 2
    only = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez("test_only.npz", X_test=only, y_test=np.arange(20) % 2)
    np.savez("tiny.npz", **images, y_train=np.arange(40) % 2, y_test=np.arange(40) % 2)
    before = set(tmp_path.rglob("*"))
    yield here
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("words", "expected"), WRONG, ids=lambda value: value[:60])
def test_wrong_command_line_in_process(folder, data_dir, words, expected):
    line = refusal(words.split(" "), data_dir)
    assert expected in line and len(line) < 4000, line


def refusal(words, data_dir):
    """The line with which the command line would end, from the parts that it is made of."""

    if not any(word.startswith("data_dir") for word in words):
        words = [f"data_dir={data_dir}", *words]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            build(read(inherit_from_checkpoint(compose("config", overrides=prepare_words(words)), words)))
    except Exception as error:
        return one_line(explain(error) or f"traceback: {error!r}")
    return "accepted"


COMMANDS = [
    (["--trainer=rl"], "--trainer=rl"),
    (["eps=1", "-m", "seed=0,-1"], "seed=-1: should be greater than or equal to 0 (job 1 of 2: eps=1 seed=-1)"),
    (["-m", "seed=glob(x)"], "seed=glob(x): gives no jobs"),
    (["runs_dir=file"], "cannot write file/"),
    (["-m", "multirun_sweeps=nope"], "multirun_sweeps=nope: no such option; known: "),
    (["-m", "runs_dir=file", "seed=0,1"], "cannot write "),
    (["hardware=cuda"], "hardware.device=cuda: "),
    *((words.split(" "), expected) for words, expected in WRONG),
]


@pytest.mark.parametrize(
    ("words", "expected"),
    # A process for each: by default for the first few.
    [pytest.param(*case, marks=[pytest.mark.slow] if number > 6 else []) for number, case in enumerate(COMMANDS)],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_wrong_command_line_ends_in_one_line(launch, folder, tmp_path, words, expected):
    done = launch(*words, cwd=folder, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0 and done.stdout.strip() == ""
    (line,) = [text for text in done.stderr.splitlines() if not text.startswith(PREPARING)]
    assert line.startswith("error: ") and expected in line, line


def composed(*words):

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return read(compose("config", overrides=list(words)))


def test_eight_over_255_is_the_number():
    config = composed("eps=8/255", "norm=Linf")
    assert config.eps == config.attack["pgd"]["eps"] == pytest.approx(8 / 255)


REQUIRED = {
    "dataset=huggingface": ["dataset.path=x"],
    "dataset=npz": ["dataset.path=x"],
    "model=foreign": ["model.mean=[0]", "model.std=[1]", "model.net._target_=torchvision.models.resnet18"],
    "trainer=none": ["checkpoint=own"],
    "analysis=conditions": ["analysis.conditions.runs=[]"],
    "analysis=compare": ["analysis.compare.runs=[]"],
    "attack=transfer": ["attack.transfer.sources=[x]"],
    "model=timm": ["model.net.model_name=resnet18"],
    "model=robustbench": ["model.net.model_name=Standard"],
    "analysis=corruptions": ["analysis.corruptions.folder=x"],
    "analysis=transfer_matrix": ["analysis.transfer_matrix.runs=[x]"],
}


@pytest.mark.parametrize(
    "group", sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
)
def test_every_option_of_a_group_composes_and_fits_its_signatures(group):
    datasets = [path.stem for path in (CONF / "dataset").glob("*.yaml")]
    for option in sorted(path.stem for path in (CONF / group).glob("*.yaml")):
        words = [f"{group}={option}", *REQUIRED.get(f"{group}={option}", [])]
        if group == "recipe" and option != "none":
            dataset = max((name for name in datasets if option.startswith(f"{name}_")), key=len)
            words = [f"dataset={dataset}", f"trainer={option.removeprefix(f'{dataset}_')}"]
        config = composed(*words)
        if option in ("timm", "robustbench") and find_spec(option) is None:
            continue
        check(config)
        bind(config.dataset.source, "dataset.source", given={"data_dir": Path()})
        assert group != "attack" or (config.attack == {}) == (option == "none")


@pytest.mark.parametrize("path", sorted((ROOT / "multirun_sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_job_of_a_sweep_composes(path):
    """Each grid is expanded by Hydra's own sweeper; composing a job shows a wrong name or value in it."""

    words = ["checkpoint=RUN,OTHER"] if path.stem == "causes_withheld" else []  # of which it is one job each
    grid = yaml.safe_load(path.read_text())["hydra"].get("sweeper", {"params": {}})["params"]
    overrides = OverridesParser.create().parse_overrides([*words, *(f"{key}={value}" for key, value in grid.items())])
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    assert len(jobs) > 1
    for job in jobs:
        composed(f"multirun_sweeps={path.stem}", *job)


def test_a_copy_of_the_repository_works_from_any_folder(tmp_path):
    """AERL_ROOT is launch.py's own folder, wherever it is called from."""
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    for name in ("conf", "multirun_sweeps"):
        shutil.copytree(ROOT / name, clone / name)
    shutil.copy(ROOT / "launch.py", clone)
    (clone / "multirun_sweeps/mine.yaml").write_text("# @package _global_\nseed: 7\n")
    elsewhere.mkdir()
    command = [sys.executable, str(clone / "launch.py"), "multirun_sweeps=mine", "--cfg", "job"]
    env = environment(tmp_path, tmp_path)
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["seed"] == 7


# ------------------------------------------------------------------- every key of the schema, given nonsense

NONSENSE = ["nan", "'inf'", "[1]", "{a: 1}", "''", "'a\\tb'", "-9e99", "true", "9" * 400, "réseau", "'\u202e'"]


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_nonsense_for_any_key_of_the_schema_is_one_line(data_dir, count):
    draw, keys = random.Random(13), [key for key, _ in leaves(composed().model_dump()) if key != "hardware.compile"]
    for _ in range(count):
        ending = draw.choice(["", "", "", "", "x", ".x", "-", "@x"])
        word = f"{draw.choice(['', '', '+', '++', '~'])}{draw.choice(keys)}{ending}={draw.choice(NONSENSE)}"
        line = refusal([word], data_dir)
        assert not line.startswith("traceback") and len(line) < 4000, (word, line)


# ------------------------------------------------------------------------------------ terminals and machines


def test_a_run_outlives_its_terminal_and_is_legible_in_any_encoding(tmp_path, data_dir):
    words = "trainer=none checkpoint=own model.mean=[0] model.std=[1] attack=none analysis=none logger=none"
    for number, ending in enumerate((">&- 2>&- <&-", "2>&1 | true", "")):
        command = f"{sys.executable} {ROOT / 'launch.py'} {words} name=n{number} {ending}"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True,
            env=environment(data_dir, tmp_path, PYTHONIOENCODING="ascii"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert summary_of(tmp_path / f"runs/n{number}")["status"] == "finished"
    assert "95 % interval" in done.stdout


SPY = """
import gc, sys
import torch
from aerl.models import AliCNN

class Net(AliCNN):
    def __init__(self, num_classes: int, channels: int, size: tuple, fail: str):
        super().__init__(num_classes=num_classes, channels=channels, size=size)
        self.fail = fail
        alive = [o for o in gc.get_objects() if type(o) in (Net, torch.optim.AdamW) and o is not self]
        print(f"alive before {fail}: {len(alive)}", file=sys.stderr)

    def forward(self, x):
        if self.training and self.fail == "training":
            raise RuntimeError("in training")
        return super().forward(x)
"""


def test_a_failed_job_leaves_no_model_or_optimizer_to_the_next(launch, tmp_path):
    (tmp_path / "spy.py").write_text(SPY)
    words = ["model.net._target_=spy.Net", "+model.net.fail=training,nothing,at_all", "dataset.train_samples=64"]
    done = launch("-m", *words, *BARE, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 1
    alive = re.findall(r"^alive before (.*)$", done.stderr, re.MULTILINE)
    assert alive == ["training: 0", "nothing: 0", "at_all: 0"]
