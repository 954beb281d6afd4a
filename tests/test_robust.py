"""MART against its formula, weight perturbation against its closed form, and one-step training judged by PGD."""

import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aerl.attacks import pgd
from aerl.training.objectives import Labels, adversarial_training, trades
from aerl.training.robust import WeightPerturbation, mart

SETTINGS = {"act": Labels(), "weight": 3.0, "probability_floor": 0.0}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 1, 4, 4, generator=generator)
    x_adv = (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return x, x_adv, torch.arange(6) % 3


def linear():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_mart_is_its_formula(batch):
    """Wang et al. 2020, equation 11, sample by sample."""
    x, x_adv, y = batch
    model = linear()
    loss, _ = mart(model, x, y, x_adv=x_adv, generator=None, weight=5.0)
    clean, attacked = model(x).softmax(1), model(x_adv).softmax(1)
    expected = []
    for q, p, label in zip(clean, attacked, y, strict=True):
        others = max(p[k] for k in range(3) if k != label)
        boosted = -p[label].log() - (1 - others).log()
        expected.append(boosted + 5 * (q * (q / p).log()).sum() * (1 - q[label]))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    torch.testing.assert_close(
        mart(model, x, y, x_adv=None, generator=None, weight=5.0)[0], F.cross_entropy(model(x), y)
    )


def test_mart_stays_finite_where_a_wrong_class_has_probability_one(batch):
    x, x_adv, y = batch
    model = linear()
    with torch.no_grad():
        model[1].weight *= 1e4
    loss, _ = mart(model, x, y, x_adv=x_adv, generator=None, weight=5.0)
    loss.backward()
    assert loss.isfinite() and model[1].weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["adversarial_training", "trades"])
def test_weight_perturbation_takes_the_gradient_at_the_worse_weights(batch, name):
    """By hand: move the weight, but not the bias, and compute the gradient there."""
    x, x_adv, y = batch
    model, gamma = linear(), 0.3
    objective = WeightPerturbation(**SETTINGS, gamma=gamma, objective=name)
    loss, _ = objective(model, x, y, x_adv=x_adv, generator=torch.Generator())
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    plain = {"adversarial_training": adversarial_training, "trades": partial(trades, weight=3.0)}[name]
    plain = partial(plain, act=Labels(), probability_floor=0.0, x_adv=x_adv, generator=None)
    before, weight = plain(model, x, y)[0], model[1].weight
    (slope,) = torch.autograd.grad(before, weight)
    with torch.no_grad():
        weight += gamma * weight.norm() * slope / slope.norm()
    expected = plain(model, x, y)[0]
    torch.testing.assert_close(loss, expected)
    assert loss > before
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weight_perturbation_leaves_the_weights_and_counts_a_batch_once(batch):
    x, x_adv, y = batch
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    before = {name: value.clone() for name, value in model.named_parameters()}
    loss, _ = WeightPerturbation(**SETTINGS)(model, x, y, x_adv=x_adv, generator=torch.Generator())
    loss.backward()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert model[1].num_batches_tracked == 1 and all(p.grad is not None for p in model.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_weight_perturbation_moves_the_weights_of_a_compiled_model(batch):
    """hardware.compile must not have taken the unmoved weights as constants."""
    x, x_adv, y = batch
    model, perturbation = linear(), WeightPerturbation(**SETTINGS, gamma=0.5)
    plain, compiled = (
        perturbation(each, x, y, x_adv=x_adv, generator=torch.Generator())[0] for each in (model, torch.compile(model))
    )
    unmoved, _ = WeightPerturbation(**SETTINGS, gamma=0.0)(model, x, y, x_adv=x_adv, generator=torch.Generator())
    torch.testing.assert_close(compiled, plain)
    assert plain > unmoved + 0.1


def test_validation_uses_the_judge(hardware):
    from aerl.data import Batches, Split
    from aerl.training.loop import Adversary, validate

    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    model = linear().eval()
    y = model(images / 255).argmax(1)
    weak = partial(pgd, norm="Linf", eps=0.0, steps=1)
    strong = partial(pgd, norm="Linf", eps=1.0, steps=20, drop_fooled=False)
    val = Batches(Split(images, y), 8)
    assert validate(model, val, hardware, Adversary(weak), 0)["adversarial_accuracy"] == 1
    assert validate(model, val, hardware, Adversary(weak, judge=strong), 0)["adversarial_accuracy"] < 0.2
