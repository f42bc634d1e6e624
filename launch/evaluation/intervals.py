"""95% intervals of scores.

| of | is |
|---|---|
| a success rate | Wilson's score interval (https://doi.org/10.1080/01621459.1927.10502953): `score` |
| a mean of other numbers, one a task | the percentile bootstrap over tasks (Efron and Tibshirani 1993): `mean_score` |
| a mean over benchmarks | their own intervals, squared and added (Zou and Donner 2008): `average` |

The last one (https://doi.org/10.1002/sim.3095) is no bootstrap on purpose: of eight benchmarks that nobody solves, a
bootstrap would say [0, 0].

Example::

    score(3, 20)                               # 0.15 [0.05, 0.36]
    mean_score([0.5, 1.0, 0.25])               # such as F1, or a task's mean over its samples
    average([score(3, 20), score(100, 500)])   # each benchmark counts the same
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
RESAMPLES = 10_000
_AT_ONCE = 4_000_000
"""Numbers drawn at once, at most."""


@dataclass(frozen=True, slots=True)
class Score:
    """A mean in [0, 1], such as a success rate, with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int
    """Tasks."""


def score(successes: int, n: int) -> Score:
    """Raises `ValueError` when `n` is below 1 or `successes` is not in [0, n]."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a score needs 0 <= successes <= n and n >= 1, not {successes} of {n}")
    rate, z2 = successes / n, Z_95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Rounding must not let the interval miss the rate it is about (0 of n, n of n).
    return Score(rate, min(max(0.0, centre - half), rate), max(min(1.0, centre + half), rate), n)


def mean_score(values: Sequence[float], *, seed: int = 0) -> Score:
    """`values`: [n] one number in [0, 1] a task. Wilson's interval where they are all 0 or 1, else a bootstrap.

    Raises `ValueError` when there are none, or one is not in [0, 1].
    """
    if not values or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"a mean score needs numbers in [0, 1], at least one, not {list(values)[:5]}")
    if all(value in (0, 1) for value in values):
        return score(round(sum(values)), len(values))
    mean = sum(values) / len(values)
    low, high = bootstrap(values, seed=seed)
    return Score(mean, min(low, mean), max(high, mean), len(values))


def bootstrap(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of the means of `RESAMPLES` samples of `values` [n], drawn with replacement."""
    import numpy

    random = numpy.random.default_rng(seed)
    numbers = numpy.asarray(values, dtype=numpy.float64)
    rows = max(1, _AT_ONCE // len(numbers))
    means = [
        numbers[random.integers(0, len(numbers), size=(min(rows, RESAMPLES - done), len(numbers)))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = numpy.quantile(numpy.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def average(scores: Sequence[Score]) -> Score:
    """The mean of the means, each counted the same however many tasks it is of. Raises `ValueError` for none."""
    if not scores:
        raise ValueError("an average needs at least one score")
    k = len(scores)
    mean = sum(each.mean for each in scores) / k
    below = math.sqrt(sum((each.mean - each.low) ** 2 for each in scores)) / k
    above = math.sqrt(sum((each.high - each.mean) ** 2 for each in scores)) / k
    return Score(mean, max(0.0, mean - below), min(1.0, mean + above), sum(each.n for each in scores))
