"""The schema, what `bind` accepts and refuses, and the names of runs."""

import pytest

from aerl.config.targets import bind
from aerl.errors import UserError

PGD = {"_target_": "aerl.attacks.pgd", "eps": 0.5}
LATER = {"later": ["model", "x", "y", "generator"]}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"eps": -1}, "attack.pgd.eps=-1: should be greater than or equal to 0"),
        ({"eps": "big"}, "attack.pgd.eps=big: should be a valid number"),
        ({"eps": True}, "attack.pgd.eps=True: must be a number"),
        ({"eps": "1/0"}, "attack.pgd.eps=1/0: divides by zero"),
        ({"eps": "nan"}, "attack.pgd.eps=nan: must be finite"),
        ({"steps": 0}, "attack.pgd.steps=0: should be greater than or equal to 1"),
        ({"steps": 2.5}, "attack.pgd.steps=2.5: should be a valid integer"),
        ({"norm": "l2"}, "attack.pgd.norm=l2: should be 'L1', 'L2' or 'Linf'"),
        ({"step": 3}, "attack.pgd.step=3: no such key; did you mean steps?"),
        ({"model": 3}, "attack.pgd.model=3: no such key"),
        ({"_target_": "aerl.nowhere.f"}, "attack.pgd._target_=aerl.nowhere.f: cannot be imported"),
        ({"_target_": "nonsense"}, "attack.pgd._target_=nonsense: cannot be imported"),
        ({"_target_": "aerl.__version__"}, "attack.pgd._target_=aerl.__version__: .*not a callable"),
        ({"_target_": None}, "attack.pgd._target_=None: cannot be imported"),
    ],
)
def test_wrong_settings(settings, line):
    with pytest.raises(UserError, match=f"^{line}") as error:
        bind(PGD | settings, "attack.pgd", **LATER)
    assert "\n" not in str(error.value)


def test_settings_are_converted_and_bound():
    keywords = bind({**PGD, "eps": "8/255", "steps": "3"}, "attack.pgd", **LATER).keywords
    assert keywords == {"eps": pytest.approx(8 / 255), "steps": 3}
    with pytest.raises(UserError, match=r"^attack\.pgd\.eps: missing; aerl\.attacks\.pgd needs it$"):
        bind({"_target_": "aerl.attacks.pgd"}, "attack.pgd", **LATER)
    sizes = {"num_classes": 3, "channels": 1, "size": (8, 8), "unknown": 1}
    net = bind({"_target_": "aerl.models.AliCNN", "hidden": 8}, "model.net", given=sizes)
    assert net().fc2.out_features == 3
    assert bind({"_target_": "aerl.training.objectives.Labels"}, "trainer.act", given={"x": 1}).keywords == {}


def test_run_names_distinguish_runs(tmp_path):
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from aerl.config.compose import read
    from aerl.config.names import config_hash, run_folder
    from tests.conftest import ROOT

    def name_and_hash(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = read(compose("config", overrides=list(overrides)))
        return str(run_folder(tmp_path, config, overrides).relative_to(tmp_path)), config_hash(config)

    plain = name_and_hash()
    assert plain[0] == "digits/alicnn/sl/default/seed0"
    assert name_and_hash("logger=none", "runs_dir=x", "data_dir=y", "overwrite=true", "seed=0") == plain
    words = ["trainer=rl", "trainer.epochs=3", "eps=8/255", "attack=[pgd,fgsm]", "seed=4"]
    named = name_and_hash(*words)
    assert named[0] == "digits/alicnn/rl/attack-pgd_fgsm+eps-8_255+trainer.epochs-3/seed4"
    assert name_and_hash(*reversed(words)) == named
    others = [name_and_hash(word)[1] for word in ("seed=1", "hardware=cpu", "evaluation.batch_size=3")]
    assert len({plain[1], named[1], *others}) == 5
    # It can be pasted into any override, and a folder of an early version is found.
    parsed = OverridesParser.create().parse_overrides([f"a=[{named[0]},{named[0]}]", f"b={named[0]}"])
    assert [override.value() for override in parsed] == [[named[0]] * 2, named[0]]
    early = "digits/alicnn/rl/attack=_pgd,fgsm_,eps=8_255,trainer.epochs=3/seed4"
    (tmp_path / early).mkdir(parents=True)
    assert name_and_hash(*words)[0] == early
    (tmp_path / named[0]).mkdir(parents=True)
    assert name_and_hash(*words) == named
    long = name_and_hash(*[f"+attack.pgd.key{i}=1" for i in range(40)])[0]
    assert len(long.split("/")[3]) <= 120
