"""The command line as people drive it: what it explains, composes and refuses. Every call is a real process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import ROOT

CONF = ROOT / "conf"


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
    assert not imported & {
        "torch",
        "wandb",
        "datasets",
        "matplotlib",
        "pyautoattack",
        "sklearn",
        "pydantic",
        "numpy",
    }


def test_tab_completion_completes_options(launch):
    done = launch("-sc", "query=bash", COMP_LINE="python launch.py trainer=rl", COMP_POINT="27")
    assert {"trainer=rl", "trainer=rl_adv"} <= set(done.stdout.split())


WRONG_LINES = [
    (["dataset=nope"], r"dataset=nope: no such option; known: cifar10, .*, npz"),
    (["trainer=r"], r"trainer=r: no such option; did you mean rl\? known: .*"),
    (["attack=[pgd,xyz]"], r"attack=xyz: no such option; known: apgd_ce, .*, fgsm, .*"),
    (["trainer.batchsize=3"], r"trainer.batchsize: no such key; did you mean batch_size\? known: .*"),
    (["trainer.adversary.weight=2"], r"trainer.adversary.weight: no such key; trainer.adversary is null here"),
    (["+trainer.new=1"], r"trainer.new=1: no such key; known: .*"),
    (["+new=1"], r"new=1: no such key; known: .*"),
    (["+attack.pgd.step=1"], r"attack.pgd.step=1: no such key; did you mean steps\? known: .*"),
    (["+model.net.depth=1"], r"model.net.depth=1: no such key; known: hidden"),
    (["+trainer.act.exploration=.1"], r"trainer.act.exploration=0.1: no such key; known: none"),
    (["seed"], r"seed: is not an override; expected key=value.*"),
    (["trainer=sl,rl"], r"trainer=sl,rl: several values; -m runs each of them.*"),
    (["trainer.epochs=many"], r"trainer.epochs=many: should be a valid integer.*"),
    (["trainer.epochs=0"], r"trainer.epochs=0: should be greater than or equal to 1"),
    (["trainer.batch_size=0"], r"trainer.batch_size=0: should be greater than or equal to 1"),
    (["eps=-1"], r"eps=-1: should be greater than or equal to 0.*"),
    (["eps=big"], r"eps=big: should be a valid number.*"),
    (["eps=8/0"], r"eps=8/0: divides by zero.*"),
    (["norm=L1"], r"norm=L1: should be 'L2' or 'Linf'.*"),
    (["dataset.train_samples=9999"], r"dataset.train_samples=9999: the training split has 1293 images"),
    (["evaluation.policy=greedy"], r"evaluation.policy=greedy: should be 'argmax' or 'sample'"),
    (["seed=-1"], r"seed=-1: should be greater than or equal to 0"),
    (["trainer=rl", "trainer.act.exploration=1.5"], r"trainer.act.exploration=1.5: should be .* equal to 1"),
    (["trainer.optimizer.lr=-1"], r"trainer.optimizer: Invalid learning rate: -1.*"),
    (["trainer.optimizer._target_=torch.optim.Adamm"], r"trainer.optimizer._target_=.*Adamm: cannot be .*"),
    (["trainer.schedule.warmup=2"], r"trainer.schedule.warmup=2: should be less than or equal to 1"),
    (["trainer.clip=0"], r"trainer.clip=0: should be greater than 0"),
    (["trainer.select=val_adversarial_accuracy"], r"trainer.select=val_adversarial_accuracy: needs a .*"),
    (["attack.autoattack.version=custom"], r"attack.autoattack.attacks=None with version=custom: name one .*"),
    (
        ["attack=pgd", "attack.pgd.restarts=2", "attack.pgd.random_start=false"],
        r"attack.pgd.restarts=2: repeats one run.*",
    ),
    (["attack.pgd.steps=2.5"], r"attack.pgd.steps=2.5: should be a valid integer.*"),
    (["hardware=tpu"], r"hardware=tpu: no such option; did you mean cpu\? known: auto, cpu, cuda, ddp"),
    (["hardware.precision=fp16"], r"hardware.precision=fp16: should be 'fp32' or 'bf16'"),
    (["logger.mode=maybe"], r"logger.mode=maybe: should be 'auto', 'online', 'offline' or 'disabled'"),
    (["trainer=none"], r"checkpoint=null: trainer=none needs a model to judge.*"),
    (["trainer=none", "checkpoint=nowhere"], r"checkpoint=nowhere: no such file or folder.*"),
    (["trainer=none", "checkpoint=damaged.pt"], r"checkpoint=damaged.pt: damaged or not a PyTorch file.*"),
    (["model=foreign", "trainer=none", "checkpoint=own"], r"model.mean: must be given, what the network was .*"),
    (["analysis=compare"], r"analysis.compare.runs: must be given, the run folders to compare with, .*"),
    (["analysis=compare", "analysis.compare.runs=[x]"], r"analysis.compare.runs.0=x: must be a run folder; .*"),
    (["attack=transfer"], r"attack.transfer.sources: must be given, .*"),
    (["attack=transfer", "attack.transfer.sources=[]"], r"attack.transfer.sources=\[\]: name one run .*"),
    (["analysis=transfer_matrix"], r"analysis.transfer_matrix.runs: must be given, .*"),
    (["dataset=huggingface"], r"dataset.path: must be given.*"),
    (["dataset=npz", "dataset.path=nowhere.npz"], r"dataset.path=nowhere.npz: .*"),
    (["dataset=npz", "dataset.path=tiny.npz"], r"model=alicnn: 4x4 images are too small .*"),
    (["evaluation.samples=0"], r"evaluation.samples=0: should be greater than or equal to 1"),
    (["--trainer=rl"], r"unrecognized arguments: --trainer=rl; an override is key=value, without dashes .*"),
    (["trainer=null"], r"a group takes the name of an option, or a list of names .*"),
    (["trainer=[sl,rl]"], r"dataset, trainer: each takes one option, not a list; -m trainer=sl,rl runs .*"),
    (["model=[alicnn,cnn]"], r"model: takes one option, not a list; -m model=A,B runs each of several.*"),
    (["-m", "trainer="], r"trainer=: no such option; known: none, .*"),
    (["-m", "multirun_sweeps=nope"], r"multirun_sweeps=nope: no such option; known: .*"),
    (["attack=[pgd"], r"attack=\[pgd: is not an override; expected key=value, in quotes if it has .*"),
    (["~trainer"], r"dataset, trainer: each takes one option, .*trainer=none trains nothing"),
    (["~dataset.source"], r"dataset.source: missing; .* not deleted"),
    (["recipe=nope"], r"recipe=nope: no such option; known: .*digits_sl.*"),
    (["hydra.run.dir=zz"], r"hydra.run.dir=zz: has no effect here; .*"),
    (["-m", "seed="], r"seed=: should be a valid integer.* \(job 0 of 1: seed=\)"),
    (["eps=1", "-m", "seed=0,-1"], r"seed=-1: should be .* equal to 0 \(job 1 of 2: eps=1 seed=-1\)"),
    (["-m", "attack=pgd", "attack.pgd.steps=5,-1"], r"attack.pgd.steps=-1: should be .* \(job 1 of 2: .*"),
    (["-m", "seed=glob(x)"], r"seed=glob\(x\): means no job at all; .*"),
    (["norm=Linf", "eps=8"], r"eps=8.0: pixels are in \[0, 1\].*; 8/255\?"),
    (["model.mean=[nan]"], r"model.mean.0=nan: must be finite"),
    (["trainer.optimizer.lr='inf'"], r"trainer.optimizer.lr=inf: must be finite"),
    (["dataset.split_seed=5000000000"], r"dataset.split_seed=5000000000: should be less than 4294967296"),
    ([f"seed={'9' * 5000}"], r"seed=9+\.\.\.: a number of 5000 digits; .*"),
    ([f"+{'k' * 100_000}=1"], r"\+k+\.\.\.=1: no such key; .*"),
    ([f"name={'n' * 256}"], r"name=n+\.\.\.: must be .* 255 bytes"),
    ([f"name={'n/' * 2000}n"], r"name=n/.*\.\.\.: the run folder's path would be longer than .*"),
    (["name=-x"], r"name=-x: must be the name of a folder; .*"),
    (["name='a\tb'"], r"name=a b: has a control character, .*"),
    (["logger.project=a/b"], r"logger.project=a/b: .*"),
    (["checkpoint=runs/a=b,c"], r"checkpoint=runs/a=b,c: needs quotes .*: \"checkpoint='runs/a=b,c'\""),
    (["dataset=npz", "dataset.path=~/nowhere.npz"], r"dataset.path=.*/home/nowhere.npz: no such file"),
    (["model=réseau"], r"model=réseau: needs quotes around .*"),
    (["checkpoint=[a,b]", "trainer=none"], r"checkpoint=\['a', 'b'\]: should be a valid string"),
    (["name="], r"name=: must be the name of a folder below runs_dir"),
    (["name=../x"], r"name=../x: must be the name of a folder below runs_dir"),
    (["dataset.name="], r"dataset.name=: must be the name of a folder below runs_dir"),
    (["runs_dir="], r"runs_dir=: .* at least 1 character"),
    (["runs_dir=file"], r"cannot write file/.*: Not a directory.*"),
    (["runs_dir=/proc/x"], r"cannot write /proc/x/digits/alicnn/sl/default/seed0: No such file or directory"),
    (["-m", "runs_dir=file", "seed=0,1"], r"cannot write .*/file/multirun/seed=0,1/jobs: Not a directory"),
    (["data_dir=file"], r"data_dir=file: cannot hold the prepared data of digits .*"),
    (["hardware.threads=0"], r"hardware.threads=0: should be greater than or equal to 1"),
    (["hardware.threads=100000"], r"hardware.threads=100000: should be less than or equal to 1024"),
    (["evaluation.samples=361"], r"evaluation.samples=361: the test split has 360 images"),
    (["dataset=npz", "dataset.path=file"], r"dataset.path=file: is not an .npz file, .*"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "line"),
    # A process for each: by default for every third of them.
    [pytest.param(*case, marks=[pytest.mark.slow] if number % 3 else []) for number, case in enumerate(WRONG_LINES)],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_told_in_one_line_and_leaves_nothing_behind(launch, tmp_path, words, line):
    here = tmp_path / "here"
    here.mkdir()
    (here / "damaged.pt").write_bytes(b"PK\x03\x04 not really")
    (here / "file").write_text("in the way")
    rng = np.random.default_rng(0)
    images = {f"X_{part}": rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8) for part in ("train", "test")}
    np.savez(here / "tiny.npz", **images, y_train=np.arange(40) % 2, y_test=np.arange(40) % 2)
    before = {path.name for path in here.iterdir()}
    done = launch(*words, cwd=here)
    assert done.returncode != 0
    lines = [text for text in done.stderr.splitlines() if not text.startswith("preparing ")]
    assert len(lines) == 1, done.stderr
    assert re.fullmatch(f"error: {line}", lines[0]), lines[0]
    assert done.stdout.strip() == ""
    assert {path.name for path in here.iterdir()} == before


def test_cuda_without_a_gpu_is_refused(launch, tmp_path):
    done = launch("hardware=cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.startswith("error: hardware.device=cuda: PyTorch sees no GPU here")
    assert not (tmp_path / "runs").exists()


def test_eight_over_255_is_the_number(launch):
    text = launch("eps=8/255", "norm=Linf", "--cfg", "job", "--resolve").stdout
    assert yaml.safe_load(text)["attack"]["pgd"]["eps"] == "8/255"  # as typed, until aerl reads it
    from omegaconf import OmegaConf

    from aerl.config.compose import read

    config = read(OmegaConf.create(text))
    assert config.eps == pytest.approx(8 / 255)
    assert config.attack["pgd"]["eps"] == pytest.approx(8 / 255)


def test_every_option_of_every_group_composes_and_passes_the_schema():
    """In one process: composes each option, checks it, and binds every target to its signature."""
    from hydra import compose, initialize_config_dir

    from aerl.build import attack, build_metrics, build_recipe
    from aerl.config.compose import read
    from aerl.config.targets import bind

    required = {
        "huggingface": ["dataset.path=x"],
        "npz": ["dataset.path=x"],
        "foreign": ["model.mean=[0]", "model.std=[1]", "model.net._target_=torchvision.models.resnet18"],
        "compare": ["analysis.compare.runs=[]"],
        "transfer": ["attack.transfer.sources=[x]"],
        "transfer_matrix": ["analysis.transfer_matrix.runs=[x]"],
    }
    checked = 0
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
            for option in sorted(path.stem for path in folder.glob("*.yaml")):
                if folder.name == "recipe":
                    datasets = (path.stem for path in (CONF / "dataset").glob("*.yaml"))
                    dataset = max((name for name in datasets if option.startswith(f"{name}_")), key=len)
                    words = [f"dataset={dataset}", f"trainer={option.removeprefix(f'{dataset}_')}"]
                else:
                    words = [f"{folder.name}={option}", *required.get(option, [])]
                config = read(compose("config", overrides=words))
                build_recipe(config)
                build_metrics(config)
                for name, spec in config.attack.items():
                    attack(spec, f"attack.{name}", given={"load": None, "store": None})
                for name, spec in config.analysis.items():
                    bind(spec, f"analysis.{name}", given={"load": None, "store": None}, later=["context"])
                bind(config.dataset.source, "dataset.source", given={"data_dir": Path()})
                sizes = {"num_classes": 10, "channels": 3, "size": (32, 32)}
                bind(config.model.net, "model.net", given=sizes)
                assert config.attack == {} or option != "none" or folder.name != "attack"
                checked += 1
    assert checked == len(list(CONF.glob("*/*.yaml")))


def test_recipes_are_named_after_options_that_exist():
    datasets, trainers = ({path.stem for path in (CONF / group).glob("*.yaml")} for group in ("dataset", "trainer"))
    for path in (CONF / "recipe").glob("*.yaml"):
        assert any(path.stem == f"{dataset}_{trainer}" for dataset in datasets for trainer in trainers), path.name


def test_every_job_of_every_sweep_composes(launch, tmp_path):
    """Each grid is expanded by Hydra's own sweeper; composing a job shows a wrong name or value in it."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from aerl.config.compose import read

    for path in sorted((ROOT / "multirun_sweeps").glob("*.yaml")):
        grid = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
        overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in grid.items()])
        (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        assert len(jobs) > 1
        with initialize_config_dir(str(CONF), version_base="1.3"):
            for job in jobs:
                read(compose("config", overrides=[f"multirun_sweeps={path.stem}", *job]))


def test_a_copy_of_the_repository_works_from_any_folder(launch, tmp_path):
    """AERL_ROOT is launch.py's own folder, wherever it is called from."""
    clone = tmp_path / "clone"
    for name in ("conf", "multirun_sweeps"):
        shutil.copytree(ROOT / name, clone / name)
    shutil.copy(ROOT / "launch.py", clone)
    (clone / "multirun_sweeps/mine.yaml").write_text("# @package _global_\nseed: 7\n")
    command = [sys.executable, str(clone / "launch.py"), "multirun_sweeps=mine", "--cfg", "job"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "AERL_ROOT"}
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["seed"] == 7


# ------------------------------------------------------------------- every key of the schema, given nonsense

WRONG = [
    "nan",
    "'inf'",
    "[1]",
    "{a: 1}",
    "''",
    "'a\\tb'",
    "-9e99",
    "true",
    "9" * 400,
    "réseau",
    "'\u202e'",
    "x" * 5000,
]


def wrong_words(count, seed):
    """`count` overrides that cannot be right, drawn from the schema: a value that its key refuses, or no key."""
    import random
    from types import UnionType
    from typing import get_args, get_origin

    from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

    from aerl.config.schema import Config

    def leaves(section, prefix=""):
        for name, field in section.model_fields.items():
            parts = get_args(field.annotation) if isinstance(field.annotation, UnionType) else (field.annotation,)
            inner = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
            if inner:
                yield from leaves(inner[0], f"{prefix}{name}.")
            elif get_origin(field.annotation) is not dict:
                yield f"{prefix}{name}", section, name

    draw, words = random.Random(seed), []
    keys = [leaf for leaf in leaves(Config) if not leaf[0].startswith("trainer.adversary.")]
    while len(words) < count:
        key, section, name = draw.choice(keys)
        value = draw.choice(WRONG)
        if draw.random() < 0.2:
            words.append([f"{draw.choice(['', '+', '++', '~'])}{key}{draw.choice(['x', '.x', '-', '@x'])}={value}"])
            continue
        field = section.model_fields[name]
        try:  # what the key may well be, such as a name of 5,000 letters where any text is right
            annotation = field.annotation if not field.metadata else (field.annotation, *field.metadata)[0]
            hint = TypeAdapter(annotation, config=ConfigDict(coerce_numbers_to_str=True))
            hint.validate_python({"nan": float("nan"), "-9e99": -9e99}.get(value, yaml.safe_load(value)))
        except (ValidationError, UnicodeError):
            words.append([f"{key}={value}"])
    return words


def refusal_in_process(words):
    """The one line that the command line would end with, from the parts that it is made of."""
    from hydra import compose, initialize_config_dir

    from aerl.build import check
    from aerl.config.compose import read
    from aerl.config.errors import explain
    from aerl.config.names import run_name
    from aerl.runtime.terminal import one_line
    from launch import prepared

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = read(compose("config", overrides=prepared(words)))
        run_name(config, words)
        check(config)
    except Exception as error:
        return one_line(explain(error) or f"traceback: {error!r}")
    return "accepted"


def test_nonsense_for_any_key_of_the_schema_is_one_line():
    for words in wrong_words(40, seed=13):
        line = refusal_in_process(words)
        print(words, line)
        assert line != "accepted" and not line.startswith("traceback") and len(line) < 4000, (words, line)


@pytest.mark.slow
def test_two_hundred_wrong_command_lines_are_one_line_each_and_leave_no_folder(launch, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for number, words in enumerate(wrong_words(200, seed=14)):
        line = refusal_in_process(words)
        print(words, line)
        assert line != "accepted" and not line.startswith("traceback"), (words, line)
        if number % 10 == 0:  # for a sample of them, the command line itself
            done = launch(*words, cwd=here)
            assert done.returncode != 0 and len(done.stderr.splitlines()) == 1, done.stderr
            assert done.stderr.startswith("error: ") and list(here.iterdir()) == []


# ------------------------------------------------------------------------------------ terminals and machines


def test_a_run_outlives_its_terminal_and_is_legible_in_any_encoding(launch, tmp_path):
    import json

    words = ["trainer=none", "checkpoint=own", "model.mean=[0]", "model.std=[1]", "attack=none", "analysis=none",
             "logger=none", "runs_dir=runs"]  # fmt: skip
    script = f"{sys.executable} {ROOT / 'launch.py'} {' '.join(words)}"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for number, ending in enumerate((">&- 2>&- <&-", "2>&1 | true", "")):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{script} name=n{number} {ending}"],
            cwd=tmp_path, env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / f"runs/n{number}/summary.json").read_text())
        assert summary["status"] == "finished"
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
    words = ["-m", "model.net._target_=spy.Net", "+model.net.fail=training,nothing,at_all", "trainer.epochs=1",
             "attack=none", "analysis=none", "logger=none", "dataset.train_samples=64"]  # fmt: skip
    done = launch(*words, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 1
    assert re.findall(r"^alive before (.*)$", done.stderr, re.MULTILINE) == [
        "training: 0", "nothing: 0", "at_all: 0",
    ]  # fmt: skip
