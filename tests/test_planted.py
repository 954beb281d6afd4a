"""`analysis=planted`: attacks must find adversarial examples that are known to be there."""

from functools import partial

import pytest
import torch
from torch import nn

from aerl.analyses import AnalysisContext, NotMade
from aerl.analyses.planted import _separate, planted
from aerl.attacks import Adaptive, AttackSpec, AutoAttack, pgd
from aerl.errors import UserError
from aerl.tracking.results import ResultLog
from tests.nets import Through, digits_net, predictions

EPS = 0.5
PGD = partial(pgd, norm="L2", eps=EPS, restarts=2)


@pytest.fixture(scope="module")
def digits():
    net, x, y = digits_net(10, 6, unseen=60)
    return net, (x * 255).round().byte(), y


@pytest.fixture
def plant(digits, hardware, tmp_path):
    """`plant(model, attacks)` -> what the analysis writes into summary.json."""

    def run(model, attacks, norm="L2", **settings):
        _, images, labels = digits
        found = {}
        identity = dict.fromkeys(("run_id", "dataset", "model", "trainer"), "") | {"seed": 0}
        context = AnalysisContext(
            model=model.eval(), images=images, labels=labels, class_names=tuple("0123456789"),
            outcomes={"label": labels.numpy(), "clean_pred": predictions(model, images / 255).numpy()},
            adversarial={}, attacks={}, figures=tmp_path, log=ResultLog(tmp_path, identity), norm=norm,
            eps=EPS if norm == "L2" else 0.1, seed=0, trainer="sl", hardware=hardware, batch_size=25, save=found.update,
            specs={name: AttackSpec.of(attack) for name, attack in attacks.items()},
        )  # fmt: skip
        planted(context, **settings)
        return found["planted"]

    return run


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_an_attack_that_works_finds_them_and_random_points_do_not(digits, plant, norm):
    net, images, _ = digits
    before = net(images / 255)
    found = plant(net, {"pgd": partial(PGD, norm=norm, eps=EPS if norm == "L2" else 0.1)}, norm)
    assert found["found"]["value"] >= 0.95
    assert found["random"]["value"] <= 0.05
    assert found["trusted"] and found["layer"] == "6"
    assert found["found"]["n"] >= 40
    assert torch.equal(net(images / 255), before) and not net[6]._forward_hooks


def quantised(net):
    return nn.Sequential(Through(nn.Identity(), lambda x: (15 * x).round() / 15), *net)


@pytest.mark.parametrize("hide", [quantised, lambda net: Through(net, lambda z: 300 * z)], ids=["quantised", "scaled"])
def test_an_attack_that_fails_misses_them_and_one_that_adapts_finds_them(digits, plant, hide):
    model = hide(digits[0])
    blind = plant(model, {"pgd": partial(PGD, loss="ce")})
    assert blind["found"]["value"] < 0.5 and not blind["trusted"]
    assert plant(model, {"pgd": PGD, "adaptive": Adaptive(eps=EPS)})["found"]["value"] >= 0.9


def test_attacks_that_need_many_classes_run_unchanged(plant, digits):
    found = plant(digits[0], {"a": AutoAttack(norm="L2", eps=EPS, attacks=["apgd-t"])}, samples=20, inner=50)
    assert found["found"]["value"] >= 0.95


class EndsInConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(1, 10, 8)

    def forward(self, x):
        return self.head(x).flatten(1)


class Randomised(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


def test_what_cannot_be_measured_says_why(digits, plant):
    net = digits[0]
    with pytest.raises(NotMade, match="no linear layer"):
        plant(EndsInConvolution(), {"pgd": PGD})
    with pytest.raises(NotMade, match="head"):
        plant(EndsInConvolution(), {"pgd": PGD}, layer="head")
    with pytest.raises(NotMade, match="randomised"):
        plant(Randomised(net), {"pgd": PGD})
    with pytest.raises(NotMade, match="no attack"):
        plant(net, {})
    with pytest.raises(UserError, match=r"layer=fc.* 6"):
        plant(net, {"pgd": PGD}, layer="fc")


@pytest.mark.parametrize("features", [5, 40, 400])
def test_the_head_separates_one_point_and_has_the_lead_that_was_asked_for(features):
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(31, features, generator=generator, dtype=torch.double)
    surface = 6 * torch.randn(8, features, generator=generator, dtype=torch.double)
    weight, bias, place = _separate(inside, surface, 7.5)
    assert float(inside[0] @ weight + bias) == pytest.approx(-7.5)
    assert (inside @ weight + bias).max() < 0 < float(surface[place] @ weight + bias)
