"""Two models on the same samples: the difference of their accuracies, its interval, and a test."""

import math
from statistics import NormalDist


def mcnemar(b: int, c: int, *, one_sided: bool = False) -> float:
    """The exact p of McNemar's test (1947): under the null hypothesis b is a draw from Binomial(b + c, 1/2).

    `b` samples are right in the first model only, `c` in the second only. Two-sided, or `one_sided` the chance of so
    large a b. Raises ValueError for a negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts cannot be negative: b={b}, c={c}")
    n, term, tail = b + c, 1, 0  # integers of any size: exact for any count
    for k in range((c if one_sided else min(b, c)) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return tail / (1 << n) if one_sided else min(1.0, 2 * tail / (1 << n))


def paired_difference(both: int, b: int, c: int, neither: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval, within [-1, 1], of the difference of two proportions of the same samples, (b - c) / n.

    `both` samples are right in both, `b` in the first only, `c` in the second only, `neither` in none. Method 10 of
    Newcombe, Statistics in Medicine 17 (1998), 2635-2650: it has a width also where no sample is discordant. Raises
    ValueError without a sample.
    """
    n = both + b + c + neither
    if n == 0 or min(both, b, c, neither) < 0:
        raise ValueError(f"no paired samples: {both}, {b}, {c}, {neither}")
    first, second = (both + b) / n, (both + c) / n
    low_first, high_first = wilson(both + b, n, confidence)
    low_second, high_second = wilson(both + c, n, confidence)
    product = both * neither - b * c
    corrected = max(product - n / 2, 0) if product > 0 else product
    margins = (both + b) * (c + neither) * (both + c) * (b + neither)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    low = (b - c) / n - reach(first - low_first, high_second - second)
    high = (b - c) / n + reach(high_first - first, second - low_second)
    return max(low, -1.0), min(high, 1.0)


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) for a proportion, within [0, 1]; (0, 1) where nothing was measured.

    It has a width also at 0 and at `n` successes, where a robust accuracy often lies. Raises ValueError unless
    0 <= successes <= n and 0 < confidence < 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} samples")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Exact at both ends, whatever the rounding.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def proportion(successes: float, n: int) -> dict[str, float]:
    """How summary.json states an accuracy: `value`, its 95 % interval `low` to `high`, and `n`.

    `successes` may be a sum of rewards in [0, 1]: the interval is then too wide if anything, since no
    variable in [0, 1] has a larger variance than the one that is only 0 or 1.
    """
    low, high = wilson(successes, n)
    return {"value": successes / n if n else math.nan, "low": low, "high": high, "n": n}
