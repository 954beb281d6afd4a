"""Confidence intervals of accuracies, and tests of two models on the same samples."""

import math
from statistics import NormalDist


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
