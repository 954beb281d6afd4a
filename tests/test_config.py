"""The schema by itself: what bind accepts, refuses, and says."""

import pytest

from aerl.config.targets import bind
from aerl.types import UserError


def refusal(spec, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        bind(spec, "attack.pgd", **kwargs)
    line = str(error.value)
    assert "\n" not in line
    return line


PGD = {"_target_": "aerl.attacks.pgd", "eps": 0.5}
LATER = {"later": ["model", "x", "y", "generator"]}


def test_values_are_checked_against_the_signature():
    assert bind({**PGD, "eps": "8/255"}, "attack.pgd", **LATER).keywords["eps"] == pytest.approx(8 / 255)
    assert bind({**PGD, "steps": "3"}, "attack.pgd", **LATER).keywords["steps"] == 3
    assert refusal({**PGD, "eps": -1}, **LATER).startswith("attack.pgd.eps=-1: should be greater than or equal to 0")
    assert refusal({**PGD, "eps": "big"}, **LATER).startswith("attack.pgd.eps=big: should be a valid number")
    assert refusal({**PGD, "eps": True}, **LATER).startswith("attack.pgd.eps=True: must be a number")
    assert refusal({**PGD, "eps": "1/0"}, **LATER).startswith("attack.pgd.eps=1/0: divides by zero")
    assert refusal({**PGD, "eps": "nan"}, **LATER).startswith("attack.pgd.eps=nan: must be finite")
    assert refusal({**PGD, "steps": 0}, **LATER).startswith("attack.pgd.steps=0: should be greater than or equal to 1")
    assert refusal({**PGD, "steps": 2.5}, **LATER).startswith("attack.pgd.steps=2.5: should be a valid integer")
    assert "'L2' or 'Linf'" in refusal({**PGD, "norm": "l2"}, **LATER)


def test_keys_are_checked_against_the_signature():
    line = refusal({**PGD, "step": 3}, **LATER)
    assert line.startswith("attack.pgd.step=3: no such key; did you mean steps?")
    assert refusal({**PGD, "model": 3}, **LATER).startswith("attack.pgd.model=3: no such key")
    assert refusal({"_target_": "aerl.attacks.pgd"}, **LATER) == "attack.pgd.eps: missing; aerl.attacks.pgd needs it"


def test_a_target_that_is_not_there_or_not_callable():
    assert "cannot be imported" in refusal({"_target_": "aerl.nowhere.f"})
    assert "cannot be imported" in refusal({"_target_": "nonsense"})
    assert "not a function or class" in refusal({"_target_": "aerl.__version__"})


def test_given_values_are_bound_where_the_signature_takes_them():
    net = bind(
        {"_target_": "aerl.models.AliCNN", "hidden": 8},
        "model.net",
        given={"num_classes": 3, "channels": 1, "size": (8, 8), "unknown": 1},
    )
    assert net().fc2.out_features == 3
    assert bind({"_target_": "aerl.training.objectives.Labels"}, "trainer.act", given={"x": 1}).keywords == {}


def test_run_names_tell_runs_apart_and_nothing_else():
    from hydra import compose, initialize_config_dir

    from aerl.config.compose import read
    from aerl.config.names import config_hash, run_name
    from tests.conftest import ROOT

    def name_and_hash(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = read(compose("config", overrides=list(overrides)))
        return run_name(config, overrides), config_hash(config)

    plain = name_and_hash()
    assert plain[0] == "digits/alicnn/sl/default/seed0"
    assert name_and_hash("logger=none", "runs_dir=x", "data_dir=y", "overwrite=true", "seed=0") == plain
    assert name_and_hash("evaluation.batch_size=3")[1] != plain[1]  # a model that draws at random draws otherwise
    named = name_and_hash("trainer=rl", "trainer.epochs=3", "eps=8/255", "attack=[pgd,fgsm]", "seed=4")
    assert named[0] == "digits/alicnn/rl/attack=_pgd,fgsm_,eps=8_255,trainer.epochs=3/seed4"
    swapped = name_and_hash("attack=[pgd,fgsm]", "seed=4", "eps=8/255", "trainer.epochs=3", "trainer=rl")
    assert swapped == named
    assert len({plain[1], named[1], name_and_hash("seed=1")[1], name_and_hash("hardware=cpu")[1]}) == 4
    long = name_and_hash(*[f"+attack.pgd.key{i}=1" for i in range(40)])[0]
    assert len(long.split("/")[3]) <= 120
