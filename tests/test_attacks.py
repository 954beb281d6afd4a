"""PGD on models whose optimum is known, what attacks do to the world around them, and their noise."""

import logging
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerl.attacks import (
    AutoAttack,
    BatchGenerator,
    NoGradient,
    PaperPGD,
    SampleGenerator,
    attacking,
    collect_warnings,
    evaluating,
    frozen,
    losses,
    modes,
    noise,
    pgd,
    warn,
)
from aerl.attacks.modes import full_precision
from aerl.types import UserError

NORMS = ["L2", "Linf"]
EPS = {"L2": 0.15, "Linf": 0.02}  # small_net is fooled on some images, not on all


def small_net(classes=4, dtype=torch.float32):
    """A small convolutional network with batch normalisation and dropout, at random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 9, classes),
    ).to(dtype)


def images(count=24, dtype=torch.float32, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(1)
    return (low + (high - low) * torch.rand(count, 3, 6, 6, generator=generator)).to(dtype)


@torch.no_grad()
def predictions(model, x):
    with evaluating(model):
        return model(x).argmax(1)


def attack(model, x, y, seed=0, **settings):
    settings = {"eps": 0.3, "steps": 10} | settings
    return pgd(model, x, y, generator=SampleGenerator.for_images(x, seed), **settings)


def sizes(delta, norm):
    return delta.flatten(1).double().norm(2 if norm == "L2" else torch.inf, dim=1)


def wavy_net(classes=4):
    """A network whose loss goes up and down along every direction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 32), Wave(), nn.Linear(32, classes))
    with torch.no_grad():
        model[1].weight *= 20
    return model


class Wave(nn.Module):
    def forward(self, x):
        return x.sin()


class Linear(nn.Module):
    """Logits W x, whose distance to the decision boundary between y and k is known in closed form."""

    def __init__(self, classes, unlikely=0):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        # Rows of unequal length: the second likeliest class is not always the nearest.
        lengths = torch.linspace(1, 3, classes)[:, None]
        weight = torch.randn(classes, 108, generator=generator) * lengths
        # Losses that compare several logits get more classes, all far away.
        self.weight = nn.Parameter(torch.cat([weight, torch.zeros(unlikely, 108)]))
        self.bias = nn.Parameter(torch.cat([torch.zeros(classes), torch.full([unlikely], -1000.0)]))

    def forward(self, x):
        return (x - 0.5).flatten(1) @ self.weight.T + self.bias

    @torch.no_grad()
    def distances(self, x, y, norm):
        """(B,) from each image to the nearest other class, infinite for y itself."""
        logits = self(x).double()
        gap = logits.gather(1, y[:, None]) - logits
        difference = (self.weight[y][:, None] - self.weight[None]).double()
        dual = difference.norm(2, dim=2) if norm == "L2" else difference.abs().sum(2)
        return (gap / dual).scatter(1, y[:, None], torch.inf).amin(1)


# --- what PGD finds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("call", "unlikely"),
    [
        (partial(pgd, loss="log_odds"), 0),
        (partial(pgd, loss="ce"), 0),
        (partial(pgd, loss="rescaled_ce"), 0),
        (partial(pgd, loss="margin"), 0),
        (partial(pgd, loss="dlr"), 1),
        (partial(pgd, loss="margin", eot=2), 0),
        (partial(AutoAttack, attacks=["apgd-ce"]), 0),
        (partial(AutoAttack, attacks=["apgd-t"]), 2),
        (partial(AutoAttack, attacks=["fab-t"]), 0),
    ],
    ids=lambda value: " ".join(map(str, value.keywords.values())) if isinstance(value, partial) else None,
)
def test_linear_model(norm, call, unlikely):
    model, x = Linear(2, unlikely), images(200, low=0.35, high=0.65)
    y = predictions(model, x)
    distance = model.distances(x, y, norm)
    for share in (0.2, 0.5, 0.8):
        eps = distance.quantile(share).item()
        away = (distance / eps - 1).abs() > 0.005  # that close do they come to the boundary of the ball
        assert eps < 0.3 and away.double().mean() > 0.9
        attack = partial(call, norm=norm, eps=eps)
        if call.func is AutoAttack:
            attack = attack()
        adversarial = attack(model, x, y, generator=SampleGenerator.for_images(x, 0))
        assert torch.equal((predictions(model, adversarial) != y)[away], (distance < eps)[away])


@pytest.mark.parametrize("norm", NORMS)
def test_targeted_attack_reaches_every_boundary_of_a_linear_model(norm):
    model, x = Linear(4), images(200, low=0.35, high=0.65)
    y = predictions(model, x)
    distance = model.distances(x, y, norm)
    eps = distance.median().item()
    away = (distance / eps - 1).abs() > 0.005
    settings = {"norm": norm, "eps": eps, "steps": 100, "targeted": True, "loss": "margin", "restarts": 3}
    fooled = predictions(model, attack(model, x, y, **settings)) != y
    assert torch.equal(fooled[away], (distance < eps)[away])
    # One target alone is not enough for all of them.
    assert (predictions(model, attack(model, x, y, **settings | {"restarts": 1})) != y).sum() < fooled.sum()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("settings", [{}, {"drop_fooled": False}, {"keep": "last", "drop_fooled": False}])
def test_result_is_in_ball_and_box(norm, settings):
    model, x = small_net(), images()
    x[:8] = x[:8].round()  # corners of the box
    y = predictions(model, x)
    adversarial = attack(model, x, y, norm=norm, **settings)
    assert adversarial.shape == x.shape and adversarial.dtype == x.dtype
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (sizes(adversarial - x, norm) <= 0.3 + 1e-6).all()
    assert not torch.equal(adversarial, x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "call",
    [
        partial(pgd, steps=8, restarts=2),
        partial(pgd, steps=8, restarts=2, drop_fooled=False),
        partial(pgd, steps=8, loss="rescaled_ce", eot=2),
        partial(pgd, steps=8, loss="dlr", keep="last"),
        partial(PaperPGD, steps=8),
        partial(noise, draws=20),
    ],
    ids=lambda call: f"{call.func.__name__} {call.keywords}",
)
def test_batch_size_and_order_change_nothing(norm, call):
    model, x = small_net(dtype=torch.float64), images(16, dtype=torch.float64)
    y = predictions(model, x)
    call = partial(call, norm=norm, eps=EPS[norm] * (2 if call.func is noise else 1))
    if call.func is PaperPGD:
        call = call()

    def attack(index):
        return call(model, x[index], y[index], generator=SampleGenerator.for_images(x[index], 0))

    whole = attack(torch.arange(len(x)))
    fooled = predictions(model, whole) != y
    assert 0 < fooled.sum() < len(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    for batch in (1, 10):
        parts = [attack(part) for part in order.split(batch)]
        again = torch.empty_like(whole).index_copy_(0, order, torch.cat(parts))
        assert torch.equal(predictions(model, again) != y, fooled)
        torch.testing.assert_close(again, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random_start", [True, False])
def test_dropping_fooled_samples_changes_no_outcome(norm, random_start):
    model, x = small_net(dtype=torch.float64), images(16, dtype=torch.float64)
    y = predictions(model, x)
    settings = {"norm": norm, "eps": EPS[norm], "steps": 10, "random_start": random_start}
    dropped = attack(model, x, y, drop_fooled=True, **settings)
    full = attack(model, x, y, drop_fooled=False, **settings)
    fooled = predictions(model, dropped) != y
    assert 0 < fooled.sum() < len(x)
    assert torch.equal(predictions(model, full) != y, fooled)
    torch.testing.assert_close(dropped[~fooled], full[~fooled], rtol=0, atol=1e-9)


def test_the_worst_iterate_is_at_least_as_bad_as_the_last():
    model, x = wavy_net(), images(64)
    y = predictions(model, x)
    settings = {"eps": 0.5, "steps": 7, "step_size": 0.5, "drop_fooled": False}
    value, fooled = {}, {}
    for keep in ("worst", "last"):
        adversarial = attack(model, x, y, keep=keep, **settings)
        with torch.no_grad(), evaluating(model):
            logits = model(adversarial)
        value[keep], fooled[keep] = losses.log_odds(logits, y), logits.argmax(1) != y
    assert (fooled["worst"] | ~fooled["last"]).all()
    same = fooled["worst"] == fooled["last"]
    assert (value["worst"] >= value["last"] - 1e-5)[same].all()
    assert (value["worst"] > value["last"] + 1e-3).any()


def test_restarts_never_lose_a_sample():
    model, x = wavy_net(), images(64)
    y = predictions(model, x)
    previous = torch.zeros_like(y, dtype=torch.bool)
    counts = []
    for restarts in (1, 2, 6):
        fooled = predictions(model, attack(model, x, y, eps=0.03, steps=2, restarts=restarts)) != y
        assert (fooled | ~previous).all()
        previous = fooled
        counts.append(int(fooled.sum()))
    assert counts[0] < counts[-1] < len(x)


def test_misclassified_samples_come_back_unchanged():
    model, x = small_net(), images()
    y = predictions(model, x)
    y[::2] = (y[::2] + 1) % 4
    adversarial = attack(model, x, y)
    assert torch.equal(adversarial[::2], x[::2])
    assert (predictions(model, adversarial)[1::2] != y[1::2]).any()


def test_zero_eps_and_an_empty_batch_return_the_images():
    model, x = small_net(), images()
    y = predictions(model, x)
    assert torch.equal(attack(model, x, y, eps=0), x)
    assert attack(model, x[:0], y[:0]).shape == (0, 3, 6, 6)


def test_one_step_from_the_image_is_fgsm():
    model, x = small_net(), images()
    y = predictions(model, x)
    settings = {"steps": 1, "eps": 0.02, "step_size": 0.02, "random_start": False, "norm": "Linf"}
    for loss in ("ce", "log_odds"):
        result = attack(model, x, y, loss=loss, drop_fooled=False, keep="last", **settings)
        with evaluating(model):
            point = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        torch.testing.assert_close(result, (x + 0.02 * gradient.sign()).clamp(0, 1))


class Recording(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x)
        return self.inner(x)


def test_forwards_are_not_wasted():
    model, x = Recording(small_net()), images()
    y = predictions(model, x)

    def batches(**settings):
        model.seen.clear()
        attack(model, x, y, eps=0.05, **settings)
        return [len(points) for points in model.seen]

    assert batches(steps=5, drop_fooled=False) == [24] * 6
    # In training nothing depends on the last iterate's outcome: one forward for one gradient.
    assert batches(steps=1, drop_fooled=False, keep="last", random_start=False) == [24]
    shrinking = batches(steps=20)
    assert shrinking == sorted(shrinking, reverse=True) and shrinking[-1] < 24


# --- starting points, averages, noise -----------------------------------------------------------------


def test_given_starts_replace_the_first_random_start():
    model, x = small_net(dtype=torch.float64), images(dtype=torch.float64)
    y = predictions(model, x)
    settings = {"eps": 0.15, "drop_fooled": False, "keep": "last", "step_size": 0, "steps": 1}
    start = (x + 0.05 * x.sin()).clamp(0, 1)
    torch.testing.assert_close(attack(model, x, y, start=start, **settings | {"eps": 0.6}), start)
    far = attack(model, x, y, start=torch.zeros_like(x), **settings)
    assert (sizes(far - x, "L2") - 0.15).abs().max() < 1e-9 and far.min() >= 0
    torch.testing.assert_close(F.normalize((far - x).flatten(1)), F.normalize(-x.flatten(1)))
    # An example found before is found again, with or without random starts and other samples in between.
    settings = {"eps": 0.15, "steps": 20}
    found = attack(model, x, y, **settings)
    fooled = predictions(model, found) != y
    assert 0 < fooled.sum() < len(x)
    for random_start in (True, False):
        again = attack(model, x, y, start=found, eps=0.15, steps=1, step_size=0, random_start=random_start)
        torch.testing.assert_close(again[fooled], found[fooled])
    # What is wrong to begin with comes back as it is, whatever the start.
    other = (y + 1) % 4
    assert torch.equal(attack(model, x, other, start=found, random_start=False, **settings), x)


class Alternating(nn.Module):
    """A model of two minds: its passes take turns, so that the mean of two is the mean of all."""

    def __init__(self, *minds):
        super().__init__()
        self.minds, self.calls = nn.ModuleList(minds), 0

    def forward(self, x):
        self.calls += 1
        return self.minds[self.calls % 2](x)


def test_averaging_over_passes():
    model = Recording(Alternating(wavy_net(), nn.Sequential(nn.AvgPool2d(3, 1, 1), wavy_net())))
    minds, x = model.inner.minds, images(48)

    @torch.no_grad()
    def wrong(x, y):
        return sum(mind(x).softmax(1) for mind in minds).argmax(1) != y

    y = torch.zeros(48, dtype=torch.int64)
    y = torch.stack([wrong(x, y + k) for k in range(4)]).int().argmin(0)
    adversarial = attack(model, x, y, eps=0.1, steps=5, random_start=False, eot=2)
    first, second = model.seen[0::2], model.seen[1::2]
    label, outvoted = y, 0
    for one, other, after in zip(first, second, [*first[1:], None], strict=True):
        assert torch.equal(one, other)
        fooled = wrong(one, label)
        outvoted += int((predictions(minds[1], one) != label).logical_and(~fooled).sum())
        label = label[~fooled]
        assert after is None or len(after) == len(label)
    assert 0 < len(label) == int((~wrong(adversarial, y)).sum()) < 48
    assert outvoted > 0  # one pass alone would have taken them for fooled

    settings = {"eps": 0.1, "steps": 1, "random_start": False, "drop_fooled": False, "keep": "last"}
    result = attack(model, x, y, loss="ce", step_size=0.01, eot=2, **settings)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sum(F.cross_entropy(mind(point), y) for mind in minds), point)
    expected = (x + 0.01 * F.normalize(gradient.flatten(1)).view_as(x)).clamp(0, 1)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_noise_returns_the_worst_point_it_saw(norm):
    model, x = Recording(wavy_net()), images(32, low=0.4, high=0.6)
    y = predictions(model.inner, x)

    def attack(eps, y):
        model.seen.clear()
        return noise(model, x, y, generator=SampleGenerator.for_images(x, 0), norm=norm, eps=eps, draws=20)

    # Too little to fool anyone: every sample sees every draw, in turn on the surface and inside.
    eps = 1e-4
    result, seen = attack(eps, y), torch.stack(model.seen)
    assert seen.shape == (21, 32, 3, 6, 6)
    with torch.no_grad():
        margins = torch.stack([losses.margin(model.inner(point), y) for point in seen])
    assert torch.equal(result, seen[margins.argmax(0), torch.arange(32)])
    delta = (seen - x).double()
    on_surface = delta[1::2].flatten(2).norm(dim=2) if norm == "L2" else delta[1::2].abs()
    torch.testing.assert_close(on_surface, torch.full_like(on_surface, eps), rtol=0, atol=1e-6)
    inside = delta[2::2].flatten(2).norm(2 if norm == "L2" else torch.inf, dim=2)
    assert (inside < eps + 1e-6).all() and inside.std() > 1e-9

    result = attack({"L2": 0.6, "Linf": 0.06}[norm], torch.where(torch.arange(32) < 4, (y + 1) % 4, y))
    fooled = predictions(model.inner, result)[4:] != y[4:]
    assert torch.equal(result[:4], x[:4]) and 0 < fooled.sum() < 28
    counts = [len(point) for point in model.seen]
    assert counts[:2] == [32, 28] and counts == sorted(counts, reverse=True) and counts[-1] < 28


def test_noise_needs_no_gradient_and_refuses_nonsense():
    model, x = wavy_net(), images()
    y = predictions(model, x)
    generator = partial(SampleGenerator.for_images, x, 0)
    expected = noise(model, x, y, generator=generator(), eps=0.5)
    broken = Through(model, lambda logits: logits.detach())
    assert torch.equal(noise(broken, x, y, generator=generator(), eps=0.5), expected)
    assert torch.equal(noise(model, x, y, generator=generator(), eps=0), x)
    with pytest.raises(UserError, match="2 classes or more"):
        noise(Through(model, lambda logits: logits[:, :1]), x, y, generator=generator(), eps=0.5)


# --- gradients that vanish --------------------------------------------------------------------------


class Through(nn.Module):
    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x):
        return self.change(self.inner(x))


def scaled(model, scale):
    return Through(model, lambda logits: logits * scale)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["log_odds", "rescaled_ce", "margin", "dlr"])
@pytest.mark.parametrize("scale", [1e-25, 1e6])
def test_the_scale_of_the_logits_is_no_defence(norm, loss, scale):
    model, x = small_net(), images(64)
    y = predictions(model, x)
    settings = {"norm": norm, "eps": EPS[norm], "steps": 20, "loss": loss}
    plain = (predictions(model, attack(model, x, y, **settings)) != y).sum()
    found = (predictions(model, attack(scaled(model, scale), x, y, **settings)) != y).sum()
    assert 10 < plain < 64
    assert found >= plain - 2


def test_cross_entropy_saturates():
    """What log_odds is for. At x30 the squares of ce's gradients underflow, at x1e6 they themselves do."""
    model, x = small_net(), images(64)
    y = predictions(model, x)
    settings = {"eps": 0.15, "steps": 40, "random_start": False, "loss": "ce"}
    assert (predictions(model, attack(scaled(model, 30), x, y, **settings)) != y).sum() > 10
    stuck = attack(scaled(model, 1e6), x, y, **settings)
    assert (sizes(stuck - x, "L2") == 0).double().mean() > 0.8


def test_losses():
    torch.manual_seed(0)
    logits, y = torch.randn(50, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (50,))
    own = logits.gather(1, y[:, None]).squeeze(1)
    other = torch.stack([row[torch.arange(5) != label].max() for row, label in zip(logits, y, strict=True)])
    ordered = logits.sort(1, descending=True).values
    torch.testing.assert_close(losses.ce(logits, y), F.cross_entropy(logits, y, reduction="none"))
    torch.testing.assert_close(losses.margin(logits, y), other - own)
    torch.testing.assert_close(losses.dlr(logits, y), (other - own) / (ordered[:, 0] - ordered[:, 2]))
    scaled = 10 * logits / logits.abs().amax(1, keepdim=True)
    torch.testing.assert_close(losses.rescaled_ce(logits, y), losses.ce(scaled, y))
    (slope,) = torch.autograd.grad(losses.rescaled_ce(logits, y).sum(), logits)
    torch.testing.assert_close(slope.sum(1), torch.zeros(50).double())  # a constant scale: it has no slope
    torch.testing.assert_close(F.softplus(losses.log_odds(logits, y)), losses.ce(logits, y))
    a, b = (torch.autograd.grad(f(logits, y).sum(), logits)[0] for f in (losses.ce, losses.log_odds))
    torch.testing.assert_close(F.normalize(a), F.normalize(b))


# --- the world around an attack ---------------------------------------------------------------------


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def partly_trained(model):
    """Training mode with one layer in eval mode, one parameter frozen, and gradients waiting."""
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    return model


def test_an_attack_leaves_no_trace():
    model, x = partly_trained(small_net()), images()
    y = predictions(model, x)
    before, rng = state_of(model), torch.get_rng_state()
    adversarial = attack(model, x, y)
    after = state_of(model)
    assert before[:2] == after[:2]
    torch.testing.assert_close(before[2:], after[2:], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not x.requires_grad and x.grad is None and not adversarial.requires_grad


def test_modes_are_restored_after_an_exception():
    model = partly_trained(small_net())
    before = state_of(model)
    for mode in (evaluating, frozen, attacking):
        with pytest.raises(KeyError), mode(model):
            if mode is not frozen:
                assert not any(module.training for module in model.modules())
            if mode is not evaluating:
                assert not any(parameter.requires_grad for parameter in model.parameters())
            raise KeyError
        assert state_of(model)[:2] == before[:2]


def test_outer_modes_change_nothing():
    model, x = small_net(), images()
    y = predictions(model, x)
    expected = attack(model, x, y)
    for outer in (torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with outer:
            assert torch.equal(attack(model, x.clone(), y.clone()), expected)
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()
        attack(model, x, y)
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_computed_in_full_precision(precision):
    backends = torch.backends
    modern = [backends.cuda.matmul, backends.cudnn.conv] if hasattr(backends.cuda.matmul, "fp32_precision") else []

    def switches():
        old = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        return old, [owner.fp32_precision for owner in modern]

    try:
        torch.set_float32_matmul_precision(precision)
        before = switches()
        with warnings.catch_warnings(), full_precision():
            warnings.simplefilter("error")
            assert switches() == (("highest", False), ["ieee"] * len(modern))
        assert switches() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_layout_is_kept():
    model, x = small_net(), images().to(memory_format=torch.channels_last)
    y = predictions(model, x)
    for settings in ({}, {"drop_fooled": False}, {"norm": "Linf", "restarts": 2}):
        result = attack(model, x, y, **settings)
        assert result.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(result, attack(model, x.contiguous(), y, **settings), rtol=0, atol=1e-4)
    strided = images(48)[::2]
    assert torch.equal(attack(model, strided, y), attack(model, strided.contiguous(), y))


# --- bad input --------------------------------------------------------------------------------------


class Broken(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (small_net(), {"restarts": 2, "random_start": False}, "restarts=2: "),
        (small_net(), {"start": images(23)}, r"start=\(23, 3, 6, 6\): must have the images' shape"),
        (small_net(2), {"loss": "dlr"}, "loss=dlr: needs 3 classes"),
        (small_net(1), {}, r"\(24, 1\): an attack needs logits .* 2 classes or more"),
        (small_net(1), {"targeted": True}, "2 classes or more"),
    ],
)
def test_faults(model, settings, message):
    x = images()
    with pytest.raises(UserError, match=message) as error:
        attack(model, x, torch.zeros(len(x), dtype=torch.int64), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [torch.zeros(()), torch.zeros((), requires_grad=True)])
def test_a_model_without_gradients(other):
    model, x = Through(small_net(), lambda z: z.detach() + other), images()
    y = predictions(model, x)
    for call in (partial(pgd, eps=0.3), PaperPGD(eps=0.3)):
        with pytest.raises(NoGradient, match="do not depend differentiably on the image"):
            call(model, x, y, generator=SampleGenerator.for_images(x, 0))


def test_images_outside_the_box_are_refused():
    x = images()
    for bad in (x * 2 - 1, torch.full_like(x, torch.nan)):
        with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
            attack(small_net(), bad, torch.zeros(len(x), dtype=torch.int64))


@pytest.mark.parametrize("classes", [2, 3])
def test_targeted_with_few_classes(classes):
    model, x = wavy_net(classes), images()
    y = predictions(model, x)
    settings = {"targeted": True, "loss": "margin", "steps": 5, "eps": 0.1}
    with collect_warnings() as messages:
        found = attack(model, x, y, restarts=9, **settings)
    assert messages == [f"restarts=9: aimed at all {classes - 1} wrong classes, since there are no more"]
    assert torch.equal(found, attack(model, x, y, restarts=classes - 1, **settings))
    assert (predictions(model, found) != y).any()


# --- what is not finite is misclassified --------------------------------------------------------------


class Cliff(nn.Module):
    """A linear model that is NaN, infinite, ... (`beyond`) wherever the mean of an image has grown by `width`."""

    def __init__(self, x, beyond, width=0.01):
        super().__init__()
        self.inner, self.beyond = Linear(4), beyond
        self.edge = x.mean() + width

    def forward(self, x):
        logits = self.inner(x) + 40.0 * torch.arange(4, 0, -1)  # class 0, where NaN's argmax is, too
        off = x.mean((1, 2, 3)) > self.edge
        return torch.where(off[:, None] & (torch.arange(4) < 2), self.beyond, logits)


FINITE = [
    partial(pgd, loss="ce"),
    partial(pgd, loss="margin", drop_fooled=False),
    partial(pgd, loss="margin", targeted=True, restarts=2),
    partial(pgd, eot=2),
    partial(noise, draws=20),
    *(partial(AutoAttack, attacks=[name]) for name in ("apgd-ce", "apgd-t", "fab-t", "square")),
]


@pytest.mark.parametrize("beyond", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("call", FINITE, ids=lambda call: " ".join(map(str, call.keywords.values())))
def test_a_model_that_is_not_finite_is_fooled(call, beyond):
    x = images(4, low=0.4, high=0.6)
    model = Cliff(x, torch.tensor(beyond), width=0.0005)
    x = x - (x.mean((1, 2, 3), keepdim=True) - x.mean())  # all of them just before the edge
    y = predictions(model, x)
    call = partial(call, norm="L2", eps=0.4)
    with collect_warnings() as messages:
        attack_ = call() if call.func is AutoAttack else call
        found = attack_(model, x, y, generator=SampleGenerator.for_images(x, 0))
    assert found.isfinite().all() and (sizes(found - x, "L2") <= 0.4 + 1e-6).all()
    with torch.no_grad():
        found = modes.predictions(model(found))
    assert (found == -1).any() and ((found != y).all() or call.func is AutoAttack)  # which does not look everywhere
    assert any("NaN or infinity" in message for message in messages)


@pytest.mark.parametrize("call", [pgd, *FINITE[-4:-1], PaperPGD])
def test_a_gradient_that_is_not_finite(call):
    x = images(4)
    model = Through(small_net(), lambda z: z + (0 * z[:, :1].detach() + 0 * z[:, :1]).sqrt())  # 0, slope NaN
    y = predictions(model, x)
    attack_ = call if call is pgd else call(eps=0.3)
    with collect_warnings() as messages:
        settings = {"eps": 0.3} if call is pgd else {}
        found = attack_(model, x, y, generator=SampleGenerator.for_images(x, 0), **settings)
    assert found.isfinite().all() and (sizes(found - x, "L2") <= 0.3 + 1e-6).all()
    assert any("NaN or infinity" in message for message in messages)


def test_no_attack_writes_into_its_images():
    model, x = small_net(), images(6)
    y = predictions(model, x)
    source = tuple(t.clone() for t in (x, y))
    calls = [partial(pgd, eps=0.3), partial(pgd, eps=0), partial(noise, eps=0.3), PaperPGD(eps=0.3, steps=3)]
    calls += [AutoAttack(eps=eps, attacks=["apgd-ce", "square"], queries=5) for eps in (0, 0.3)]
    for call in calls:
        found = call(model, x, y, generator=SampleGenerator.for_images(x, 0))
        assert torch.equal(x, source[0]) and torch.equal(y, source[1])
        found.fill_(7)
        assert torch.equal(x, source[0])


# --- noise ------------------------------------------------------------------------------------------


def test_noise_depends_on_the_image_alone():
    x = images(6)
    whole = SampleGenerator.for_images(x, seed=5)
    first, second = whole.normal(x), whole.uniform(x[:, :1, :1, :1])
    for i in (4, 0):
        alone = SampleGenerator.for_images(x[i : i + 1], seed=5)
        assert torch.equal(alone.normal(x[i : i + 1])[0], first[i])
        assert torch.equal(alone.uniform(x[i : i + 1, :1, :1, :1])[0], second[i])
    assert len({row.sum().item() for row in first}) == 6
    others = [SampleGenerator.for_images(x, seed=6), SampleGenerator.for_images(x, seed=5, salt="pgd")]
    assert not any(torch.equal(other.normal(x), first) for other in others)


def test_noise_is_the_same_for_bytes_floats_layouts_and_dtypes():
    raw = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    x = raw.float() / 255
    expected = SampleGenerator.for_images(raw, 1).normal(x)
    last = x.to(memory_format=torch.channels_last)
    noise = SampleGenerator.for_images(last, 1).normal(last)
    assert torch.equal(noise, expected) and noise.is_contiguous(memory_format=torch.channels_last)
    double = SampleGenerator.for_images(x.double(), 1).normal(x.double())
    assert double.dtype == torch.float64 and torch.equal(double.float(), expected)


def test_part_of_a_generator_goes_on_where_the_whole_stood():
    x = images(5)
    first, second = (SampleGenerator.for_images(x, 0) for _ in range(2))
    first.normal(x), second.normal(x)
    expected = second.normal(x)
    mask = torch.tensor([True, False, False, True, False])
    assert torch.equal(first[mask].normal(x[mask]), expected[mask])
    index = torch.tensor([4, 1])
    assert torch.equal(first[index].normal(x[index]), expected[index])


def test_batch_generator():
    x = images().to(memory_format=torch.channels_last)
    a, b = (BatchGenerator(torch.Generator().manual_seed(3), len(x)) for _ in range(2))
    assert a.seed == 3
    assert torch.equal(a.normal(x), b.normal(x)) and torch.equal(a.uniform(x), b[x[:, 0, 0, 0] > 0].uniform(x))
    assert not torch.equal(a.normal(x), a.normal(x))
    index, again = torch.tensor([2, 0]), torch.tensor([False, True])  # the numbers of a sample are its own
    one, two, whole = (BatchGenerator(torch.Generator().manual_seed(3), len(x)) for _ in range(3))
    expected = [whole.normal(x), whole.uniform(x), whole.normal(x)]
    assert torch.equal(one[index].normal(x[index].contiguous()), expected[0][index])
    assert torch.equal(one[index].uniform(x[index]), expected[1][index])
    assert torch.equal(one[index][again].normal(x[:1]), expected[2][:1])
    assert torch.equal(two[torch.arange(len(x) - 1, -1, -1)].normal(x), expected[0].flip(0))
    model = small_net()
    y = predictions(model, x)
    assert (sizes(pgd(model, x, y, generator=a, eps=0.3, steps=3) - x, "L2") <= 0.3 + 1e-6).all()


def test_warnings_are_collected_once(caplog):
    with caplog.at_level(logging.WARNING, logger="aerl.attacks"):
        with collect_warnings() as messages:
            warn("one")
            warn("two")
            warn("one")
        warn("three")
    assert messages == ["one", "two"]
    assert caplog.messages == ["one", "two", "three"]
