"""AutoAttack on a small network trained on real digits, against the library called directly."""

import logging
import random
import sys

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack as Library
from torch import nn

from aerl.attacks import AutoAttack, NoGradient, collect_warnings, pgd
from aerl.attacks.autoattack import _drop_fooled, _Tile
from aerl.errors import UserError
from tests.nets import Through, digits_net, noise_for, partly_trained, predictions, sizes, state_of, wrong

STANDARD = ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.fixture(scope="module")
def digits():
    return digits_net(classes=10, epochs=8)


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


def attack(model, x, y, **settings):
    return AutoAttack(**{"eps": 0.5} | settings)(model, x, y, generator=noise_for(x, 3))


def official(model, x, y, attacks=STANDARD, targets=9, batch_size=250, **settings):
    with torch.random.fork_rng([]):
        library = Library(model, seed=3, **settings)
        library.attacks_to_run = attacks
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = targets
        return library.run_standard_evaluation(x, y, batch_size=batch_size)[0]


# --- what it finds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("L1", 1.5), ("L2", 0.5), ("Linf", 0.1)])
def test_fools_the_same_samples_as_the_library(digits, short, monkeypatch, norm, eps):
    model, x, y = digits[0], digits[1][:40], digits[2][:40]
    ours = attack(model, x, y, norm=norm, eps=eps)
    theirs = official(model, x, y, norm=norm, eps=eps)
    fooled = wrong(model, ours, y)
    assert 5 < fooled.sum() < 35
    assert torch.equal(fooled, wrong(model, theirs, y))
    with monkeypatch.context() as all_samples_to_the_end:
        all_samples_to_the_end.setattr("aerl.attacks.autoattack._drop_fooled", lambda *args: None)
        torch.testing.assert_close(attack(model, x, y, norm=norm, eps=eps), theirs)
    assert (sizes(ours - x, norm) <= eps + 1e-6).all() and ours.min() >= 0 and ours.max() <= 1
    # PGD is not far behind, and does not find what AutoAttack cannot.
    ours = pgd(model, x, y, generator=noise_for(x, 3), norm=norm, eps=eps, restarts=2)
    assert abs(int(wrong(model, ours, y).sum()) - int(fooled.sum())) <= (2 if norm == "L1" else 1)


@pytest.mark.parametrize("name", ["apgd", "apgd_targeted"])
@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.8), ("Linf", 0.12)])
def test_apgd_drops_fooled_samples(digits, norm, eps, name):
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


@pytest.mark.parametrize(
    ("classes", "version", "ran"),
    [
        (2, "standard", "apgd-ce, fab-t, square"),
        (3, "standard", "apgd-ce, apgd-dlr, fab-t, square"),
        (4, "standard", None),
        (2, "plus", "apgd-ce, fab, square, fab-t"),
        (3, "plus", "apgd-ce, apgd-dlr, fab, square, fab-t"),
        (2, "rand", "apgd-ce"),
        (3, "rand", None),
    ],
)
def test_few_classes(short, classes, version, ran):
    model, x, y = digits_net(classes, epochs=3)
    x, y = x[:12], y[:12]
    with collect_warnings() as messages:
        adversarial = attack(model, x, y, eps=1.0, version=version)
    assert 0 < wrong(model, adversarial, y).sum() < 12  # some are left for the last component
    omitted = [message for message in messages if "instead of" in message]
    assert (omitted == []) if ran is None else (len(omitted) == 1 and f"ran {ran} instead" in omitted[0])
    assert not any("not possible" in message for message in messages)


@pytest.mark.parametrize(
    ("norm", "eps", "attacks"),
    [("L2", 0.8, None), ("Linf", 0.15, None), ("Linf", 0.15, ["square", "fab-t", "apgd-t"])],
)
def test_stages_fool_the_same_samples_as_the_library(short, norm, eps, attacks):
    """Each stage sees the survivors of the ones before, in batches across those that they were in."""
    model, x, y = digits_net(classes=4, epochs=3)
    x, y = x[:64], y[:64]
    y = torch.where(torch.arange(64) % 21 == 0, (y + 1) % 4, y)  # some are wrong clean
    stages = AutoAttack(norm=norm, eps=eps, attacks=attacks, batch_size=12).stages(model, x[:0])
    assert [stage.attacks for stage in stages] == [[name] for name in attacks or STANDARD]
    robust, left = ~wrong(model, x, y), []
    for stage in stages:
        for index in robust.nonzero().squeeze(1).split(stage.batch_size):
            found = stage(model, x[index], y[index], generator=noise_for(x[index], 3))
            robust[index] = ~wrong(model, found, y[index])
        left.append(int(robust.sum()))
    assert 60 > left[0] >= left[-1] > 12  # every stage had several batches
    assert left[0] > left[-1] or attacks is None
    theirs = official(model, x, y, attacks or STANDARD, targets=3, batch_size=12, norm=norm, eps=eps)
    assert torch.equal(robust, ~wrong(model, theirs, y))


def test_part_of_a_version_keeps_its_settings(digits, monkeypatch):
    seen = []

    def look(library, x, y, **_):
        seen.append((library.attacks_to_run, library.apgd.n_restarts, library.apgd.eot_iter, library.fab.n_restarts,
                     library.square.n_queries, library.apgd_targeted.n_target_classes))  # fmt: skip
        return x, y

    monkeypatch.setattr(Library, "run_standard_evaluation", look)
    model, x, y = digits[0], digits[1][:2], digits[2][:2]
    attack(model, x, y, attacks=["square", "apgd-ce"], queries=70)
    attack(model, x, y, version="rand", attacks=["apgd-ce"])
    attack(model, x, y, version="plus", attacks=["fab"])
    assert seen == [
        (["square", "apgd-ce"], 1, 1, 1, 70, 9),
        (["apgd-ce"], 1, 20, 5, 5000, 9),
        (["fab"], 5, 1, 5, 5000, 9),
    ]


@pytest.mark.parametrize("forward", [lambda z: z.detach(), lambda z: z.detach() + torch.zeros(1).requires_grad_()])
def test_square_alone_attacks_a_model_without_gradients(digits, short, forward):
    model, x, y = Through(digits[0], forward), digits[1][:20], digits[2][:20]
    for components in (None, ["apgd-ce"], ["apgd-t"], ["fab"], ["fab-t"]):
        with pytest.raises(NoGradient, match="do not depend differentiably"):
            attack(model, x, y, attacks=components)
    assert len(attack(model, x[:0], y[:0])) == 0  # what checks the settings does not forbid the model
    expected = attack(digits[0], x, y, eps=1.0, attacks=["square"])
    assert wrong(model, expected, y).any()
    assert torch.equal(attack(model, x, y, eps=1.0, attacks=["square"]), expected)


def test_tiny_images_do_without_square_in_l2(digits, short):
    model = nn.Sequential(nn.Upsample(8), digits[0])
    x, y = digits[1][:4, :, 2:6, 2:6], digits[2][:4]
    with collect_warnings() as messages:
        attack(model, x, y, attacks=["apgd-ce", "square"])
    assert "ran apgd-ce instead of apgd-ce, square, given 10 classes and 4x4 pixels" in messages[0]


def square(height, width, norm):
    """What Square finds for two images of this size on a model that weighs pixels at random."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, height, width, generator=generator)
    weight = torch.randn(height * width, 3, generator=generator)
    model = Through(nn.Flatten(), lambda flat: flat @ weight)
    found = attack(model, x, model(x).argmax(1), norm=norm, attacks=["square"], queries=3)
    assert (sizes(found - x, norm) <= 0.5 + 1e-6).all()


# Of those sides the first tiles fit, of these they reach beyond the image, or there are none at all.
SIDES = [*((5, 5), (8, 13), (28, 32)), *((12, 12), (14, 9), (18, 30), (19, 60), (24, 24), (32, 48), (60, 5))]
ALL_SIDES = [(height, width) for height in range(5, 65) for width in range(5, 65)]


@pytest.mark.parametrize("norm", ["L2", "Linf"])
@pytest.mark.parametrize("sides", [SIDES, pytest.param(ALL_SIDES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_square_runs_at_every_size(norm, sides):
    for size in sides:
        square(*size, norm)


def test_squares_tiles_are_cut_at_the_border():
    from pyautoattack.square import SquareAttack

    x = torch.full((1, 1, 12, 12), 0.5)
    library = SquareAttack(lambda images: torch.tensor([[0.0, 1.0]]), norm="L2", eps=0.5, n_queries=1)
    shape = library.eta
    library.eta = lambda side: shape(side).as_subclass(_Tile)
    library.init_hyperparam(x)
    with torch.random.fork_rng([]):
        _, found = library.attack_single_run(x, torch.tensor([0]))
    assert type(found) is torch.Tensor and (found != x).sum() == 11 * 11


@pytest.mark.parametrize("attacks", [["apgd-ce"], ["fab-t"], ["square"]])
def test_any_layout_dtype_and_count(digits, short, attacks):
    model, x, y = digits[0], digits[1][:10], digits[2][:10]
    model = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), model).eval()
    nn.init.constant_(model[0].weight, 0.5)
    x = x.expand(-1, 2, -1, -1).contiguous()
    expected = attack(model, x, y, attacks=attacks)
    result = attack(model, x.to(memory_format=torch.channels_last), y, attacks=attacks)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)
    result = attack(model.double(), x.double(), y, attacks=attacks)
    model.float()
    assert result.dtype == torch.float64 and (sizes(result - x, "L2") <= 0.5 + 1e-6).all()
    for count in (0, 1):
        assert attack(model, x[:count], y[:count], attacks=attacks).shape == (count, 2, 8, 8)


# --- the world around it ----------------------------------------------------------------------------


def test_leaves_no_trace_on_the_process(short, capfd, caplog):
    """The random states, the trace function, loggers and standard output; see test_attacks for the model."""
    model, x, y = digits_net(classes=10, epochs=0)
    y = predictions(model, x[:10])
    partly_trained(model)

    def tracer(frame, event, argument):
        return None

    def process():
        logger = logging.getLogger("auto-attack")
        numbers = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return numbers, state_of(model), (logger.level, logger.propagate, list(logger.handlers))

    caplog.set_level(logging.DEBUG)
    before, old = process(), sys.gettrace()
    sys.settrace(tracer)
    try:
        attack(model, x[:10], y, attacks=["apgd-ce", "fab-t"])
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(old)
    assert process() == before
    assert capfd.readouterr() == ("", "") and caplog.records == []


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
    with collect_warnings() as messages:
        for part in (slice(0, 10), slice(10, 20)):
            attack(model, x[part], y[part], attacks=["apgd-dlr"], batch_size=5)
    assert len(messages) == (expected is not None) and all(expected in message for message in messages)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("aerl.attacks", message) for message in messages
    ]


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "settings", "error"),
    [
        (10, {"attacks": []}, r"^attacks=\[\]"),
        (2, {"attacks": ["apgd-dlr"]}, r"^attacks=\[apgd-dlr\]: none of them can attack 2 classes"),
        (1, {}, "2 classes or more"),
        (1, {"attacks": ["square"]}, "2 classes or more"),
    ],
)
def test_what_cannot_be_attacked_is_an_error(digits, classes, settings, error):
    model, x, y = Through(digits[0], lambda z: z[:, :classes]), digits[1][:0], digits[2][:0]
    with pytest.raises(UserError, match=error):
        attack(model, x, y, **settings)
