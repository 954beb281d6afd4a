"""Two models on the same samples: the difference of their accuracies, its interval, and a test."""

import math

from aerl.results import wilson


def mcnemar(b: int, c: int, *, one_sided: bool = False) -> float:
    """The exact p of McNemar's test (1947), from the discordant counts alone; 1 where there are none.

    `b` samples are right here only, `c` there only: if the two were equally good, b would be a draw from
    Binomial(b + c, 1/2). Two-sided, or `one_sided` the chance of so large a b. Raises ValueError for a
    negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts cannot be negative: b={b}, c={c}")
    n, term, tail = b + c, 1, 0  # whole numbers of any size: exact for any count
    for k in range((c if one_sided else min(b, c)) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return tail / (1 << n) if one_sided else min(1.0, 2 * tail / (1 << n))


def paired_difference(
    both: int, b: int, c: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval, within [-1, 1], of the difference of two proportions of the same samples, (b - c) / n.

    `both` samples are right in both, `b` in the first only, `c` in the second only, `neither` in none.
    Method 10 of Newcombe, Statistics in Medicine 17 (1998), 2635-2650: Wilson's intervals of the two
    proportions, joined by their correlation with its continuity correction. Unlike the difference +- z *
    standard error it has a width where no sample is discordant. Raises ValueError without a sample.
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
