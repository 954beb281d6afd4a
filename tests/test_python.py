"""aerl from Python: the same numbers as launch.py, nothing left behind, one clear error for bad input."""

import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import aerl
from aerl.build import build_data
from aerl.config.schema import Config
from aerl.data import to_unit
from aerl.errors import UserError
from aerl.tracking.results import read_config
from aerl.verify import verify
from tests.conftest import ROOT
from tests.runs import finish, forge, summary_of

WORDS = ("trainer.epochs=6", "attack=pgd", "analysis=none", "logger=none", "evaluation.samples=60", "name=r",
         "hardware.channels_last=false")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """A run folder of launch.py; no test writes into it."""
    home = tmp_path_factory.mktemp("python")
    finish(home, data_dir, *WORDS)
    return home / "runs/r"


@pytest.fixture(scope="module")
def model(run):
    return aerl.load_model(run)


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    return torch.tensor(found.images[-40:, None] / 16, dtype=torch.float32), torch.tensor(found.target[-40:])


class Words(nn.Module):
    """A model that needs a second argument, and returns a dictionary."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, mode):
        return {"logits": self.net(x), "mode": mode}


def test_importing_aerl_imports_nothing_slow():
    code = "import sys, aerl; print([name for name in ('torch', 'numpy', 'hydra', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert set(aerl.__all__) <= set(dir(aerl)) and all(hasattr(aerl, name) for name in aerl.__all__)


def test_the_numbers_are_those_of_launch(run, model):
    data = build_data(Config.model_validate(read_config(run)))
    stored = np.load(run / "outcomes.npz")
    rows = stored["index"]
    x, y = to_unit(data.test.images[rows]), data.test.labels[rows]
    report = aerl.evaluate(model, x, y, norm="L2", eps=1.0, attacks="pgd", analyses=())
    expected = summary_of(run)["worst_case_accuracy"]
    assert report.worst_case == (expected["value"], expected["low"], expected["high"], 60)
    frame = report.to_frame()
    assert frame["pgd_pred"].tolist() == stored["pgd_pred"].tolist() and len(frame) == 60
    assert "worst case" in str(report) and str(report.attacks["pgd"]).endswith("n=60)")
    found = report.adversarial
    assert (model(torch.from_numpy(found["images"])).argmax(1) != y[found["row"]]).all() and len(found["row"]) > 30


def test_nothing_is_left_behind(model, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, flags = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    x, y = digits
    images = x.clone()
    report = aerl.evaluate(model, x, y, norm="L2", eps=1.0, attacks=["pgd", "noise"], analyses=["pictures", "planted"])
    assert not list(tmp_path.iterdir()) and torch.equal(torch.get_rng_state(), state) and torch.equal(x, images)
    assert [p.requires_grad for p in model.parameters()] == flags and not model.training
    folder = report.folder
    assert (folder / "figures/pictures.png").is_file() and "<iframe" in report._repr_html_()
    del report
    assert not folder.exists()


def test_a_saved_report_is_a_run_folder(model, digits, tmp_path):
    report = aerl.evaluate(model, *digits, norm="L2", eps=1.0, attacks="pgd", analyses=(), name="mine")
    out = report.save(tmp_path / "saved")
    checks = {check.name: check for check in verify(out)}
    assert not any(check.faults for check in checks.values()) and {"files", "accuracies", "report"} <= checks.keys()
    (row,) = aerl.load_runs(tmp_path).to_dict("records")
    assert row["worst_case"] == report.worst_case.value and row["model"] == "mine" and row["n"] == 40
    assert row["pgd_low"] == report.attacks["pgd"].low and row["attack.pgd.steps"] == 100
    assert str(aerl.Report(out)) == str(report)
    with pytest.raises(UserError, match=f"{out}: exists"):
        report.save(out)


def test_datasets_and_loaders_are_tensors(model, digits):
    x, y = digits
    evaluate = partial(aerl.evaluate, model, norm="L2", eps=1.0, attacks="pgd", analyses=())
    expected = evaluate(x, y).to_frame()
    for images in (TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=7)):
        assert evaluate(images).to_frame().equals(expected)
    assert evaluate(x.double().numpy(), y.tolist()).to_frame().equals(expected)


def test_a_model_is_adapted(model, digits):
    words = Words(model).eval()
    adapted = aerl.adapt(words, lambda net, x: net(x, "test")["logits"])
    settings = {"norm": "L2", "eps": 1.0, "attacks": "pgd", "analyses": ()}
    frame = aerl.evaluate(adapted, *digits, **settings).to_frame()
    assert frame.equals(aerl.evaluate(model, *digits, **settings).to_frame())
    with pytest.raises(UserError, match="model: returned a dict, expected logits"):
        aerl.evaluate(aerl.adapt(words, lambda net, x: net(x, "test")), *digits)


def bad(x, y, model):
    class Nan(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] * torch.nan

    shuffled = DataLoader(TensorDataset(x, y), shuffle=True)
    yield (model, x * 2, y), {}, r"images: from 0 to 2; expected \[0, 1\]"
    yield (model, x * torch.nan, y), {}, "images: from nan"
    yield (model, (x * 255).byte(), y), {}, "images: torch.uint8; expected floats"
    yield (model, x[0], y), {}, r"images: shape \(1, 8, 8\); expected a tensor"
    yield (model, x[:0], y[:0]), {}, "images: none"
    yield (model, x, y[:3]), {}, r"labels: shape \(3,\); expected one for each of 40"
    yield (model, x, y + 1), {}, "labels: from 1 to 10; the model has 10 classes"
    yield (model, x, y.float()), {}, "labels: torch.float32"
    yield (model, x), {}, "labels: missing"
    yield (model, TensorDataset(x, y), y), {}, "labels: the TensorDataset has its own"
    yield (model, shuffled), {}, "images: two passes over them differ"
    yield (Nan().eval(), x, y), {}, "model: its logits are NaN"
    yield (nn.Linear(1, 1), x, y), {}, "model: is in training mode"
    yield (torch.nn.Linear(1, 1, device="meta").eval(), x, y), {}, "model: is on the device meta"
    yield (lambda x: x, x, y), {}, "model: a function; expected a torch.nn.Module"
    yield (model, x, y), {"norm": "L3"}, "norm=L3"
    yield (model, x, y), {"eps": 8}, "eps=8: pixels are in .0, 1.; did you mean 8/255"
    yield (model, x, y), {"eps": -1}, "eps=-1"
    yield (model, x, y), {"attacks": "pdg"}, "pdg: no such attack; did you mean pgd"
    yield (model, x, y), {"attacks": [3]}, "attacks: a int"
    yield (model, x, y), {"analyses": "x"}, "x: no such analysis"
    yield (model, x, y), {"class_names": ["a"]}, "class_names: 1 names; the model has 10"
    yield (model, x, y), {"attacks": lambda model, x, y: x + 1}, "attack.lambda: left its Linf ball"


def test_bad_input_is_one_clear_exception(model, digits):
    for given, settings, text in bad(*digits, model):
        with pytest.raises(UserError, match=text) as error:
            aerl.evaluate(*given, **settings)
        assert "\n" not in str(error.value)


def test_attacks_are_called_directly(model, digits):
    x, y = digits
    pgd = partial(aerl.attacks.pgd, eps=0.8, steps=5)
    found = pgd(model, x, y)
    assert torch.equal(found, pgd(model, x, y, generator=0)) and not torch.equal(found, pgd(model, x, y, generator=1))
    assert torch.equal(found, aerl.attacks.PGD(eps=0.8, steps=5)(model, x, y))
    parts = [pgd(model, x[i : i + 7], y[i : i + 7]) for i in range(0, 40, 7)]
    torch.testing.assert_close(found, torch.cat(parts))
    drawn = [pgd(model, x, y, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    official = aerl.attacks.AutoAttack(eps=0.5, attacks=["apgd-ce"])
    others = (aerl.attacks.fmn, partial(aerl.attacks.noise, eps=0.5), aerl.attacks.Adaptive(eps=0.5))
    for attack in (*others, official, aerl.attacks.PaperPGD(eps=0.5)):
        assert attack(model, x[:4], y[:4]).shape == x[:4].shape
        with pytest.raises(UserError, match="images: from"):
            attack(model, x * 3, y)
    with pytest.raises(TypeError, match="epss"):
        aerl.attacks.PGD(epss=1)


def towards_grey(model, images, targets):
    return images + (0.5 - images).clamp(-0.2, 0.2)


def test_a_function_without_a_generator_is_an_attack(model, digits, launch, tmp_path):
    report = aerl.evaluate(model, *digits, eps=0.2, attacks=[towards_grey, "pgd", towards_grey], analyses=())
    assert list(report.attacks) == ["towards_grey", "pgd", "towards_grey_2"]
    assert report.attacks["towards_grey"] == report.attacks["towards_grey_2"]
    (tmp_path / "grey.py").write_text("def grey(net, images, targets, by=0.1):\n    return images.clamp(by, 1 - by)\n")
    (tmp_path / "conf/attack").mkdir(parents=True)
    (tmp_path / "conf/attack/grey.yaml").write_text("# @package attack.grey\n_target_: grey.grey\nby: 0.2\n")
    words = ("attack=grey", "norm=Linf", "eps=0.2", "trainer.epochs=1", "analysis=none", "logger=none", "name=g")
    done = launch("--config-dir", str(tmp_path / "conf"), *words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "grey" in done.stdout, done.stderr


def test_attacks_of_other_libraries(model, digits):
    torchattacks = pytest.importorskip("torchattacks", reason="needs the extra bench")
    foolbox = pytest.importorskip("foolbox", reason="needs the extra bench")
    net = aerl.adapt(model, lambda net, x: net(x))  # torchattacks takes the device of the first parameter
    attacks = [torchattacks.PGD(net, eps=0.1, alpha=0.02), torchattacks.FGSM(net, eps=0.2),
               foolbox.attacks.LinfPGD(steps=10), foolbox.attacks.LinfFastGradientAttack()]  # fmt: skip
    report = aerl.evaluate(model, *digits, eps=0.1, attacks=[*attacks, "pgd"], analyses=())
    assert list(report.attacks) == ["pgd", "fgsm", "linfprojectedgradientdescentattack",
                                    "linffastgradientattack", "pgd_2"]  # fmt: skip
    assert abs(report.attacks["pgd"].value - report.attacks["pgd_2"].value) <= 0.1
    assert not report.summary["attacks"]["fgsm"]["counts"]  # its eps is larger than the run's
    attacks = [torchattacks.PGDL2(net, eps=1.0), foolbox.attacks.L2DeepFoolAttack(), "pgd"]
    two = aerl.evaluate(model, *digits, norm="L2", eps=1.0, analyses=(), attacks=attacks)
    assert all(info["norm"] == "L2" for info in two.summary["attacks"].values())
    assert two.attacks["l2deepfoolattack"].value >= two.worst_case.value


@pytest.mark.parametrize("target", ["torchattacks.PGD", "foolbox.attacks.LinfPGD"])
def test_an_attack_of_another_library_in_yaml(launch, tmp_path, target):
    pytest.importorskip(target.partition(".")[0], reason="needs the extra bench")
    (tmp_path / "conf/attack").mkdir(parents=True)
    eps = "eps: ${eps}\n" if "torchattacks" in target else ""
    text = f"# @package attack.theirs\n_target_: {target}\n{eps}steps: 10\n"
    (tmp_path / "conf/attack/theirs.yaml").write_text(text)
    words = (
        "attack=[theirs,pgd]",
        "norm=Linf",
        "eps=0.1",
        "trainer.epochs=5",
        "analysis=none",
        "logger=none",
        "name=g",
    )
    done = launch("--config-dir", str(tmp_path / "conf"), *words)
    assert done.returncode == 0, done.stderr
    found = summary_of(tmp_path / "runs/g")["attacks"]
    assert found["theirs"]["counts"] and found["theirs"]["robust_accuracy"]["value"] < 0.9


def test_the_minimum_norm_of_adversarial_library(model, digits):
    attacks = pytest.importorskip("adv_lib.attacks", reason="needs adversarial-library")
    ddn = partial(attacks.ddn, steps=40)
    report = aerl.evaluate(model, *digits, norm="L2", eps=1.0, attacks=[ddn, "pgd"], analyses=())
    assert abs(report.attacks["ddn"].value - report.attacks["pgd"].value) <= 0.1
    assert "do not count" in report.summary["attacks"]["ddn"]["warnings"][0]


def test_a_stranger_s_folder_runs_no_code(run, tmp_path):
    """Neither in load_model nor in verify, unless it is trusted."""
    shutil.copytree(run, tmp_path / "r")
    canary = tmp_path / "canary"
    net = {"_target_": "os.mkdir", "path": str(canary)}
    forge(tmp_path / "r/config.yaml", lambda config: config["model"].update(net=net))
    for call, remedy in ((aerl.load_model, "use trust=True"), (lambda path: list(verify(path)), "use --trust")):
        with pytest.raises(UserError, match=f"model.net._target_ is os.mkdir, which is not aerl's; .*{remedy}"):
            call(tmp_path / "r")
    assert not canary.exists()
    with pytest.raises(UserError):
        aerl.load_model(tmp_path / "r", trust=True)
    assert canary.exists()  # the bait is real
