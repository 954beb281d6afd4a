"""AutoAttack on a small network trained on real digits."""

import logging
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from aerl.attacks import AutoAttack, NoGradient, SampleGenerator, collect_warnings, pgd
from aerl.attacks.autoattack import _drop_fooled
from aerl.types import UserError

STANDARD = ["apgd-ce", "apgd-t", "fab-t", "square"]


def train(classes, epochs, unseen=0):
    """A model in eval mode trained on the first `classes` digits, with those images (N, 1, 8, 8) and labels;
    or, if some are to be `unseen`, with these instead."""
    digits = load_digits(n_class=classes)
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    seen = len(x) - unseen
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, classes),
        )
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(epochs):
            for batch in torch.randperm(seen).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        optimizer.zero_grad()
    return (model.eval(), x[seen:], y[seen:]) if unseen else (model.eval(), x, y)


@pytest.fixture(scope="module")
def digits():
    return train(classes=10, epochs=8)


@pytest.fixture(scope="module")
def four_digits():
    return train(classes=4, epochs=3)


@pytest.fixture
def short(monkeypatch):
    """A tenth of the library's iterations, to save time; also where the library is called directly."""
    from pyautoattack.autopgd_base import APGDAttack
    from pyautoattack.fab_base import FABAttack
    from pyautoattack.square import SquareAttack

    def shortened(kind, **settings):
        original = kind.attack_single_run

        def attack_single_run(self, *args, **kwargs):
            vars(self).update(settings)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "attack_single_run", attack_single_run)

    shortened(APGDAttack, n_iter=20)
    shortened(FABAttack, n_iter=10)
    shortened(SquareAttack, n_queries=200)


@torch.no_grad()
def wrong(model, x, y):
    return model(x).argmax(1) != y


def attack(model, x, y, **settings):
    return AutoAttack(**{"eps": 0.5} | settings)(model, x, y, generator=SampleGenerator.for_images(x, 3))


def sizes(delta, norm):
    return delta.flatten(1).double().norm(2 if norm == "L2" else torch.inf, dim=1)


# --- what it finds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.5), ("Linf", 0.1)])
def test_fools_the_same_samples_as_the_library(digits, short, monkeypatch, norm, eps):
    from pyautoattack import AutoAttack as Library

    model, x, y = digits[0], digits[1][:40], digits[2][:40]
    ours = attack(model, x, y, norm=norm, eps=eps)
    with torch.random.fork_rng([]):
        theirs, _ = Library(model, eps=eps, norm=norm, seed=3).run_standard_evaluation(x, y)
    fooled = wrong(model, ours, y)
    assert 5 < fooled.sum() < 35
    assert torch.equal(fooled, wrong(model, theirs, y))
    with monkeypatch.context() as all_samples_to_the_end:
        all_samples_to_the_end.setattr("aerl.attacks.autoattack._drop_fooled", lambda *args: None)
        torch.testing.assert_close(attack(model, x, y, norm=norm, eps=eps), theirs)
    assert (sizes(ours - x, norm) <= eps + 1e-6).all()
    assert ours.min() >= 0 and ours.max() <= 1
    # PGD is not far behind, and does not find what AutoAttack cannot.
    ours = pgd(model, x, y, generator=SampleGenerator.for_images(x, 3), norm=norm, eps=eps, restarts=2)
    assert abs(int(wrong(model, ours, y).sum()) - int(fooled.sum())) <= 1


@pytest.mark.parametrize("name", ["apgd", "apgd_targeted"])
@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.8), ("Linf", 0.12)])
def test_apgd_drops_fooled_samples(digits, norm, eps, name):
    from pyautoattack import AutoAttack as Library

    net, x, y = digits[0], digits[1][:40], digits[2][:40]
    asked = []

    def model(images):
        asked.append(len(images))
        return net(images)

    def run(dropping):
        apgd = getattr(Library(model, eps=eps, norm=norm, seed=0), name)
        if dropping:
            _drop_fooled(apgd, 10)
        asked.clear()
        apgd.init_hyperparam(x)
        apgd.y_target = (y + 1) % 10
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            best, resists, _, found = apgd.attack_single_run(x, y)
        assert apgd.model is model
        return best, resists, found, sum(asked)

    best, resists, _, all_passes = run(dropping=False)
    same_best, same, first_found, passes = run(dropping=True)
    assert 3 < resists.sum() < 35 and all_passes == 101 * 40
    assert torch.equal(same, resists)
    torch.testing.assert_close(same_best[resists], best[resists])
    assert torch.equal(wrong(net, first_found, y), ~resists)
    assert (sizes(first_found - x, norm) <= eps + 1e-6).all()
    assert passes < 0.9 * all_passes


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(short, classes, version):
    model, x, y = train(classes, epochs=3)
    x, y = x[:12], y[:12]
    with collect_warnings() as messages:
        adversarial = attack(model, x, y, eps=1.0, version=version)
    assert 0 < wrong(model, adversarial, y).sum() < 12  # some are left for the last component
    ran = {
        (2, "standard"): "apgd-ce, fab-t, square",
        (3, "standard"): "apgd-ce, apgd-dlr, fab-t, square",
        (2, "plus"): "apgd-ce, fab, square, fab-t",
        (3, "plus"): "apgd-ce, apgd-dlr, fab, square, fab-t",
        (2, "rand"): "apgd-ce",
    }.get((classes, version))
    omitted = [message for message in messages if "instead of" in message]
    assert (omitted == []) if ran is None else (len(omitted) == 1 and f"ran {ran} instead" in omitted[0])
    assert not any("not possible" in message for message in messages)


@pytest.mark.parametrize(
    ("norm", "eps", "attacks"),
    [("L2", 0.8, None), ("Linf", 0.15, None), ("Linf", 0.15, ["square", "fab-t", "apgd-t"])],
)
def test_stages_fool_the_same_samples_as_the_library(four_digits, short, norm, eps, attacks):
    """Each stage sees the survivors of the ones before, batched anew across the batches they were in."""
    from pyautoattack import AutoAttack as Library

    model, x, y = four_digits[0], four_digits[1][:64], four_digits[2][:64]
    y = torch.where(torch.arange(64) % 21 == 0, (y + 1) % 4, y)  # some are wrong to begin with
    ensemble = AutoAttack(norm=norm, eps=eps, attacks=attacks, batch_size=12)
    stages = ensemble.stages(model, x[:0])
    assert [stage.attacks for stage in stages] == [[name] for name in attacks or STANDARD]
    robust, left = ~wrong(model, x, y), []
    for stage in stages:
        for index in robust.nonzero().squeeze(1).split(stage.batch_size):
            generator = SampleGenerator.for_images(x[index], 3)
            found = stage(model, x[index], y[index], generator=generator)
            robust[index] = ~wrong(model, found, y[index])
        left.append(int(robust.sum()))
    assert 60 > left[0] >= left[-1] > 12  # every stage had several batches
    assert left[0] > left[-1] or attacks is None

    with torch.random.fork_rng([]):
        library = Library(model, eps=eps, norm=norm, seed=3)
        library.attacks_to_run = attacks or STANDARD
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = 3
        theirs, _ = library.run_standard_evaluation(x, y, batch_size=12)
    assert torch.equal(robust, ~wrong(model, theirs, y))


def test_part_of_a_version_keeps_its_settings(digits, monkeypatch):
    from pyautoattack import AutoAttack as Library

    seen = []

    def look(library, x, y, **_):
        seen.append((library.attacks_to_run, library.apgd.n_restarts, library.apgd.eot_iter))
        seen.append((library.fab.n_restarts, library.square.n_queries, library.apgd_targeted.n_target_classes))
        return x, y

    monkeypatch.setattr(Library, "run_standard_evaluation", look)
    model, x, y = digits[0], digits[1][:2], digits[2][:2]
    attack(model, x, y, attacks=["square", "apgd-ce"], queries=70)
    attack(model, x, y, version="rand", attacks=["apgd-ce"])
    attack(model, x, y, version="custom", attacks=["fab"])
    assert seen == [
        (["square", "apgd-ce"], 1, 1), (1, 70, 9),
        (["apgd-ce"], 1, 20), (5, 5000, 9),
        (["fab"], 5, 1), (5, 5000, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("forward", [lambda z: z.detach(), lambda z: z.detach() + torch.zeros(1).requires_grad_()])
def test_square_alone_attacks_a_model_without_gradients(digits, short, forward):
    model, x, y = Through(digits[0], forward), digits[1][:20], digits[2][:20]
    for component in ("apgd-ce", "apgd-t", "fab", "fab-t"):
        with pytest.raises(NoGradient, match="do not depend differentiably"):
            attack(model, x, y, attacks=[component])
    with pytest.raises(NoGradient):
        attack(model, x, y)
    assert len(attack(model, x[:0], y[:0])) == 0  # what checks the settings does not forbid the model
    expected = attack(digits[0], x, y, eps=1.0, attacks=["square"])
    assert wrong(model, expected, y).any()
    assert torch.equal(attack(model, x, y, eps=1.0, attacks=["square"]), expected)


def test_tiny_images_do_without_square_in_l2(digits, short):
    model = nn.Sequential(nn.Upsample(8), digits[0])
    x, y = digits[1][:4, :, 2:6, 2:6], digits[2][:4]
    with collect_warnings() as messages:
        attack(model, x, y, version="custom", attacks=["apgd-ce", "square"])
    assert "ran apgd-ce instead of apgd-ce, square, given 10 classes and 4x4 pixels" in messages[0]


def square(height, width, norm, queries=3):
    """What Square finds for two images of this size on a model that weighs pixels at random."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, height, width, generator=generator)
    weight = torch.randn(height * width, 3, generator=generator)
    model = Through(nn.Flatten(), lambda flat: flat @ weight)
    found = attack(
        model, x, wrong(model, x, -1) * 0 + model(x).argmax(1), norm=norm, attacks=["square"], queries=queries
    )
    assert (sizes(found - x, norm) <= 0.5 + 1e-6).all()
    return x, found, model


# Of those sides the first tiles fit, of these they reach beyond the image, or there are none at all.
SIDES = [*((5, 5), (8, 13), (28, 32)), *((12, 12), (14, 9), (18, 30), (19, 60), (24, 24), (32, 48), (60, 5))]


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_square_runs_at_every_size(norm):
    for size in SIDES:
        square(*size, norm)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_square_runs_at_every_size_there_is(norm):
    for height in range(5, 65):
        for width in range(5, 65):
            square(height, width, norm)


def test_squares_tiles_are_cut_at_the_border():
    from pyautoattack.square import SquareAttack

    from aerl.attacks.autoattack import _Tile

    x = torch.full((1, 1, 12, 12), 0.5)
    library = SquareAttack(lambda images: torch.tensor([[0.0, 1.0]]), norm="L2", eps=0.5, n_queries=1)
    shape = library.eta
    library.eta = lambda side: shape(side).as_subclass(_Tile)
    library.init_hyperparam(x)
    with torch.random.fork_rng([]):
        _, found = library.attack_single_run(x, torch.tensor([0]))
    assert type(found) is torch.Tensor and (found != x).sum() == 11 * 11


def test_zero_eps_an_empty_batch_and_one_sample(digits, short):
    model, x, y = digits
    settings = {"version": "custom", "attacks": ["apgd-ce"]}
    assert torch.equal(attack(model, x[:4], y[:4], eps=0, **settings), x[:4])
    assert attack(model, x[:0], y[:0], **settings).shape == (0, 1, 8, 8)
    assert attack(model, x[:1], y[:1], **settings).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("attacks", [["apgd-ce"], ["fab-t"], ["square"]])
def test_any_layout_and_dtype(digits, short, attacks):
    model, x, y = digits[0], digits[1][:10], digits[2][:10]
    model = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), model).eval()
    nn.init.constant_(model[0].weight, 0.5)
    x = x.expand(-1, 2, -1, -1).contiguous()
    settings = {"version": "custom", "attacks": attacks}
    expected = attack(model, x, y, **settings)
    last = x.to(memory_format=torch.channels_last)
    result = attack(model, last, y, **settings)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)
    result = attack(model.double(), x.double(), y, **settings)
    model.float()
    assert result.dtype == torch.float64
    assert (sizes(result - x, "L2") <= 0.5 + 1e-6).all()


# --- the world around it ----------------------------------------------------------------------------


def test_leaves_no_trace(digits, short, capfd, caplog):
    model, x, y = digits[0], digits[1][:10], digits[2][:10]
    model.train()
    model[0].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)

    def tracer(frame, event, argument):
        return None

    def process():
        logger = logging.getLogger("auto-attack")
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [None if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
            (logger.level, logger.propagate, list(logger.handlers)),
        )

    caplog.set_level(logging.DEBUG)
    before, old = process(), sys.gettrace()
    sys.settrace(tracer)
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            attack(model, x, y, version="custom", attacks=["apgd-ce", "fab-t"])
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(old)
    assert process() == before
    assert capfd.readouterr() == ("", "") and caplog.records == []
    model.eval().zero_grad()
    model[0].bias.requires_grad_(True)


class Through(nn.Module):
    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x):
        return self.change(self.inner(x))


def through_gradients(z):
    def grad():
        return z

    return grad()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda z: z.softmax(1), "probability distribution"),
        (lambda z: z + torch.randn_like(z), "randomized defense"),
        (lambda z: (z * 1e4).round() + 0 * z, "points with zero gradient"),
        (through_gradients, "dynamic defense"),
        (lambda z: z, None),
    ],
)
def test_its_doubts_are_warnings(digits, short, caplog, change, expected):
    model, x, y = Through(digits[0], change), digits[1][:20], digits[2][:20]
    settings = {"version": "custom", "attacks": ["apgd-dlr"], "batch_size": 5}
    with collect_warnings() as messages:
        for part in (slice(0, 10), slice(10, 20)):
            attack(model, x[part], y[part], **settings)
    assert [message for message in messages if expected and expected in message] == messages
    assert len(messages) == (expected is not None)
    assert [record.getMessage() for record in caplog.records] == messages
    assert {record.name for record in caplog.records} <= {"aerl.attacks"}


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"attacks": []}, {"version": "custom"}, {"attacks": ["apgd"]}])
def test_wrong_components_are_refused(settings):
    with pytest.raises(UserError, match=r"^attacks=.*apgd-ce"):
        AutoAttack(eps=0.5, **settings)


def test_what_cannot_be_attacked_is_refused(digits):
    model, x, y = train(classes=2, epochs=0)
    with pytest.raises(UserError, match="attacks=apgd-dlr: none of them can attack 2 classes"):
        attack(model, x[:0], y[:0], version="custom", attacks=["apgd-dlr"])
    for settings in ({}, {"attacks": ["square"]}):
        with pytest.raises(UserError, match="2 classes or more"):
            attack(Through(digits[0], lambda z: z[:, :1]), x[:4], y[:4], **settings)


def test_images_outside_the_threat_model_count_as_not_found(digits, monkeypatch):
    from pyautoattack import AutoAttack as Library

    model, x, y = digits[0], digits[1][:4], digits[2][:4]
    found = x.clone()
    found[0], found[1, 0, 0, 0], found[2] = torch.nan, 1.5, (x[2] + 0.01).clamp(0, 1)
    monkeypatch.setattr(Library, "run_standard_evaluation", lambda *_, **__: (found, y))
    with collect_warnings() as messages:
        result = attack(model, x, y)
    assert torch.equal(result[[0, 1, 3]], x[[0, 1, 3]]) and torch.equal(result[2], found[2])
    assert len(messages) == 1 and "outside the ball" in messages[0]
