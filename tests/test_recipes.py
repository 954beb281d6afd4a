"""Which settings a dataset and a trainer get together."""

import pytest
from hydra import compose, initialize_config_dir

from aerl.config import recipes
from aerl.config.compose import read
from tests.conftest import ROOT
from tests.runs import finish, log_of


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """`trainer(*overrides)` as conf/ and a folder of the user's compose it."""
    mine = tmp_path / "conf/trainer"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("defaults:\n  - sl\n  - _self_\nname: mine\nbatch_size: 48\n")
    (mine / "mine_too.yaml").write_text("defaults:\n  - mine\n  - _self_\nname: mine_too\nclip: 2.0\n")
    (mine / "at.yaml").write_text("defaults:\n  - pgd_at\n  - _self_\nname: at\nbatch_size: 48\n")
    (mine / "alone.yaml").write_text((ROOT / "conf/trainer/sl.yaml").read_text().replace("name: sl", "name: alone"))

    def composed(*words):
        path = f"hydra.searchpath=[file://{ROOT},file://{tmp_path / 'conf'},'recipes://']"
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return read(compose("config", overrides=[path, *words])).trainer

    found = recipes._file
    monkeypatch.setattr(recipes, "_file", lambda name: found(name) or _here(tmp_path / f"conf/{name}.yaml"))
    return composed


def _here(path):
    return path if path.is_file() else None


def settings(trainer):
    return trainer.epochs, trainer.batch_size, trainer.optimizer["lr"]


def test_a_trainer_gets_the_recipe_of_the_one_it_builds_on_but_for_what_it_states(trainer):
    assert settings(trainer("trainer=sl")) == (20, 32, 1e-3)
    assert settings(trainer("trainer=mine")) == (20, 48, 1e-3)
    assert settings(trainer("trainer=mine_too")) == (20, 48, 1e-3) and trainer("trainer=mine_too").clip == 2
    assert settings(trainer("trainer=mine", "trainer.optimizer.lr=1", "trainer.epochs=3")) == (3, 48, 1)
    assert settings(trainer("trainer=mine", "recipe=none")) == (40, 48, 2e-4)
    assert settings(trainer("trainer=alone")) == (40, 256, 2e-4)  # it builds on none
    assert settings(trainer("trainer=mart", "dataset=cifar10_small", "dataset.path=x")) == (8, 64, 1e-3)
    assert settings(trainer("trainer=at", "dataset=cifar10")) == (200, 48, 0.1)  # pgd_at's name ends like it
    assert settings(trainer("trainer=rl")) == (40, 32, 1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pgd_at", (200, 128, 0.1, 5e-4, [100, 150], 10, 2 / 255)),
        ("awp", (200, 128, 0.1, 5e-4, [100, 150], 10, 2 / 255)),
        ("trades", (76, 128, 0.1, 2e-4, [75], 10, 0.226 * 8 / 255)),
        ("mart", (120, 128, 0.01, 3.5e-3, [75, 90, 100], 10, 0.226 * 8 / 255)),
        ("fast_at", (15, 128, 0.2, 5e-4, [], 1, 10 / 255)),
    ],
)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_adversarial_training_has_the_settings_of_its_publication(trainer, dataset, name, expected):
    found = trainer(f"dataset={dataset}", f"trainer={name}", "norm=Linf", "eps=8/255")
    attack, optimizer = found.adversary.attack, found.optimizer
    assert optimizer["_target_"] == "torch.optim.SGD" and optimizer["momentum"] == 0.9 and found.clip is None
    numbers = (found.epochs, found.batch_size, optimizer["lr"], optimizer["weight_decay"], found.schedule.milestones)
    assert (*numbers, attack["steps"]) == expected[:-1] and attack["step_size"] == pytest.approx(expected[-1])
    for epochs in (1, 2, 7):  # any shorter training has a schedule that fits
        short = trainer(f"dataset={dataset}", f"trainer={name}", f"trainer.epochs={epochs}")
        assert all(milestone <= epochs for milestone in short.schedule.milestones)


def test_an_inherited_recipe_is_reported(tmp_path, data_dir):
    words = ("trainer.epochs=1", "attack=none", "analysis=none", "logger=none", "dataset.train_samples=64")
    finish(tmp_path, data_dir, "trainer=trades", *words, "trainer.adversary.attack.steps=1", "name=a")
    line = "recipe: digits_sl, of the trainer that trades builds on; recipe=none leaves it out"
    assert line in log_of(tmp_path / "runs/a")
