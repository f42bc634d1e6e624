"""95% intervals of success rates: Wilson's score interval (https://doi.org/10.1080/01621459.1927.10502953)."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Score:
    """A success rate with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int


def score(successes: int, n: int) -> Score:
    """Raises `ValueError` when `n` is below 1 or `successes` is not in [0, n]."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a score needs 0 <= successes <= n and n >= 1, not {successes} of {n}")
    rate, z2 = successes / n, Z_95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Rounding must not let the interval miss the rate it is about (0 of n, n of n).
    return Score(rate, min(max(0.0, centre - half), rate), max(min(1.0, centre + half), rate), n)
