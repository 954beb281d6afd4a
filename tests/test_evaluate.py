"""Per-sample outcomes: which samples are attacked, that their order is no matter, and what is counted."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from aerl import evaluate
from aerl.attacks import AutoAttack, collect_warnings, pgd
from aerl.data import Split, subset
from aerl.evaluate import Attacked, run_attack
from aerl.types import UserError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))


@pytest.fixture(scope="module")
def split(model, hardware) -> Split:
    """Random images; two thirds carry the model's own prediction as their label."""
    images = torch.randint(
        0, 256, (45, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    unlabelled = Split(images, torch.zeros(45, dtype=torch.int64))
    labels = torch.from_numpy(evaluate.predict(model, unlabelled, hardware, 45).pred)
    labels[::3] = (labels[::3] + 1) % 3
    return Split(images, labels)


def attacked(attack, model, split, hardware, batch_size=45, **options):
    clean = evaluate.predict(model, split, hardware, batch_size)
    return run_attack(
        attack, model, split, clean, hardware, name="a", seed=0, batch_size=batch_size, **options
    )


weak_pgd = partial(pgd, norm="L2", eps=0.3, steps=3)


def test_only_samples_that_are_right_are_attacked(model, split, hardware):
    seen = []

    def spy(model, x, y, *, generator):
        seen.append(len(x))
        assert (model(x).argmax(1) == y).all()
        return weak_pgd(model, x, y, generator=generator)

    found = attacked(spy, model, split, hardware, batch_size=8)["a"]
    assert sum(seen) == 30
    assert (found.l2[::3] == 0).all() and (found.pred[::3] != split.labels[::3].numpy()).all()
    assert found.l2.max() > 0


@pytest.mark.parametrize("batch_size", [1, 7, 45])
def test_neither_batch_size_nor_order_changes_an_outcome(model, split, hardware, batch_size):
    order = torch.randperm(45, generator=torch.Generator().manual_seed(2))
    shuffled = Split(split.images[order], split.labels[order])
    straight = attacked(weak_pgd, model, split, hardware)["a"]
    other = attacked(weak_pgd, model, shuffled, hardware, batch_size)["a"]
    assert np.array_equal(straight.pred[order.numpy()], other.pred)
    np.testing.assert_allclose(straight.l2[order.numpy()], other.l2, atol=1e-5)


def autoattack(**settings) -> AutoAttack:
    return AutoAttack(norm="L2", eps=0.25, batch_size=8, queries=60, **settings)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "attack", [weak_pgd, autoattack(attacks=["apgd-ce", "square"])], ids=["pgd", "autoattack"]
)
def test_interrupted_after_any_batch_it_goes_on_to_the_same_outcomes(model, split, hardware, attack):
    whole = attacked(attack, model, split, hardware, batch_size=8)["a"]
    assert 0 < (whole.pred == split.labels.numpy()).sum() < 30  # some fall, some do not
    state, batches = None, 0
    while True:
        kept = []

        def stop_at_the_second(stage, kept=kept):
            kept.append(copy.deepcopy(stage))
            if len(kept) == 2:
                raise Interrupted

        try:
            again = attacked(
                attack, model, split, hardware, batch_size=8, resume=state, keep=stop_at_the_second
            )
            break
        except Interrupted:
            state, batches = kept[0], batches + 1  # what the second batch did is lost
    assert batches >= 3
    for key in (*evaluate.PER_SAMPLE, "examples"):
        assert np.array_equal(getattr(whole, key), getattr(again["a"], key)), key


def test_stages_hand_on_survivors_only(model, split, hardware):
    """As a whole attack and as one stage after another it marks the same samples, and none twice."""
    seen = []

    class Staged:
        def stages(self, model, x):
            return [partial(self.one, 0.0), partial(self.one, 0.5)]

        def one(self, threshold, model, x, y, *, generator):
            seen.append(len(x))
            black = (x.mean((1, 2, 3)) > 0.5) == (threshold == 0.0)
            return torch.where(black[:, None, None, None], torch.zeros_like(x), x)

    found = attacked(Staged(), model, split, hardware)["a"]
    fallen = int(((found.linf > 0) & (found.pred != split.labels.numpy())).sum())
    assert len(seen) == 2 and seen[0] == 30 and 30 - seen[1] <= fallen


def test_a_model_without_a_gradient_is_left_to_black_box_attacks(split, hardware):
    class Broken(nn.Module):
        def forward(self, x):
            return (
                torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3)), x[:, 0, 0, 0]], 1)
                .detach()
                .round(decimals=2)
            )

    labels = torch.from_numpy(evaluate.predict(Broken(), split, hardware, 45).pred)
    right = Split(split.images, labels)
    with collect_warnings() as warnings:
        found = attacked(autoattack(), Broken(), right, hardware)["a"]
        unharmed = attacked(weak_pgd, Broken(), right, hardware)["a"]
    assert any("not run" in warning for warning in warnings)
    assert (found.pred != labels.numpy()).any()  # Square needs no gradient
    assert (unharmed.pred == labels.numpy()).all() and (unharmed.l2 == 0).all()


def test_a_sampled_policy_earns_the_probability_of_the_label(model, split, hardware):
    """The worst case of a sampled policy is the mean, over samples, of its least expected reward."""
    attack = partial(weak_pgd, drop_fooled=False)
    clean = evaluate.predict(model, split, hardware, 45)
    found = attacked(attack, model, split, hardware, policy="sample")["a"]
    outcomes = {"label": split.labels.numpy(), "clean_pred": clean.pred, "clean_p": clean.p,
                "a_pred": found.pred, "a_p": found.p}  # fmt: skip
    assert (found.l2 > 0).all()  # also those whose argmax is wrong
    assert (found.p <= clean.p + 1e-6).all()
    value = evaluate.accuracy(outcomes, ["a"], "sample")["value"]
    assert value == pytest.approx(float(np.minimum(clean.p, found.p).mean()), abs=1e-6)
    with torch.no_grad():
        x = split.images.float() / 255
        draws = torch.multinomial(model(x).softmax(1), 4000, replacement=True,
                                  generator=torch.Generator().manual_seed(0))  # fmt: skip
    drawn = (draws == split.labels[:, None]).float().mean().item()
    assert evaluate.accuracy(outcomes, [], "sample")["value"] == pytest.approx(drawn, abs=0.01)


def test_survivors_are_what_every_counted_attack_has_left():
    outcomes = {"label": np.zeros(4, int), "clean_pred": np.array([0, 0, 0, 1])}
    zeros = np.zeros(4, np.float32)
    clean = Attacked(
        outcomes["clean_pred"], *(zeros for _ in evaluate.PER_SAMPLE[1:]), np.zeros((0, 1, 2, 2))
    )
    for name, pred, size in (("a", [0, 1, 0, 1], 0.1), ("b", [0, 2, 2, 0], 0.2)):
        outcomes |= {
            f"{name}_pred": np.array(pred),
            **{f"{name}_{key}": zeros for key in ("p", "confidence", "entropy")},
            f"{name}_l2": zeros + size,
            f"{name}_linf": zeros,
        }
    state = evaluate.so_far(outcomes, clean, ["a", "b"])
    assert state.pred.tolist() == [0, 1, 2, 1]  # the wrong one stays wrong, each other as the first left it
    np.testing.assert_allclose(state.l2, [0, 0.1, 0.2, 0])
    assert (clean.pred == [0, 0, 0, 1]).all()


def test_with_nothing_right_there_is_nothing_to_attack(model, split, hardware):
    wrong = Split(split.images[::3], split.labels[::3])
    found = attacked(weak_pgd, model, wrong, hardware)["a"]
    assert (found.l2 == 0).all() and found.seconds < 5
    outcomes = {"label": wrong.labels.numpy(), "clean_pred": found.pred, "a_pred": found.pred}
    assert evaluate.accuracy(outcomes, ["a"])["value"] == 0


def test_the_parts_of_an_attack_are_outcomes_of_their_own(model, split, hardware):
    def two(model, x, y, *, generator):
        return {"still": x, "black": torch.zeros_like(x)}

    found = attacked(two, model, split, hardware, batch_size=8)
    assert set(found) == {"a_still", "a_black"}
    assert (found["a_still"].linf == 0).all()
    assert found["a_black"].linf.max() > 0.9


def test_examples_are_the_first_images_as_attacked(model, split, hardware):
    found = attacked(weak_pgd, model, split, hardware, batch_size=8)["a"]
    clean = split.images[:16].float().numpy() / 255
    moved = np.sqrt(((found.examples - clean) ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(moved, found.l2[:16], atol=1e-5)


def test_worst_case_counts_samples_not_attacks():
    outcomes = {
        "label": np.array([0, 0, 0, 0]),
        "clean_pred": np.array([0, 0, 0, 1]),
        "a_pred": np.array([0, 1, 0, 1]),
        "b_pred": np.array([0, 0, 1, 0]),
    }
    assert evaluate.accuracy(outcomes)["value"] == 0.75
    assert evaluate.accuracy(outcomes, ["a"])["value"] == 0.5
    assert evaluate.accuracy(outcomes, ["b"])["value"] == 0.5  # right only after the attack is not robust
    assert evaluate.accuracy(outcomes, ["a", "b"])["value"] == 0.25


def test_the_subset_is_the_same_for_every_run(split):
    first, again = subset(split, 10), subset(split, 10)
    assert torch.equal(first.images, again.images) and len(first) == 10
    assert subset(split, None) is split and subset(split, 1000) is split


def test_an_attack_that_leaves_its_ball_is_not_counted(model, split, hardware):
    def cheats(model, x, y, *, generator):
        return (x + 0.5).clamp(0, 1)

    found = attacked(cheats, model, split, hardware)["a"]
    with pytest.raises(UserError, match=r"attack.a: left its Linf ball: a perturbation of 0.5"):
        evaluate.check_within("a", found, "Linf", 0.1)
    evaluate.check_within("a", found, "Linf", 0.5)


def test_an_attack_that_leaves_the_box_is_not_counted(model, split, hardware):
    found = attacked(lambda model, x, y, *, generator: x + 0.1, model, split, hardware)["a"]
    with pytest.raises(UserError, match=r"attack.a: left the box: a pixel lies 0.1"):
        evaluate.check_within("a", found, "Linf", 0.2)
    evaluate.check_within("a", found, "Linf", 0.2, boxed=False)


class Narrow(torch.nn.Module):
    """A model on a device that holds so many images at a time."""

    def __init__(self, model, room):
        super().__init__()
        self.model, self.room = model, room

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("tried to allocate")
        return self.model(x)


def test_out_of_memory_the_batch_is_halved_the_outcomes_are_the_same_and_it_is_said_once(
    model, split, hardware
):
    whole = attacked(weak_pgd, model, split, hardware, 45)["a"]
    with collect_warnings() as warnings:
        found = attacked(weak_pgd, Narrow(model, 6), split, hardware, 45)["a"]
    assert np.array_equal(whole.pred, found.pred)
    np.testing.assert_allclose(whole.l2, found.l2, atol=1e-5)
    halvings = [warning for warning in warnings if warning.startswith("out of memory")]
    assert len(halvings) == len(set(halvings)) and halvings[-1].endswith("went on with 3")
    with pytest.raises(UserError, match="a single image"):
        evaluate.predict(Narrow(model, 0), split, hardware, 8)
