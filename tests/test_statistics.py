"""Intervals over seeds and samples: their coverage on data whose truth is known."""

import numpy as np
import pytest

from aerl.evaluation.statistics import crossed_difference, crossed_interval, holm, wilson


def rewards(rng, seeds, n, by_seed, by_sample, mean=0.5):
    """(seeds, n) of 0 and 1, whose chance of 1 varies with the seed and with the sample."""
    chance = mean + by_seed * rng.standard_normal((seeds, 1)) + by_sample * (rng.random((1, n)) - 0.5)
    return (rng.random((seeds, n)) < chance.clip(0, 1)).astype(float)


@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_sample"), [(3, 0.0, 0.8), (3, 0.05, 0.8), (5, 0.1, 0.2), (2, 0.0, 0.0)]
)
def test_the_interval_covers_the_truth(seeds, by_seed, by_sample):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = crossed_interval(rewards(rng, seeds, 200, by_seed, by_sample))
        covered += low <= 0.5 <= high
    assert covered / 300 >= 0.91  # a Wilson interval of the mean alone covers less, see below


def test_an_interval_over_samples_alone_covers_too_little_where_seeds_differ():
    rng = np.random.default_rng(0)
    drawn = [rewards(rng, 4, 1000, 0.1, 0.2) for _ in range(200)]
    alone = sum(low <= 0.5 <= high for low, high in (wilson(each.sum(), each.size) for each in drawn))
    both = sum(low <= 0.5 <= high for low, high in map(crossed_interval, drawn))
    assert alone < 60 < 180 < both


def test_one_seed_is_wilson():
    one = np.array([[1.0, 0, 1, 1, 0]])
    assert crossed_interval(one) == wilson(3, 5)


def test_differences_are_paired_by_sample_and_rarely_significant_without_a_difference():
    rng = np.random.default_rng(0)
    p = []
    for _ in range(300):
        chance = rng.random((1, 300))
        groups = [(rng.random((3, 300)) < chance + 0.05 * rng.standard_normal((3, 1))).astype(float) for _ in range(2)]
        value, low, high, each = crossed_difference(*groups)
        assert low <= value <= high and value == pytest.approx(groups[0].mean() - groups[1].mean())
        p.append(each)
    assert np.mean(np.array(p) < 0.05) <= 0.07
    better = [(rng.random((3, 300)) < mean).astype(float) for mean in (0.7, 0.4)]
    assert crossed_difference(*better)[3] < 0.05
    assert np.isnan(crossed_difference(better[0][:1], better[1])[3])


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_no_success_in_any_seed_is_no_certainty():
    low, high = crossed_interval(np.zeros((3, 360)))
    assert (low, high) == wilson(0, 360) and high > 0.01
    assert crossed_interval(np.ones((3, 360)))[0] == wilson(360, 360)[0]
