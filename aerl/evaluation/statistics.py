"""Confidence intervals of accuracies, and tests of two models on the same samples."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

Policy = Literal["argmax", "sample"]


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion, within [0, 1]; (0, 1) without samples.

    Unlike scipy's it takes a sum of rewards in [0, 1]; it is then too wide if anything, since no variable in [0, 1]
    has a larger variance than one that is 0 or 1.
    """
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise ValueError(f"{successes} successes in {n} samples, confidence {confidence}")
    if n == 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Exact at both ends, whatever the rounding.
    return 0.0 if successes == 0 else (centre - half) / scale, 1.0 if successes == n else (centre + half) / scale


def proportion(successes: float, n: int) -> dict[str, float]:
    """An accuracy as in summary.json: `value`, its 95 % interval from `low` to `high`, and `n`."""
    low, high = wilson(successes, n)
    return {"value": successes / n if n else math.nan, "low": low, "high": high, "n": n}


def mcnemar(b: int, c: int, *, one_sided: bool = False) -> float:
    """The exact p of McNemar's test (1947): under the null hypothesis b is a draw from Binomial(b + c, 1/2).

    `b` samples are right in the first model only, `c` in the second only. `one_sided`: the chance of so large a b.
    """
    from scipy.stats import binomtest

    if min(b, c) < 0:  # some versions of scipy take them
        raise ValueError(f"no counts of discordant samples: {b}, {c}")
    if b == c == 0:
        return 1.0
    return float(binomtest(b, b + c, alternative="greater" if one_sided else "two-sided").pvalue)


def paired_difference(both: int, b: int, c: int, neither: int) -> tuple[float, float]:
    """95 % interval, within [-1, 1], of the difference of two proportions of the same samples, (b - c) / n.

    `both` samples are right in both, `b` in the first only, `c` in the second only, `neither` in none. Method 10 of
    Newcombe, Statistics in Medicine 17 (1998), 2635-2650: it has a width even if no sample is discordant.
    """
    n = both + b + c + neither
    if n == 0 or min(both, b, c, neither) < 0:
        raise ValueError(f"no paired samples: {both}, {b}, {c}, {neither}")
    first, second = (both + b) / n, (both + c) / n
    (low_first, high_first), (low_second, high_second) = wilson(both + b, n), wilson(both + c, n)
    product = both * neither - b * c
    corrected = max(product - n / 2, 0) if product > 0 else product
    margins = (both + b) * (c + neither) * (both + c) * (b + neither)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def width(u: float, v: float) -> float:
        return math.sqrt(max(0.0, u * u - 2 * phi * u * v + v * v))

    low = (b - c) / n - width(first - low_first, high_second - second)
    high = (b - c) / n + width(high_first - first, second - low_second)
    return max(low, -1.0), min(high, 1.0)


def reward(outcomes: Mapping[str, np.ndarray], attacks: Sequence[str] = (), policy: Policy = "argmax") -> np.ndarray:
    """float (N,): the least reward of each sample, clean and under every one of `attacks`.

    policy="argmax": 1 if the class of the largest logit is right under all of them; of a randomised model the least
    share of passes that are right. policy="sample", of a model that draws its class from the softmax: the least
    probability of the label.
    """
    key = "p" if policy == "sample" else "right"
    if f"clean_{key}" in outcomes:
        least: np.ndarray = np.minimum.reduce([outcomes[f"{name}_{key}"] for name in ("clean", *attacks)])
        return least
    return right(outcomes, attacks).astype(float)


def right(outcomes: Mapping[str, np.ndarray], attacks: Sequence[str] = ()) -> np.ndarray:
    """bool (N,): classified correctly clean and under every one of `attacks`."""
    correct: np.ndarray = np.logical_and.reduce(
        [outcomes[f"{name}_pred"] == outcomes["label"] for name in ("clean", *attacks)]
    )
    return correct


def crossed_interval(rewards: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of rewards (seeds, samples) in [0, 1], over other seeds and other samples.

    Both are random and crossed: every seed saw the same samples. The variance of the mean comes from the mean squares
    of the two-way analysis of variance, its degrees of freedom from Satterthwaite (1946); see Searle, Casella and
    McCulloch, Variance Components (1992), section 4.3. With one seed only the samples are random (Wilson). Where the
    mean is that of fewer than five samples, right or wrong, their variance says little: the interval is then at least
    Wilson's of n samples.
    """
    seeds, n = rewards.shape
    if seeds == 1 or n == 1:
        return wilson(float(rewards.sum()), rewards.size)
    mean, half = rewards.mean(), _crossed_half_width(rewards)
    low, high = max(0.0, float(mean) - half), min(1.0, float(mean) + half)
    if n * min(mean, 1 - mean) < 5:
        rare = wilson(float(mean) * n, n)
        low, high = min(low, rare[0]), max(high, rare[1])
    return low, high


def _crossed_half_width(values: np.ndarray) -> float:
    """Of the 95 % interval of the mean of values (seeds, samples), two of each or more."""
    (seeds, n), by_seed, by_sample = values.shape, values.mean(1), values.mean(0)
    residual = values - by_seed[:, None] - by_sample + values.mean()
    within = float((residual**2).sum()) / ((seeds - 1) * (n - 1))
    between = max(n * by_seed.var(ddof=1), within), max(seeds * by_sample.var(ddof=1), within)
    parts = ((between[0], seeds - 1), (between[1], n - 1), (-within, (seeds - 1) * (n - 1)))
    return _half_width([(value / values.size, degrees) for value, degrees in parts])


def mean_difference(first: np.ndarray, second: np.ndarray, *, same_models: bool) -> tuple[float, float, float]:
    """The difference of the mean rewards (seeds, samples) of two settings, and its 95 % interval.

    The samples are paired; with `same_models`, of which both measure something else, the seeds are, too. The interval
    is over other seeds and other samples if there are at least two seeds, otherwise over other samples only (Newcombe,
    as `paired_difference`).
    """
    if min(len(first), len(second)) < 2:
        here, there = first[0] > 0.5, second[0] > 0.5
        counts = (int(cell.sum()) for cell in (here & there, here & ~there, ~here & there, ~here & ~there))
        return float(first.mean() - second.mean()), *paired_difference(*counts)
    if not same_models:
        return crossed_difference(first, second)[:3]
    difference, half = float((first - second).mean()), _crossed_half_width(first - second)
    return difference, max(difference - half, -1.0), min(difference + half, 1.0)


def crossed_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float, float]:
    """The difference of the mean rewards of two settings, first (seeds, samples) and second (other seeds, the same
    samples), its 95 % interval, and p for no difference. The samples are paired, the seeds are not.

    The parts of the variance are that of each setting's seeds and that of the differences by sample; each has the
    variation within a seed and sample in it, so that the interval is a little too wide. NaN with fewer than two seeds.
    """
    from scipy.special import stdtr

    n, paired = first.shape[1], first.mean(0) - second.mean(0)
    parts = [(each.mean(1).var(ddof=1) / len(each), len(each) - 1) for each in (first, second) if len(each) > 1]
    if len(parts) < 2:
        return float(paired.mean()), math.nan, math.nan, math.nan
    parts.append((paired.var(ddof=1) / n, n - 1))
    difference, half = float(paired.mean()), _half_width(parts)
    variance, degrees = _satterthwaite(parts)
    p = 2 * float(stdtr(degrees, -abs(difference) / math.sqrt(variance))) if variance else float(difference == 0)
    return difference, max(difference - half, -1.0), min(difference + half, 1.0), p


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """A variance, not negative, and its degrees of freedom, from parts and theirs."""
    variance, spread = max(0.0, sum(value for value, _ in parts)), sum(value**2 / degrees for value, degrees in parts)
    return variance, max(1.0, variance**2 / spread) if spread else 1.0


def _half_width(parts: Sequence[tuple[float, float]]) -> float:
    from scipy.special import stdtrit

    variance, degrees = _satterthwaite(parts)
    return float(stdtrit(degrees, 0.975)) * math.sqrt(variance)


def holm(p: Sequence[float]) -> list[float]:
    """p corrected for their number (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = largest
    return corrected
