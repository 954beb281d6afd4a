"""PGD on models whose optimum is known, what attacks do to the world around them, and their noise."""

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerl.attacks import (
    Adaptive,
    AutoAttack,
    BatchGenerator,
    NoGradient,
    PaperPGD,
    attacking,
    collect_warnings,
    evaluating,
    fmn,
    frozen,
    losses,
    modes,
    noise,
    pgd,
    warn,
)
from aerl.errors import UserError
from tests.nets import (
    Linear,
    Recording,
    Through,
    images,
    noise_for,
    partly_trained,
    predictions,
    sizes,
    small_net,
    state_of,
    wavy_net,
    wrong,
)

NORMS = ["L2", "Linf"]
EPS = {"L1": 1.0, "L2": 0.15, "Linf": 0.02}  # small_net is fooled on some images, not on all


def attack(model, x, y, seed=0, **settings):
    return pgd(model, x, y, generator=noise_for(x, seed), **{"eps": 0.3, "steps": 10} | settings)


def run(call, model, x, y):
    """The result of a partial of any attack."""
    attack = call() if isinstance(call.func, type) else call
    return attack(model, x, y, generator=noise_for(x))


def name(value):
    return f"{value.func.__name__} {value.keywords}" if isinstance(value, partial) else None


# --- what attacks find ------------------------------------------------------------------------------


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
        (partial(pgd, gradient="straight_through"), 0),
        (partial(pgd, jitter=0.5, eot=4), 0),
        (partial(AutoAttack, attacks=["apgd-ce"]), 0),
        (partial(AutoAttack, attacks=["apgd-t"]), 2),
        (partial(AutoAttack, attacks=["fab-t"]), 0),
    ],
    ids=name,
)
def test_linear_model(norm, call, unlikely):
    model, x = Linear(2, unlikely), images(200, low=0.35, high=0.65)
    y = predictions(model, x)
    distance = model.distances(x, y, norm)
    for share in (0.2, 0.5, 0.8):
        eps = distance.quantile(share).item()
        away = (distance / eps - 1).abs() > 0.005  # that close do they come to the boundary of the ball
        assert eps < 0.3 and away.double().mean() > 0.9
        adversarial = run(partial(call, norm=norm, eps=eps), model, x, y)
        assert torch.equal(wrong(model, adversarial, y)[away], (distance < eps)[away])


def best_gain_in_l1(model, x, y, eps):
    """(B,) how far the margin of two classes can fall: the steepest pixels first, each as far as the box lets it."""
    slope = (model.weight[1 - y] - model.weight[y]).detach().double()
    room = torch.where(slope > 0, 1 - x.flatten(1), x.flatten(1)).double()
    order = slope.abs().argsort(1, descending=True)
    slope, room = slope.abs().gather(1, order), room.gather(1, order)
    used = torch.minimum(room, (eps - (room.cumsum(1) - room)).clamp_min(0))
    return (slope * used).sum(1)


@pytest.mark.parametrize(
    ("call", "unlikely"),
    [
        (partial(pgd, steps=200, loss="margin"), 0),
        (partial(pgd, steps=200, loss="ce"), 0),
        (partial(AutoAttack, attacks=["apgd-ce"]), 0),
        (partial(AutoAttack, attacks=["apgd-t"]), 2),
        (partial(AutoAttack, attacks=["fab-t"]), 0),
    ],
    ids=name,
)
@pytest.mark.parametrize("eps", [0.5, 2.0, 6.0])
def test_linear_model_in_l1_with_the_box_in_the_way(call, unlikely, eps):
    """A ball of 2 or 6 needs several pixels, whose ways end at the box."""
    model, x = Linear(2, unlikely), images(200)
    with torch.no_grad():  # decisions as far away as the ball can reach
        model.weight *= 0.3
    y = predictions(model, x)
    logits = model(x).detach().double()[:, :2]
    lead = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]
    gain = best_gain_in_l1(model, x, y, eps)
    fooled = wrong(model, run(partial(call, norm="L1", eps=eps), model, x, y), y)
    assert not fooled[gain < lead * 0.999].any()  # nothing beyond the optimum
    can = gain > lead * 1.02
    assert can.sum() > 20 and fooled[can].double().mean() > 0.98


@pytest.mark.parametrize("norm", NORMS)
def test_targeted_attack_reaches_every_boundary_of_a_linear_model(norm):
    model, x = Linear(4), images(200, low=0.35, high=0.65)
    y = predictions(model, x)
    distance = model.distances(x, y, norm)
    eps = distance.median().item()
    away = (distance / eps - 1).abs() > 0.005
    settings = {"norm": norm, "eps": eps, "steps": 100, "targeted": True, "loss": "margin", "restarts": 3}
    fooled = wrong(model, attack(model, x, y, **settings), y)
    assert torch.equal(fooled[away], (distance < eps)[away])
    # One target alone is not enough for all of them.
    assert wrong(model, attack(model, x, y, **settings | {"restarts": 1}), y).sum() < fooled.sum()


@pytest.mark.parametrize("norm", ["L1", *NORMS])
@pytest.mark.parametrize("settings", [{}, {"drop_fooled": False}, {"keep": "last", "drop_fooled": False}])
def test_result_is_in_ball_and_box(norm, settings):
    model, x = small_net(), images()
    x[:8] = x[:8].round()  # corners of the box
    adversarial = attack(model, x, predictions(model, x), norm=norm, **settings)
    assert adversarial.shape == x.shape and adversarial.dtype == x.dtype
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (sizes(adversarial - x, norm) <= 0.3 + 1e-6).all() and not torch.equal(adversarial, x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "call",
    [
        partial(pgd, steps=8, restarts=2),
        partial(pgd, steps=8, restarts=2, drop_fooled=False),
        partial(pgd, steps=8, loss="rescaled_ce", eot=2),
        partial(pgd, steps=8, loss="dlr", keep="last"),
        partial(pgd, steps=12, gradient="finite_differences", directions=60),
        partial(pgd, steps=8, jitter=0.3, eot=2),
        partial(fmn, steps=8),
        partial(PaperPGD, steps=8),
        partial(noise, draws=20),
    ],
    ids=name,
)
def test_batch_size_and_order_change_nothing(norm, call):
    model, x = small_net(dtype=torch.float64), images(16, dtype=torch.float64)
    y = predictions(model, x)
    call = partial(call, norm=norm, eps=EPS[norm] * (2 if call.func is noise else 1))
    together = run(call, model, x, y)
    fooled = wrong(model, together, y)
    assert 0 < fooled.sum() < len(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    for batch in (1, 10):
        parts = [run(call, model, x[part], y[part]) for part in order.split(batch)]
        again = torch.empty_like(together).index_copy_(0, order, torch.cat(parts))
        assert torch.equal(wrong(model, again, y), fooled)
        torch.testing.assert_close(again, together, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random_start", [True, False])
def test_dropping_fooled_samples_changes_no_outcome(norm, random_start):
    model, x = small_net(dtype=torch.float64), images(16, dtype=torch.float64)
    y = predictions(model, x)
    settings = {"norm": norm, "eps": EPS[norm], "random_start": random_start}
    dropped = attack(model, x, y, drop_fooled=True, **settings)
    full = attack(model, x, y, drop_fooled=False, **settings)
    fooled = wrong(model, dropped, y)
    assert 0 < fooled.sum() < len(x)
    assert torch.equal(wrong(model, full, y), fooled)
    torch.testing.assert_close(dropped[~fooled], full[~fooled], rtol=0, atol=1e-9)


def test_the_worst_iterate_is_at_least_as_bad_as_the_last():
    model, x = wavy_net(), images(64)
    y = predictions(model, x)
    value, fooled = {}, {}
    for keep in ("worst", "last"):
        adversarial = attack(model, x, y, keep=keep, eps=0.5, steps=7, step_size=0.5, drop_fooled=False)
        value[keep], fooled[keep] = losses.log_odds(model(adversarial), y), wrong(model, adversarial, y)
    assert (fooled["worst"] | ~fooled["last"]).all()
    same = fooled["worst"] == fooled["last"]
    assert (value["worst"] >= value["last"] - 1e-5)[same].all()
    assert (value["worst"] > value["last"] + 1e-3).any()


def test_restarts_never_lose_a_sample():
    model, x = wavy_net(), images(64)
    y = predictions(model, x)
    previous, counts = torch.zeros_like(y, dtype=torch.bool), []
    for restarts in (1, 2, 6):
        fooled = wrong(model, attack(model, x, y, eps=0.03, steps=2, restarts=restarts), y)
        assert (fooled | ~previous).all()
        previous = fooled
        counts.append(int(fooled.sum()))
    assert counts[0] < counts[-1] < len(x)


def test_samples_that_need_no_attack_come_back_unchanged():
    model, x = small_net(), images()
    y = predictions(model, x)
    assert torch.equal(attack(model, x, y, eps=0), x)
    assert attack(model, x[:0], y[:0]).shape == (0, 3, 6, 6)
    y[::2] = (y[::2] + 1) % 4
    adversarial = attack(model, x, y)
    assert torch.equal(adversarial[::2], x[::2]) and wrong(model, adversarial, y)[1::2].any()


@pytest.mark.parametrize("loss", ["ce", "log_odds"])
def test_one_step_from_the_image_is_fgsm(loss):
    model, x = small_net(), images()
    y = predictions(model, x)
    settings = {"steps": 1, "eps": 0.02, "step_size": 0.02, "random_start": False, "norm": "Linf"}
    result = attack(model, x, y, loss=loss, drop_fooled=False, keep="last", **settings)
    with evaluating(model):
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
    torch.testing.assert_close(result, (x + 0.02 * gradient.sign()).clamp(0, 1))


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
    still = {"drop_fooled": False, "keep": "last", "step_size": 0, "steps": 1}
    start = (x + 0.05 * x.sin()).clamp(0, 1)
    torch.testing.assert_close(attack(model, x, y, start=start, eps=0.6, **still), start)
    far = attack(model, x, y, start=torch.zeros_like(x), eps=0.15, **still)
    assert (sizes(far - x, "L2") - 0.15).abs().max() < 1e-9 and far.min() >= 0
    torch.testing.assert_close(F.normalize((far - x).flatten(1)), F.normalize(-x.flatten(1)))
    # An example found before is found again, with or without random starts and other samples in between.
    found = attack(model, x, y, eps=0.15, steps=20)
    fooled = wrong(model, found, y)
    assert 0 < fooled.sum() < len(x)
    for random_start in (True, False):
        again = attack(model, x, y, start=found, eps=0.15, steps=1, step_size=0, random_start=random_start)
        torch.testing.assert_close(again[fooled], found[fooled])
    # A misclassified image comes back unchanged, whatever the start.
    assert torch.equal(attack(model, x, (y + 1) % 4, start=found, random_start=False, eps=0.15), x)


class Alternating(nn.Module):
    """Two models that take turns, so that the mean of two passes is the mean of all."""

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
    def mean_is_wrong(x, y):
        return sum(mind(x).softmax(1) for mind in minds).argmax(1) != y

    y = torch.stack([mean_is_wrong(x, k) for k in range(4)]).int().argmin(0)
    adversarial = attack(model, x, y, eps=0.1, steps=5, random_start=False, eot=2)
    first, second = model.seen[0::2], model.seen[1::2]
    label, outvoted = y, 0
    for one, other, after in zip(first, second, [*first[1:], None], strict=True):
        assert torch.equal(one, other)
        fooled = mean_is_wrong(one, label)
        outvoted += int((wrong(minds[1], one, label) & ~fooled).sum())
        label = label[~fooled]
        assert after is None or len(after) == len(label)
    assert 0 < len(label) == int((~mean_is_wrong(adversarial, y)).sum()) < 48
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
        return noise(model, x, y, generator=noise_for(x), norm=norm, eps=eps, draws=20)

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
    fooled = wrong(model.inner, result, y)[4:]
    assert torch.equal(result[:4], x[:4]) and 0 < fooled.sum() < 28
    counts = [len(point) for point in model.seen]
    assert counts[:2] == [32, 28] and counts == sorted(counts, reverse=True) and counts[-1] < 28


# --- gradients that vanish --------------------------------------------------------------------------


def scaled(model, scale):
    return Through(model, lambda logits: logits * scale)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["log_odds", "rescaled_ce", "margin", "dlr"])
@pytest.mark.parametrize("scale", [1e-25, 1e6])
def test_the_scale_of_the_logits_is_no_defence(norm, loss, scale):
    model, x = small_net(), images(64)
    y = predictions(model, x)
    settings = {"norm": norm, "eps": EPS[norm], "steps": 20, "loss": loss}
    plain = wrong(model, attack(model, x, y, **settings), y).sum()
    assert 10 < plain < 64
    assert wrong(model, attack(scaled(model, scale), x, y, **settings), y).sum() >= plain - 2


def test_cross_entropy_saturates():
    """What log_odds is for. At x30 the squares of ce's gradients underflow, at x1e6 they themselves do."""
    model, x = small_net(), images(64)
    y = predictions(model, x)
    settings = {"eps": 0.15, "steps": 40, "random_start": False, "loss": "ce"}
    assert wrong(model, attack(scaled(model, 30), x, y, **settings), y).sum() > 10
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
    torch.testing.assert_close(slope.sum(1), torch.zeros(50).double())  # the scale is a constant
    torch.testing.assert_close(F.softplus(losses.log_odds(logits, y)), losses.ce(logits, y))
    a, b = (torch.autograd.grad(f(logits, y).sum(), logits)[0] for f in (losses.ce, losses.log_odds))
    torch.testing.assert_close(F.normalize(a), F.normalize(b))
    divergence = F.kl_div(logits.log_softmax(1), logits.flip(0).softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(losses.kl(logits, logits.flip(0)), divergence)


# --- the world around an attack ---------------------------------------------------------------------

ALL = [
    partial(Adaptive, eps=0.3, steps=5),
    partial(fmn, eps=0.3, steps=5),
    partial(pgd, eps=0.3, steps=3, gradient="straight_through"),
    partial(pgd, eps=0.3, steps=3, gradient="finite_differences", directions=3),
    partial(pgd, eps=0.3),
    partial(pgd, eps=0),
    partial(noise, eps=0.3),
    partial(PaperPGD, eps=0.3, steps=3),
    partial(AutoAttack, eps=0.3, attacks=["apgd-ce", "square"], queries=5),
    partial(AutoAttack, eps=0),
]


@pytest.mark.parametrize("call", ALL, ids=name)
def test_an_attack_leaves_no_trace(call):
    """Neither on the model (modes, requires_grad, gradients, buffers) nor the random state nor the images."""
    model, x = partly_trained(small_net()), images(6)
    y = predictions(model, x)
    before, rng, source = state_of(model), torch.get_rng_state(), (x.clone(), y.clone())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = run(call, model, x, y)
    assert state_of(model) == before and torch.equal(torch.get_rng_state(), rng)
    assert not x.requires_grad and x.grad is None and not adversarial.requires_grad
    adversarial.fill_(7)
    assert torch.equal(x, source[0]) and torch.equal(y, source[1])


@pytest.mark.parametrize("mode", [evaluating, frozen, attacking])
def test_modes_are_restored_after_an_exception(mode):
    model = partly_trained(small_net())
    before = state_of(model)
    with pytest.raises(KeyError), mode(model):
        assert mode is frozen or not any(module.training for module in model.modules())
        assert mode is evaluating or not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
    assert state_of(model) == before


@pytest.mark.parametrize("outer", [partial(torch.autocast, "cpu", torch.bfloat16), torch.no_grad, torch.inference_mode])
def test_outer_modes_change_nothing(outer):
    model, x = small_net(), images()
    y = predictions(model, x)
    expected = attack(model, x, y)
    with outer():
        assert torch.equal(attack(model, x.clone(), y.clone()), expected)
        assert torch.is_inference_mode_enabled() == (outer is torch.inference_mode)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_computed_in_full_precision(precision):
    backends = torch.backends

    def switches():
        return torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32

    try:
        torch.set_float32_matmul_precision(precision)
        before = switches()
        with modes.full_precision():
            assert switches() == ("highest", False, False)
            if hasattr(backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
                owners = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
                assert {owner.fp32_precision for owner in owners} <= {"ieee", "none"}
        assert switches() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("settings", [{}, {"drop_fooled": False}, {"norm": "Linf", "restarts": 2}])
def test_layout_is_kept(settings):
    model, x = small_net(), images().to(memory_format=torch.channels_last)
    y = predictions(model, x)
    result = attack(model, x, y, **settings)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, attack(model, x.contiguous(), y, **settings), rtol=0, atol=1e-4)
    strided = images(48)[::2]
    assert torch.equal(attack(model, strided, y, **settings), attack(model, strided.contiguous(), y, **settings))


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "x", "settings", "message"),
    [
        (4, images(), {"restarts": 2, "random_start": False}, "restarts=2: "),
        (4, images(), {"loss": "kl", "random_start": False}, "loss=kl: .*random_start=true"),
        (4, images(), {"loss": "kl", "targeted": True}, "loss=kl: .*targeted=false"),
        (2, images(), {"loss": "dlr"}, "loss=dlr: needs 3 classes"),
        (1, images(), {}, r"\(24, 1\): expected .*2 classes or more"),
        (1, images(), {"targeted": True}, "2 classes or more"),
        (4, images() * 2 - 1, {}, r"must be in \[0, 1\]"),
        (4, torch.full((24, 3, 6, 6), torch.nan), {}, r"must be in \[0, 1\]"),
    ],
)
def test_faults(classes, x, settings, message):
    with pytest.raises(UserError, match=message):
        attack(small_net(classes), x, torch.zeros(len(x), dtype=torch.int64), **settings)


@pytest.mark.parametrize("other", [torch.zeros(()), torch.zeros((), requires_grad=True)])
def test_a_model_without_gradients(other):
    model, x = Through(small_net(), lambda z: z.detach() + other), images()
    y = predictions(model, x)
    for call in (partial(pgd, eps=0.3), partial(PaperPGD, eps=0.3)):
        with pytest.raises(NoGradient, match="do not depend differentiably on the image"):
            run(call, model, x, y)
    call = partial(noise, eps=0.5)  # needs none
    assert torch.equal(run(call, model, x, y), run(call, model.inner, x, y))


@pytest.mark.parametrize("classes", [2, 3])
def test_targeted_with_few_classes(classes):
    model, x = wavy_net(classes), images()
    y = predictions(model, x)
    settings = {"targeted": True, "loss": "margin", "steps": 5, "eps": 0.1}
    with collect_warnings() as messages:
        found = attack(model, x, y, restarts=9, **settings)
    assert len(messages) == 1 and messages[0].startswith(f"restarts=9: reduced to {classes - 1}")
    assert torch.equal(found, attack(model, x, y, restarts=classes - 1, **settings))
    assert wrong(model, found, y).any()


# --- what is not finite is misclassified --------------------------------------------------------------


class Cliff(nn.Module):
    """A linear model that returns `beyond` wherever the mean of an image has grown by `width`."""

    def __init__(self, x, beyond, width):
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
@pytest.mark.parametrize("call", FINITE, ids=name)
def test_a_model_that_is_not_finite_is_fooled(call, beyond):
    x = images(4, low=0.4, high=0.6)
    model = Cliff(x, torch.tensor(beyond), width=0.0005)
    x = x - (x.mean((1, 2, 3), keepdim=True) - x.mean())  # all of them just before the edge
    y = predictions(model, x)
    with collect_warnings() as messages:
        found = run(partial(call, norm="L2", eps=0.4), model, x, y)
    assert found.isfinite().all() and (sizes(found - x, "L2") <= 0.4 + 1e-6).all()
    found = modes.predictions(model(found))
    assert (found == -1).any() and ((found != y).all() or call.func is AutoAttack)  # which does not look everywhere
    assert any("NaN or infinity" in message for message in messages)


@pytest.mark.parametrize("call", [partial(pgd), *FINITE[-4:-1], partial(PaperPGD)], ids=name)
def test_a_gradient_that_is_not_finite(call):
    x = images(4)
    model = Through(small_net(), lambda z: z + (0 * z[:, :1].detach() + 0 * z[:, :1]).sqrt())  # 0, slope NaN
    with collect_warnings() as messages:
        found = run(partial(call, eps=0.3), model, x, predictions(model, x))
    assert found.isfinite().all() and (sizes(found - x, "L2") <= 0.3 + 1e-6).all()
    assert any("NaN or infinity" in message for message in messages)


# --- random numbers and warnings --------------------------------------------------------------------


def test_noise_depends_on_the_image_alone():
    x = images(6)
    together = noise_for(x, seed=5)
    first, second = together.normal(x), together.uniform(x[:, :1, :1, :1])
    for i in (4, 0):
        alone = noise_for(x[i : i + 1], seed=5)
        assert torch.equal(alone.normal(x[i : i + 1])[0], first[i])
        assert torch.equal(alone.uniform(x[i : i + 1, :1, :1, :1])[0], second[i])
    assert len({row.sum().item() for row in first}) == 6
    others = [noise_for(x, 6), type(together).for_images(x, 5, salt="pgd")]
    assert not any(torch.equal(other.normal(x), first) for other in others)


def test_noise_is_the_same_for_bytes_floats_layouts_and_dtypes():
    raw = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    x = raw.float() / 255
    expected = noise_for(raw).normal(x)
    last = x.to(memory_format=torch.channels_last)
    drawn = noise_for(last).normal(last)
    assert torch.equal(drawn, expected) and drawn.is_contiguous(memory_format=torch.channels_last)
    double = noise_for(x.double()).normal(x.double())
    assert double.dtype == torch.float64 and torch.equal(double.float(), expected)


@pytest.mark.parametrize("index", [torch.tensor([True, False, False, True, False]), torch.tensor([4, 1])])
def test_a_part_of_a_generator_continues_its_streams(index):
    x = images(5)
    first, second = noise_for(x), noise_for(x)
    first.normal(x), second.normal(x)
    assert torch.equal(first[index].normal(x[index]), second.normal(x)[index])


def test_batch_generator():
    x = images().to(memory_format=torch.channels_last)
    one, two, all_rows = (BatchGenerator(torch.Generator().manual_seed(3), len(x)) for _ in range(3))
    assert one.seed == 3
    index, again = torch.tensor([2, 0]), torch.tensor([False, True])  # the numbers of a sample are its own
    expected = [all_rows.normal(x), all_rows.uniform(x), all_rows.normal(x)]
    assert not torch.equal(expected[0], expected[2])
    assert torch.equal(one[index].normal(x[index].contiguous()), expected[0][index])
    assert torch.equal(one[index].uniform(x[index]), expected[1][index])
    assert torch.equal(one[index][again].normal(x[:1]), expected[2][:1])
    assert torch.equal(two[torch.arange(len(x) - 1, -1, -1)].normal(x), expected[0].flip(0))


def test_warnings_are_collected_once(caplog):
    with caplog.at_level(logging.WARNING, logger="aerl.attacks"):
        with collect_warnings() as messages:
            for text in ("one", "two", "one"):
                warn(text)
        warn("three")
    assert messages == ["one", "two"]
    assert caplog.messages == ["one", "two", "three"]
