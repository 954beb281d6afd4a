"""`attack=adaptive` on networks whose robust accuracy is known, because each is a change of one that hides nothing."""

import copy

import numpy as np
import pytest
import torch
import torch.overrides
from torch import nn
from torch.nn import functional as F

from aerl.attacks import Adaptive, AttackSpec, NoGradient, collect_warnings, noise, pgd
from aerl.attacks.adaptive import diagnose
from aerl.data import Split
from aerl.evaluation.evaluate import predict, run_attack
from aerl.evaluation.evidence import Evidence
from tests.nets import Through, digits_net, noise_for, sizes, wrong

EPS = 0.5


class Before(nn.Module):
    """`inner` of the images after a `change`."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x):
        return self.inner(self.change(x))


class ZeroGradient(torch.autograd.Function):
    """A step function with a gradient of its own, which no function mode can reach."""

    @staticmethod
    def forward(ctx, x):
        return (15 * x).round() / 15

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


class Decoy(nn.Module):
    """The gradient is that of a sine too small to decide anything."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).detach() + 1e-4 * (9 * x.flatten(1)[:, :10]).sin()


def in_numpy(x):
    """With another shape outside torch, so that no straight-through gradient finds its way back."""
    return torch.tensor(np.round(x.detach().numpy().reshape(len(x), -1) * 15) / 15).view_as(x)


MASKS = {
    "quantised": (lambda net: Before(net, lambda x: (15 * x).round() / 15), ["straight_through"]),
    "integers": (lambda net: Before(net, lambda x: (x * 255).byte().float() / 255), ["straight_through"]),
    "detached": (Decoy, ["straight_through"]),
    "saturated softmax": (lambda net: Through(net, lambda z: (1000 * z).softmax(1)), ["straight_through"]),
    "autograd function": (lambda net: Before(net, ZeroGradient.apply), ["finite_differences"]),
    "numpy": (lambda net: Before(net, in_numpy), ["finite_differences"]),
}


@pytest.fixture(scope="module")
def digits():
    """A network, with images that it has not seen and classifies correctly, and the accuracy under plain PGD."""
    net, x, y = digits_net(10, 6, unseen=120)
    right = ~wrong(net, x, y)
    x, y = x[right], y[right]
    found = pgd(net, x, y, generator=noise_for(x), norm="L2", eps=EPS, restarts=5)
    return net, x, y, (~wrong(net, found, y)).float().mean().item()


def robust(model, attack, x, y):
    found = attack(model, x, y, generator=noise_for(x))
    assert sizes(found - x, "L2").max() <= EPS * (1 + 1e-5)
    return (~wrong(model, found, y)).float().mean().item()


def plain(model, x, y, *, generator):
    try:
        return pgd(model, x, y, generator=generator, norm="L2", eps=EPS, loss="ce")
    except NoGradient:
        return x.clone()


@pytest.mark.parametrize("mask", MASKS)
def test_finds_what_is_hidden(digits, mask):
    net, x, y, truth = digits
    make, remedies = MASKS[mask]
    model = make(net).eval()
    attack = Adaptive(eps=EPS)
    assert list(attack.stages(model, x[:16])) == remedies
    right = ~wrong(model, x, y)
    assert right.float().mean() > 0.9
    without = robust(model, plain, x[right], y[right])
    assert without > truth + 0.1
    assert abs(robust(model, attack, x[right], y[right]) - truth) < 0.08


def test_a_randomised_model_is_averaged_over_passes(digits):
    net, x, _, _ = digits
    torch.manual_seed(0)
    passes = [
        diagnose(Before(net, lambda x: x + size * torch.randn_like(x)).eval(), x[:16], norm="L2", eps=EPS).passes  # noqa: B023
        for size in (0.02, 0.5)
    ]
    assert passes[0] == 2 < passes[1] <= 64
    noisy = Before(net, lambda x: F.dropout(x, 0.3, training=True)).eval()
    assert list(Adaptive(eps=EPS).stages(noisy, x[:16])) == ["averaged"]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh])
@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_an_honest_model_needs_no_remedy(digits, activation, norm):
    _, x, y, _ = digits
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), activation(), nn.Dropout(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    attack = Adaptive(norm=norm, eps=0.5 if norm == "L2" else 0.1)
    assert attack.stages(net.eval(), x[:16]) == {}
    assert torch.equal(attack(net, x, y, generator=noise_for(x)), x)


def test_a_model_that_fails_under_a_function_mode_is_attacked_without_repairs(digits):
    net, x, _, _ = digits

    def refuse(images):
        if torch.overrides._get_current_function_mode_stack():
            raise RuntimeError("no modes here")
        return ZeroGradient.apply(images)

    model = Before(net, refuse).eval()
    with collect_warnings() as warnings:
        assert list(Adaptive(eps=EPS).stages(model, x[:16])) == ["finite_differences"]
    assert any("no modes here" in warning for warning in warnings)
    scripted = torch.jit.script(net)  # whose operations no function mode sees
    assert Adaptive(eps=EPS).stages(scripted, x[:16]) == {}


def test_remedies_are_reported_one_by_one_each_for_the_survivors_of_the_ones_before(digits, hardware):
    net, x, y, _ = digits
    split = Split((x * 255).round().byte(), y)
    model = Before(net, ZeroGradient.apply).eval()

    class Two:
        def stages(self, model, x):
            assert x.shape == (16, 1, 8, 8)
            shared = {"norm": "L2", "eps": EPS}
            return {
                "noise": lambda *args, generator: noise(*args, generator=generator, **shared),
                "differences": lambda *args, generator: pgd(
                    *args, generator=generator, gradient="finite_differences", steps=20, directions=16, **shared
                ),
            }

        def __call__(self, model, x, y, *, generator):
            raise AssertionError("its stages run instead")

    before = predict(model, split, hardware, 50)
    found = run_attack(AttackSpec.of(Two()), model, split, before, hardware, name="two", seed=0, batch_size=50)
    assert list(found) == ["two_noise", "two_differences"]
    first, second = (part.pred == y.numpy() for part in found.values())
    assert second.sum() < first.sum() <= len(y)
    assert not (second & ~first).any()


def test_a_model_that_needs_nothing_is_reported_unchanged(digits, hardware):
    net, x, y, _ = digits
    split = Split((x * 255).round().byte(), y)
    before = predict(net, split, hardware, 50)
    attack = AttackSpec.of(Adaptive(eps=EPS))
    found = run_attack(attack, net, split, before, hardware, name="adaptive", seed=0, batch_size=50)
    assert list(found) == ["adaptive"]
    assert np.array_equal(found["adaptive"].pred, before.pred)


class Interrupted(Exception):
    pass


def test_remedies_resume_to_the_same_outcomes_and_evidence(digits, hardware, tmp_path):
    net, x, y, _ = digits
    split = Split((x * 255).round().byte(), y)
    before = predict(net, split, hardware, 25)

    class Two:
        def stages(self, model, x):
            shared = {"norm": "L2", "eps": EPS}
            return {
                "short": lambda *args, generator: pgd(*args, generator=generator, steps=2, **shared),
                "long": lambda *args, generator: pgd(*args, generator=generator, steps=20, **shared),
            }

        def __call__(self, model, x, y, *, generator):
            raise AssertionError("its stages run instead")

    def run(evidence, **options):
        options |= {"name": "a", "seed": 0, "batch_size": 25, "keep": evidence.keep}
        return run_attack(Two(), net, split, before, hardware, **options)

    fresh = before.pred == y.numpy()
    for folder in ("straight", "resumed"):
        (tmp_path / folder).mkdir()
    straight = Evidence(tmp_path / "straight", len(y), (1, 8, 8), fresh)
    expected, state, starts = run(straight), None, 0
    while True:
        states = []

        def stop_at_the_second(stage, states=states):
            states.append(copy.deepcopy(stage))
            if len(states) == 2:
                raise Interrupted

        left = fresh.copy()  # as a new process knows it
        for part in state.parts.values() if state else ():
            left &= part.pred == y.numpy()
        resumed = Evidence(tmp_path / "resumed", len(y), (1, 8, 8), left)
        try:
            again = run(resumed, resume=state, save=stop_at_the_second)
            break
        except Interrupted:
            state, starts = states[0], starts + 1
    assert starts >= 4 and list(again) == list(expected) == ["a_short", "a_long"]
    for part, attacked in expected.items():
        for key, values in attacked.samples.items():
            assert np.array_equal(values, again[part].samples[key]), (part, key)
    fooled = np.logical_or(*(attacked.pred != y.numpy() for attacked in expected.values())) & fresh
    assert fooled.sum() > 20
    assert np.array_equal(straight.images[fooled], resumed.images[fooled])
    shown = torch.from_numpy(np.array(straight.images[fooled]))
    assert wrong(net, shown, y[torch.from_numpy(fooled)]).all()
