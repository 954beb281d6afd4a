"""Per-sample outcomes: which samples are attacked, that their order is no matter, and what is counted."""

import numpy as np
import pytest
import torch
from torch import nn

from aerl import evaluate
from aerl.attacks import pgd
from aerl.data import Split, subset
from aerl.evaluate import run_attack
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


def weak_pgd(model, x, y, *, generator):
    return pgd(model, x, y, generator=generator, norm="L2", eps=0.3, steps=3)


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
