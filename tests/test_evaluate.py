"""Per-sample outcomes: which samples are attacked, that their order is no matter, and what is counted."""

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
from aerl.evaluation import evaluate
from aerl.evaluation.evaluate import run_attack
from aerl.evaluation.outcomes import Attacked, accuracy, check_within, reward, so_far
from aerl.runtime.device import is_out_of_memory
from aerl.types import UserError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))


@pytest.fixture(scope="module")
def split(model, hardware) -> Split:
    """Random images; two thirds carry the model's own prediction as their label."""
    images = torch.randint(0, 256, (45, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    unlabelled = Split(images, torch.zeros(45, dtype=torch.int64))
    labels = torch.from_numpy(evaluate.predict(model, unlabelled, hardware, 45).pred)
    labels[::3] = (labels[::3] + 1) % 3
    return Split(images, labels)


def attacked(attack, model, split, hardware, batch_size=45, **options):
    clean = evaluate.predict(model, split, hardware, batch_size)
    return run_attack(attack, model, split, clean, hardware, name="a", seed=0, batch_size=batch_size, **options)


weak_pgd = partial(pgd, norm="L2", eps=0.3, steps=3)


def test_only_samples_that_are_right_are_attacked(model, split, hardware):
    seen = []

    def spy(model, x, y, *, generator):
        seen.append(len(x))
        assert (model(x).argmax(1) == y).all()
        return weak_pgd(model, x, y, generator=generator)

    found = attacked(spy, model, split, hardware, batch_size=8)["a"]
    assert sum(seen) == 30
    assert (found.samples["l2"][::3] == 0).all() and (found.pred[::3] != split.labels[::3].numpy()).all()
    assert found.samples["l2"].max() > 0


@pytest.mark.parametrize("batch_size", [1, 7, 45])
def test_batch_size_and_order_change_no_outcome(model, split, hardware, batch_size):
    order = torch.randperm(45, generator=torch.Generator().manual_seed(2))
    shuffled = Split(split.images[order], split.labels[order])
    straight = attacked(weak_pgd, model, split, hardware)["a"]
    other = attacked(weak_pgd, model, shuffled, hardware, batch_size)["a"]
    assert np.array_equal(straight.pred[order.numpy()], other.pred)
    np.testing.assert_allclose(straight.samples["l2"][order.numpy()], other.samples["l2"], atol=1e-5)


def autoattack(**settings) -> AutoAttack:
    return AutoAttack(norm="L2", eps=0.25, batch_size=8, queries=60, **settings)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("attack", [weak_pgd, autoattack(attacks=["apgd-ce", "square"])], ids=["pgd", "autoattack"])
def test_resumes_to_the_same_outcomes(model, split, hardware, attack):
    expected = attacked(attack, model, split, hardware, batch_size=8)["a"]
    assert 0 < (expected.pred == split.labels.numpy()).sum() < 30  # some fall, some do not
    state, batches = None, 0
    while True:
        kept = []

        def stop_at_the_second(stage, kept=kept):
            kept.append(copy.deepcopy(stage))
            if len(kept) == 2:
                raise Interrupted

        try:
            again = attacked(attack, model, split, hardware, batch_size=8, resume=state, save=stop_at_the_second)
            break
        except Interrupted:
            state, batches = kept[0], batches + 1  # what the second batch did is lost
    assert batches >= 3
    assert np.array_equal(expected.examples, again["a"].examples)
    for key, values in expected.samples.items():
        assert np.array_equal(values, again["a"].samples[key]), key


def test_stages_hand_on_survivors_only(model, split, hardware):
    """As a whole attack and as one stage after another it marks the same samples, and none twice."""
    seen = []

    class Staged:
        def stages(self, model, x):
            return [partial(self.one, 0.0), partial(self.one, 0.5)]

        def __call__(self, model, x, y, *, generator):
            raise AssertionError("its stages run instead")

        def one(self, threshold, model, x, y, *, generator):
            seen.append(len(x))
            black = (x.mean((1, 2, 3)) > 0.5) == (threshold == 0.0)
            return torch.where(black[:, None, None, None], torch.zeros_like(x), x)

    found = attacked(Staged(), model, split, hardware)["a"]
    fallen = int(((found.samples["linf"] > 0) & (found.pred != split.labels.numpy())).sum())
    assert len(seen) == 2 and seen[0] == 30 and 30 - seen[1] <= fallen


def test_a_model_without_a_gradient(split, hardware):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3)), x[:, 0, 0, 0]], 1).detach().round(decimals=2)

    labels = torch.from_numpy(evaluate.predict(Broken(), split, hardware, 45).pred)
    right = Split(split.images, labels)
    with collect_warnings() as warnings:
        found = attacked(autoattack(), Broken(), right, hardware)["a"]
        unharmed = attacked(weak_pgd, Broken(), right, hardware)["a"]
    assert any("not run" in warning for warning in warnings)
    assert (found.pred != labels.numpy()).any()  # Square needs no gradient
    assert (unharmed.pred == labels.numpy()).all() and (unharmed.samples["l2"] == 0).all()


def test_sampled_policy(model, split, hardware):
    """The worst case of a sampled policy is the mean, over samples, of its least expected reward."""
    attack = partial(weak_pgd, drop_fooled=False)
    clean = evaluate.predict(model, split, hardware, 45)
    found = attacked(attack, model, split, hardware, policy="sample")["a"]
    outcomes = {"label": split.labels.numpy(), "clean_pred": clean.pred, "clean_p": clean.samples["p"],
                "a_pred": found.pred, "a_p": found.samples["p"]}  # fmt: skip
    assert (found.samples["l2"] > 0).all()  # also those whose argmax is wrong
    assert (found.samples["p"] <= clean.samples["p"] + 1e-6).all()
    value = accuracy(outcomes, ["a"], "sample")["value"]
    assert value == pytest.approx(float(np.minimum(clean.samples["p"], found.samples["p"]).mean()), abs=1e-6)
    with torch.no_grad():
        x = split.images.float() / 255
        draws = torch.multinomial(model(x).softmax(1), 4000, replacement=True,
                                  generator=torch.Generator().manual_seed(0))  # fmt: skip
    drawn = (draws == split.labels[:, None]).float().mean().item()
    assert accuracy(outcomes, [], "sample")["value"] == pytest.approx(drawn, abs=0.01)


def test_survivors():
    outcomes = {"label": np.zeros(4, int), "clean_pred": np.array([0, 0, 0, 1])}
    clean = Attacked({"pred": outcomes["clean_pred"], "l2": np.zeros(4)}, np.zeros((0, 1, 2, 2)))
    for name, pred, size in (("a", [0, 1, 0, 1], 0.1), ("b", [0, 2, 2, 0], 0.2)):
        outcomes |= {f"{name}_pred": np.array(pred), f"{name}_l2": np.full(4, size)}
    state = so_far(outcomes, clean, ["a", "b"])
    assert state.pred.tolist() == [0, 1, 2, 1]  # the wrong one stays wrong, each other as the first left it
    np.testing.assert_allclose(state.samples["l2"], [0, 0.1, 0.2, 0])
    assert (clean.pred == [0, 0, 0, 1]).all()


def test_nothing_right(model, split, hardware):
    wrong = Split(split.images[::3], split.labels[::3])
    found = attacked(weak_pgd, model, wrong, hardware)["a"]
    assert (found.samples["l2"] == 0).all() and found.seconds < 5
    outcomes = {"label": wrong.labels.numpy(), "clean_pred": found.pred, "a_pred": found.pred}
    assert accuracy(outcomes, ["a"])["value"] == 0


def test_the_parts_of_an_attack_are_outcomes_of_their_own(model, split, hardware):
    def two(model, x, y, *, generator):
        return {"still": x, "black": torch.zeros_like(x)}

    found = attacked(two, model, split, hardware, batch_size=8)
    assert set(found) == {"a_still", "a_black"}
    assert (found["a_still"].samples["linf"] == 0).all()
    assert found["a_black"].samples["linf"].max() > 0.9


def test_examples_are_the_first_images_as_attacked(model, split, hardware):
    found = attacked(weak_pgd, model, split, hardware, batch_size=8)["a"]
    clean = split.images[:16].float().numpy() / 255
    moved = np.sqrt(((found.examples - clean) ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(moved, found.samples["l2"][:16], atol=1e-5)


def test_worst_case_counts_samples_not_attacks():
    outcomes = {
        "label": np.array([0, 0, 0, 0]),
        "clean_pred": np.array([0, 0, 0, 1]),
        "a_pred": np.array([0, 1, 0, 1]),
        "b_pred": np.array([0, 0, 1, 0]),
    }
    assert accuracy(outcomes)["value"] == 0.75
    assert accuracy(outcomes, ["a"])["value"] == 0.5
    assert accuracy(outcomes, ["b"])["value"] == 0.5  # right only after the attack is not robust
    assert accuracy(outcomes, ["a", "b"])["value"] == 0.25


def test_the_subset_is_the_same_for_every_run(split):
    first, again = subset(split, 10), subset(split, 10)
    assert torch.equal(first.images, again.images) and len(first) == 10
    assert subset(split, None) is split and subset(split, 1000) is split


def test_an_attack_that_leaves_its_ball(model, split, hardware):
    def cheats(model, x, y, *, generator):
        return (x + 0.5).clamp(0, 1)

    found = attacked(cheats, model, split, hardware)["a"]
    with pytest.raises(UserError, match=r"attack.a: left its Linf ball: a perturbation of 0.5"):
        check_within("a", found, "Linf", 0.1)
    check_within("a", found, "Linf", 0.5)


def test_an_attack_that_leaves_the_box(model, split, hardware):
    found = attacked(lambda model, x, y, *, generator: x + 0.1, model, split, hardware)["a"]
    with pytest.raises(UserError, match=r"attack.a: left the box: a pixel lies 0.1"):
        check_within("a", found, "Linf", 0.2)
    check_within("a", found, "Linf", 0.2, boxed=False)


def ends_in_one_line(attack, model, split, hardware, **options) -> str:
    with pytest.raises(UserError) as error:
        found = attacked(attack, model, split, hardware, **options)["a"]
        check_within("a", found, "Linf", 0.1)
    line = str(error.value)
    assert line.startswith("attack.a: ") and "\n" not in line
    return line


def writes_into_its_images(model, x, y):
    return x.fill_(0.5)


def writes_into_a_view(model, x, y):
    x.detach().numpy()[:] = 0.5
    return x


def shuffles(model, x, y):
    return x.flip(0)


def writes_later(model, x, y, kept=[]):  # noqa: B006
    for images in kept:  # of the batches before, while they still count
        images.fill_(0.5)
    kept.append(x.clone())
    return kept[-1]


@pytest.mark.parametrize("cheats", [writes_into_its_images, writes_into_a_view, shuffles])
def test_images_changed_in_place(model, split, hardware, cheats):
    line = ends_in_one_line(lambda model, x, y, *, generator: cheats(model, x, y), model, split, hardware)
    assert "left its Linf ball" in line


def test_images_changed_later(model, split, hardware):
    found = attacked(lambda model, x, y, *, generator: writes_later(model, x, y), model, split, hardware, 8)["a"]
    clean = evaluate.predict(model, split, hardware, 45)
    for key, values in found.samples.items():
        np.testing.assert_allclose(values, clean.samples[key], atol=1e-6)


def test_labels_changed_in_place(model, split, hardware):
    def relabels(model, x, y, *, generator):
        y.add_(1).remainder_(3)
        return x

    found = attacked(relabels, model, split, hardware)["a"]
    clean = evaluate.predict(model, split, hardware, 45)
    assert np.array_equal(found.pred, clean.pred) and np.array_equal(found.samples["p"], clean.samples["p"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_another_precision(model, split, hardware, dtype):
    def moved(model, x, y, *, generator):
        return (0.25 + 0.5 * x).to(dtype).requires_grad_()

    found = attacked(moved, model, split, hardware)["a"]
    x = split.images.float() / 255
    expected = (moved(model, x, None, generator=None).float() - x).abs().amax((1, 2, 3))
    right = evaluate.predict(model, split, hardware, 45).pred == split.labels.numpy()
    np.testing.assert_allclose(found.samples["linf"], np.where(right, expected.detach().numpy(), 0), atol=1e-6)


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
        (lambda x: {"one": x, "two": None}, "as two a NoneType"),
        (lambda x: {"one": x, "two": x[1:]}, "as two images"),
    ],
)
def test_anything_but_images_is_refused(model, split, hardware, returned, named):
    line = ends_in_one_line(lambda model, x, y, *, generator: returned(x), model, split, hardware)
    assert re.search(named, line)


def test_parts_of_some_batches_are_refused(model, split, hardware):
    def sometimes(model, x, y, *, generator, seen=[]):  # noqa: B006
        seen.append(0)
        return {"one": x} if len(seen) == 1 else {"one": x, "two": x}

    assert "a_two" in ends_in_one_line(sometimes, model, split, hardware, batch_size=8)


@pytest.mark.parametrize(
    "alter",
    [
        lambda model: model[0].weight.data.mul_(2),
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
def test_an_attack_that_alters_the_model_is_refused(model, split, hardware, alter):
    def changes(model, x, y, *, generator):
        with torch.no_grad():
            alter(model)
        return x

    altered = nn.Sequential(*copy.deepcopy(model), nn.BatchNorm1d(3, affine=False))
    assert "altered the model" in ends_in_one_line(changes, altered, split, hardware)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x


def test_a_model_may_change_its_own_buffers(model, split, hardware):
    """In eval mode with frozen parameters, whatever its own mode; a buffer of its own is not the attack's doing."""
    counting = nn.Sequential(*copy.deepcopy(model), Counting(), nn.Dropout())
    modes = []

    def spy(model, x, y, *, generator):
        modes.append((model[5].training, model[0].weight.requires_grad))
        model(x)
        return x

    attacked(spy, counting.train(), split, hardware, batch_size=8)
    assert len(modes) > 1 and set(modes) == {(False, False)} and counting[5].training


class Sick(nn.Module):
    """A model whose logits are not finite where `sick` says so of an image."""

    def __init__(self, model, sick, value=torch.nan):
        super().__init__()
        self.model, self.sick, self.value = model, sick, value

    def forward(self, x):
        return torch.where(self.sick(x)[:, None], self.value, self.model(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_is_wrong(model, split, hardware, value):
    labels = torch.zeros(45, dtype=torch.int64)  # which argmax gives for NaN
    with collect_warnings() as warnings:
        clean = evaluate.predict(Sick(model, lambda x: x[:, 0, 0, 0] > 0.5, value), Split(split.images, labels),
                                 hardware, 8)  # fmt: skip
    sick = split.images[:, 0, 0, 0].numpy() / 255 > 0.5
    assert (clean.pred[sick] == -1).all() and (clean.pred[~sick] >= 0).all()
    outcomes = {"label": labels.numpy(), "clean_pred": clean.pred, "clean_p": clean.samples["p"]}
    for policy in ("argmax", "sample"):
        rewards = reward(outcomes, [], policy)
        assert (rewards[sick] == 0).all() and np.isfinite(rewards).all()
    assert all(np.isfinite(values).all() for values in clean.samples.values())
    assert [warning.split()[0] for warning in warnings] == [str(sick.sum())]


def test_not_finite_on_adversarial_images(model, split, hardware):
    found = attacked(lambda model, x, y, *, generator: torch.zeros_like(x),
                     Sick(model, lambda x: x.amax((1, 2, 3)) == 0), split, hardware)["a"]  # fmt: skip
    right = evaluate.predict(model, split, hardware, 45).pred == split.labels.numpy()
    assert (found.pred[right] == -1).all() and (found.pred[~right] >= 0).all()


@pytest.mark.parametrize("error", [KeyError("x"), NotImplementedError(), AssertionError("a\nb"), SystemExit(0)])
def test_exceptions_of_foreign_code(model, split, hardware, error):
    def raises(*args, **kwargs):
        raise error

    line = ends_in_one_line(raises, model, split, hardware)
    assert type(error).__name__ in line
    line = ends_in_one_line(weak_pgd, Sick(model, lambda x: raises() if len(x) == 1 else x[:, 0, 0, 0] > 2),
                            split, hardware, batch_size=29)  # fmt: skip
    assert type(error).__name__ in line


def test_exceptions_of_our_own_code(split, hardware, monkeypatch):
    from aerl.attacks import pgd as ours
    from aerl.models import AliCNN

    own = AliCNN(num_classes=3, channels=1, size=(8, 8), hidden=8)
    monkeypatch.setattr("aerl.attacks.losses.log_odds", lambda *args: {}["bug"])
    right = Split(split.images, torch.from_numpy(evaluate.predict(own, split, hardware, 45).pred))
    with pytest.raises(KeyError, match="bug"):
        attacked(partial(ours, norm="L2", eps=0.3), own, right, hardware)


class Narrow(torch.nn.Module):
    """A model on a device that holds so many images at a time."""

    def __init__(self, model, room, error=torch.OutOfMemoryError("tried to allocate")):  # noqa: B008
        super().__init__()
        self.model, self.room, self.error = model, room, error

    def forward(self, x):
        if len(x) > self.room:
            raise self.error
        return self.model(x)


def test_out_of_memory_halves_the_batch(model, split, hardware):
    expected = attacked(weak_pgd, model, split, hardware, 45)["a"]
    with collect_warnings() as warnings:
        found = attacked(weak_pgd, Narrow(model, 6), split, hardware, 45)["a"]
    assert np.array_equal(expected.pred, found.pred)
    np.testing.assert_allclose(expected.samples["l2"], found.samples["l2"], atol=1e-5)
    halvings = [warning for warning in warnings if warning.startswith("out of memory")]
    assert len(halvings) == len(set(halvings)) and halvings[-1].endswith("went on with 3")
    with pytest.raises(UserError, match="a single image"):
        evaluate.predict(Narrow(model, 0), split, hardware, 8)


def real_errors():
    """What the CPU's allocators say, and, as the libraries word it, what a GPU's do."""
    for allocate in (lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: bytearray(2**60)):
        with pytest.raises(Exception) as error:
            allocate()
        yield error.value
    yield RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    yield RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    yield RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
    yield RuntimeError("could not create a primitive")  # oneDNN, under a limit of the address space
    yield OSError(errno.ENOMEM, "Cannot allocate memory")


def test_out_of_memory_of_every_library(model, split, hardware):
    expected = evaluate.predict(model, split, hardware, 45)
    for error in real_errors():
        assert is_out_of_memory(error), error
        assert np.array_equal(evaluate.predict(Narrow(model, 20, error), split, hardware, 45).pred, expected.pred)
    for text in (
        "mat1 and mat2 shapes cannot be multiplied",
        "could not create a primitive descriptor for a matmul",
    ):
        assert not is_out_of_memory(RuntimeError(text))
