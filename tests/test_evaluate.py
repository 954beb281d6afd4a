"""Per-sample outcomes: which samples are attacked, that their order does not matter, and what is counted."""

import copy
import errno
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from aerl.attacks import AutoAttack, collect_warnings, pgd
from aerl.data import Split, subset
from aerl.errors import UserError
from aerl.evaluation import evaluate
from aerl.evaluation.evaluate import run_attack
from aerl.evaluation.outcomes import Attacked, accuracy, check_within, so_far
from aerl.evaluation.statistics import reward
from aerl.models import AliCNN
from aerl.runtime.device import is_out_of_memory


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))


@pytest.fixture(scope="module")
def predicted(hardware):
    """`predicted(model, split)`: the clean outcomes."""
    return lambda model, split, batch_size=45: evaluate.predict(model, split, hardware, batch_size)


@pytest.fixture(scope="module")
def split(model, predicted) -> Split:
    """Random images; two thirds carry the model's own prediction as their label."""
    images = torch.randint(0, 256, (45, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.from_numpy(predicted(model, Split(images, torch.zeros(45, dtype=torch.int64))).pred)
    labels[::3] = (labels[::3] + 1) % 3
    return Split(images, labels)


@pytest.fixture
def attacked(model, split, predicted, hardware):
    """`attacked(attack)`: the outcomes of an attack, by its parts."""

    def run(attack, batch_size=45, model=model, split=split, **options):
        clean = predicted(model, split, batch_size)
        return run_attack(attack, model, split, clean, hardware, name="a", seed=0, batch_size=batch_size, **options)

    return run


def own(call):
    """The same as an attack: a function of the images alone, or of model and images."""
    return lambda model, x, y, *, generator: call(x)


weak_pgd = partial(pgd, norm="L2", eps=0.3, steps=3)


def test_only_samples_that_are_right_are_attacked(split, attacked):
    seen = []

    def spy(model, x, y, *, generator):
        seen.append(len(x))
        assert (model(x).argmax(1) == y).all()
        return weak_pgd(model, x, y, generator=generator)

    found = attacked(spy, 8)["a"]
    assert sum(seen) == 30
    assert (found.samples["l2"][::3] == 0).all() and (found.pred[::3] != split.labels[::3].numpy()).all()
    assert found.samples["l2"].max() > 0
    wrong = Split(split.images[::3], split.labels[::3])
    assert (attacked(spy, split=wrong)["a"].samples["l2"] == 0).all() and sum(seen) == 30


@pytest.mark.parametrize("batch_size", [1, 7, 45])
def test_batch_size_and_order_change_no_outcome(split, attacked, batch_size):
    order = torch.randperm(45, generator=torch.Generator().manual_seed(2))
    straight = attacked(weak_pgd)["a"]
    other = attacked(weak_pgd, batch_size, split=Split(split.images[order], split.labels[order]))["a"]
    assert np.array_equal(straight.pred[order.numpy()], other.pred)
    np.testing.assert_allclose(straight.samples["l2"][order.numpy()], other.samples["l2"], atol=1e-5)


autoattack = partial(AutoAttack, norm="L2", eps=0.25, batch_size=8, queries=60)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("attack", [weak_pgd, autoattack(attacks=["apgd-ce", "square"])], ids=["pgd", "autoattack"])
def test_resumes_to_the_same_outcomes(split, attacked, attack):
    expected = attacked(attack, 8)["a"]
    assert 0 < (expected.pred == split.labels.numpy()).sum() < 30  # some are fooled, some are not
    state, batches = None, 0
    while True:
        states = []

        def stop_at_the_second(stage, states=states):
            states.append(copy.deepcopy(stage))
            if len(states) == 2:
                raise Interrupted

        try:
            again = attacked(attack, 8, resume=state, save=stop_at_the_second)["a"]
            break
        except Interrupted:
            state, batches = states[0], batches + 1  # what the second batch did is lost
    assert batches >= 3
    assert np.array_equal(expected.examples, again.examples)
    for key, values in expected.samples.items():
        assert np.array_equal(values, again.samples[key]), key


def test_each_stage_gets_the_survivors_of_those_before(split, attacked):
    seen = []

    class Staged:
        def stages(self, model, x):
            return [partial(self.blacken, 0.0), partial(self.blacken, 0.5)]

        def __call__(self, model, x, y, *, generator):
            raise AssertionError("its stages run instead")

        def blacken(self, threshold, model, x, y, *, generator):
            seen.append(len(x))
            black = (x.mean((1, 2, 3)) > 0.5) == (threshold == 0.0)
            return torch.where(black[:, None, None, None], torch.zeros_like(x), x)

    found = attacked(Staged())["a"]
    fooled = int(((found.samples["linf"] > 0) & (found.pred != split.labels.numpy())).sum())
    assert len(seen) == 2 and seen[0] == 30 and 30 - seen[1] <= fooled


def test_a_model_without_a_gradient(split, attacked, predicted):
    class Rounded(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3)), x[:, 0, 0, 0]], 1).detach().round(decimals=2)

    model = Rounded()
    labels = predicted(model, split).pred
    right = Split(split.images, torch.from_numpy(labels))
    with collect_warnings() as warnings:
        found = attacked(autoattack(), model=model, split=right)["a"]
        unharmed = attacked(weak_pgd, model=model, split=right)["a"]
    assert any("not run" in warning for warning in warnings)
    assert (found.pred != labels).any()  # Square needs no gradient
    assert (unharmed.pred == labels).all() and (unharmed.samples["l2"] == 0).all()


def test_sampled_policy(model, split, attacked, predicted):
    """The worst case of a sampled policy is the mean, over samples, of its least expected reward."""
    clean, found = predicted(model, split), attacked(partial(weak_pgd, drop_fooled=False), policy="sample")["a"]
    outcomes = {"label": split.labels.numpy(), **clean.columns("clean"), **found.columns("a")}
    assert (found.samples["l2"] > 0).all()  # also those whose argmax is wrong
    assert (found.samples["p"] <= clean.samples["p"] + 1e-6).all()
    value = accuracy(outcomes, ["a"], "sample")["value"]
    assert value == pytest.approx(float(np.minimum(clean.samples["p"], found.samples["p"]).mean()), abs=1e-6)
    with torch.no_grad():
        policy = model(split.images.float() / 255).softmax(1)
    draws = torch.multinomial(policy, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    drawn = (draws == split.labels[:, None]).float().mean().item()
    assert accuracy(outcomes, [], "sample")["value"] == pytest.approx(drawn, abs=0.01)


def test_so_far_has_each_sample_under_the_first_attack_that_fooled_it():
    outcomes = {"label": np.zeros(4, int), "clean_pred": np.array([0, 0, 0, 1])}
    clean = Attacked({"pred": outcomes["clean_pred"], "l2": np.zeros(4)}, np.zeros((0, 1, 2, 2)))
    for name, pred, size in (("a", [0, 1, 0, 1], 0.1), ("b", [0, 2, 2, 0], 0.2)):
        outcomes |= {f"{name}_pred": np.array(pred), f"{name}_l2": np.full(4, size)}
    state = so_far(outcomes, clean, ["a", "b"])
    assert state.pred.tolist() == [0, 1, 2, 1]
    np.testing.assert_allclose(state.samples["l2"], [0, 0.1, 0.2, 0])
    assert (clean.pred == [0, 0, 0, 1]).all()


def test_worst_case_counts_samples_not_attacks():
    pred = {"label": [0, 0, 0, 0], "clean_pred": [0, 0, 0, 1], "a_pred": [0, 1, 0, 1], "b_pred": [0, 0, 1, 0]}
    outcomes = {name: np.array(values) for name, values in pred.items()}
    # Right only under attack b is not robust.
    for attacks, value in (((), 0.75), (["a"], 0.5), (["b"], 0.5), (["a", "b"], 0.25)):
        assert accuracy(outcomes, attacks)["value"] == value


def test_parts_and_examples_of_an_attack(split, attacked):
    found = attacked(own(lambda x: {"still": x, "black": torch.zeros_like(x)}), 8)
    assert set(found) == {"a_still", "a_black"}
    assert (found["a_still"].samples["linf"] == 0).all() and found["a_black"].samples["linf"].max() > 0.9
    moved = attacked(weak_pgd, 8)["a"]
    distances = np.sqrt(((moved.examples - split.images[:16].float().numpy() / 255) ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(distances, moved.samples["l2"][:16], atol=1e-5)


def test_the_subset_is_the_same_for_every_run(split):
    first, again = subset(split, 10), subset(split, 10)
    assert torch.equal(first.images, again.images) and len(first) == 10
    assert subset(split, None) is split and subset(split, 1000) is split


def refusal(attacked, attack, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        check_within("a", attacked(attack, *args, **options)["a"], "Linf", 0.1)
    line = str(error.value)
    assert line.startswith("attack.a: ") and "\n" not in line
    return line


def in_a_view(x):
    x.detach().numpy()[:] = 0.5
    return x


@pytest.mark.parametrize(
    "cheat", [lambda x: (x + 0.5).clamp(0, 1), lambda x: x.fill_(0.5), in_a_view, lambda x: x.flip(0)]
)
def test_an_attack_that_leaves_its_ball_is_refused(attacked, cheat):
    """Also by writing into its images, or by changing their order."""
    assert "left its Linf ball" in refusal(attacked, own(cheat))


def test_an_attack_that_leaves_the_box_is_refused(attacked):
    assert "left the box: a pixel is 0.1" in refusal(attacked, own(lambda x: x + 0.1))
    check_within("a", attacked(own(lambda x: x + 0.1))["a"], "Linf", 0.2, boxed=False)


def test_what_an_attack_changes_later_does_not_count(model, split, attacked, predicted):
    """Images of batches before, while they still count; its labels."""

    def changes(model, x, y, *, generator, earlier=[]):  # noqa: B006
        y.add_(1).remainder_(3)
        for images in earlier:
            images.fill_(0.5)
        earlier.append(x.clone())
        return earlier[-1]

    found = attacked(changes, 8)["a"]
    for key, values in predicted(model, split).samples.items():
        np.testing.assert_allclose(found.samples[key], values, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_another_precision(model, split, attacked, predicted, dtype):
    def moved(x):
        return (0.25 + 0.5 * x).to(dtype).requires_grad_()

    found, x = attacked(own(moved))["a"], split.images.float() / 255
    expected = (moved(x).float() - x).abs().amax((1, 2, 3)).detach().numpy()
    right = predicted(model, split).pred == split.labels.numpy()
    np.testing.assert_allclose(found.samples["linf"], np.where(right, expected, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (lambda x: None, "NoneType"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: x[1:], r"\(29, 1, 8, 8\)"),
        (lambda x: x.flatten(1), r"\(30, 64\)"),
        (lambda x: x.expand(-1, 3, -1, -1), r"\(30, 3, 8, 8\)"),
        (lambda x: (x * 255).to(torch.uint8), "uint8"),
        (lambda x: x.to("meta"), "meta"),
        (lambda x: torch.where(x > 0.5, torch.nan, x), "NaN"),
        (lambda x: x + torch.tensor([torch.inf] + 29 * [0.0])[:, None, None, None], "1 of 30"),
        (lambda x: {}, r"\[\]"),
        (lambda x: {"a/b": x}, "a/b"),
        (lambda x: {"one": x, "two": None}, "as two NoneType"),
        (lambda x, seen=[]: seen.append(0) or dict.fromkeys(("one", "two")[: len(seen)], x), "a_two"),
    ],
)
def test_anything_but_images_is_refused(attacked, returned, named):
    assert re.search(named, refusal(attacked, own(returned), 30 if named != "a_two" else 8))


@pytest.mark.parametrize(
    "alter",
    [
        lambda model: model[0].weight.data.mul_(-2),
        lambda model: model[3].bias.copy_(model[3].bias.flip(0)),
        lambda model: model[4].running_mean.add_(1),
        lambda model: setattr(model[0], "bias", None),
        lambda model: model.train(),
        lambda model: model.half(),
        lambda model: setattr(model, "4", nn.Identity()),
        lambda model: setattr(model, "forward", lambda x: torch.zeros(len(x), 3)),
        lambda model: model[4].register_forward_hook(lambda module, args, output: -output),
    ],
)
def test_what_an_attack_changes_in_the_model_does_not_count(model, split, attacked, predicted, alter):
    """It gets a copy, new for every batch, in eval mode with frozen parameters."""
    victim = nn.Sequential(*copy.deepcopy(model), nn.BatchNorm1d(3, affine=False)).train()
    before = copy.deepcopy(victim.state_dict())

    def changes(model, x, y, *, generator):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(model[0].weight, before["0.weight"]) and not model[4]._forward_hooks
        with torch.no_grad():
            alter(model)
        return x

    found, clean = attacked(changes, 8, model=victim)["a"], predicted(victim, split, 8)
    assert np.array_equal(found.pred, clean.pred) and np.array_equal(found.samples["p"], clean.samples["p"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in victim.state_dict().items())
    assert all(module.training for module in victim.modules())


class Sick(nn.Module):
    """A model whose logits are `value` where `sick` is true of an image."""

    def __init__(self, model, sick, value=torch.nan):
        super().__init__()
        self.model, self.sick, self.value = model, sick, value

    def forward(self, x):
        return torch.where(self.sick(x)[:, None], self.value, self.model(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_is_wrong(model, split, predicted, value):
    labels = torch.zeros(45, dtype=torch.int64)  # which argmax gives for NaN
    with collect_warnings() as warnings:
        clean = predicted(Sick(model, lambda x: x[:, 0, 0, 0] > 0.5, value), Split(split.images, labels), 8)
    sick = split.images[:, 0, 0, 0].numpy() / 255 > 0.5
    assert (clean.pred[sick] == -1).all() and (clean.pred[~sick] >= 0).all()
    outcomes = {"label": labels.numpy(), **clean.columns("clean")}
    for policy in ("argmax", "sample"):
        rewards = reward(outcomes, [], policy)
        assert (rewards[sick] == 0).all() and np.isfinite(rewards).all()
    assert all(np.isfinite(values).all() for values in clean.samples.values())
    assert [warning.split()[0] for warning in warnings] == [str(sick.sum())]


def test_not_finite_on_adversarial_images(model, split, attacked, predicted):
    found = attacked(own(torch.zeros_like), model=Sick(model, lambda x: x.amax((1, 2, 3)) == 0))["a"]
    right = predicted(model, split).pred == split.labels.numpy()
    assert (found.pred[right] == -1).all() and (found.pred[~right] >= 0).all()


@pytest.mark.parametrize("error", [KeyError("x"), NotImplementedError(), AssertionError("a\nb"), SystemExit(0)])
def test_exceptions_of_foreign_code(model, attacked, error):
    def raises(*args, **kwargs):
        raise error

    sick = Sick(model, lambda x: raises() if len(x) == 1 else x[:, 0, 0, 0] > 2)
    for line in (refusal(attacked, raises), refusal(attacked, weak_pgd, 29, model=sick)):
        assert type(error).__name__ in line


def test_exceptions_of_our_own_code(split, attacked, predicted, monkeypatch):
    model = AliCNN(num_classes=3, channels=1, size=(8, 8), hidden=8)
    right = Split(split.images, torch.from_numpy(predicted(model, split).pred))
    monkeypatch.setattr("aerl.attacks.losses.log_odds", lambda *args: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        attacked(weak_pgd, model=model, split=right)


class Narrow(nn.Module):
    """A model on a device that has memory for so many images at a time."""

    def __init__(self, model, room, error=torch.OutOfMemoryError("tried to allocate")):  # noqa: B008
        super().__init__()
        self.model, self.room, self.error = model, room, error

    def forward(self, x):
        if len(x) > self.room:
            raise self.error
        return self.model(x)


def test_out_of_memory_halves_the_batch(model, split, attacked, predicted):
    expected = attacked(weak_pgd)["a"]
    with collect_warnings() as warnings:
        found = attacked(weak_pgd, model=Narrow(model, 6))["a"]
    assert np.array_equal(expected.pred, found.pred)
    np.testing.assert_allclose(expected.samples["l2"], found.samples["l2"], atol=1e-5)
    halvings = [warning for warning in warnings if warning.startswith("out of memory")]
    assert len(halvings) == len(set(halvings)) and "continuing with 3;" in halvings[-1]
    with pytest.raises(UserError, match="a single image"):
        predicted(Narrow(model, 0), split)


def real_errors():
    """Of the CPU's allocators, and, as the libraries word it, of a GPU's."""
    for allocate in (lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: bytearray(2**60)):
        with pytest.raises(Exception) as error:
            allocate()
        yield error.value
    yield RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    yield RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    yield RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
    yield RuntimeError("could not create a primitive")  # oneDNN, under a limit of the address space
    yield OSError(errno.ENOMEM, "Cannot allocate memory")


def test_out_of_memory_of_every_library(model, split, predicted):
    expected = predicted(model, split).pred
    for error in real_errors():
        assert is_out_of_memory(error), error
        assert np.array_equal(predicted(Narrow(model, 20, error), split).pred, expected)
    for text in ("mat1 and mat2 shapes cannot be multiplied", "could not create a primitive descriptor for a matmul"):
        assert not is_out_of_memory(RuntimeError(text))
