"""Do two policies differ on the same tasks? Tests on pairs, one pair a task.

- `mcnemar`: right or wrong. The exact two-sided test of McNemar (https://doi.org/10.1007/BF02295996): of the tasks that
  only one of them solves, how likely is so uneven a split by a fair coin. The interval of the difference is Newcombe's
  for paired proportions (method 10, https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C).
- `paired_bootstrap`: any numbers. The interval is a bootstrap over tasks; the p-value is a sign-flip permutation test
  (Fisher 1935): how often is the mean difference as large when each task's difference may have either sign.
- `paired_average`: means over benchmarks, each counting the same.
- `holm`: p-values of several tests, so that one of many is not found significant by chance alone (Holm 1979).

Example::

    test = mcnemar([True, True, False], [False, True, False])
    test.difference, test.p_value      # 0.33, 1.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launch.evaluation.intervals import RESAMPLES, bootstrap, score

_AT_ONCE = 4_000_000
_EQUAL = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """How a first policy does beside a second one on the same tasks."""

    method: Literal["mcnemar", "permutation"]
    n: int
    """Tasks."""
    first_better: int
    """Tasks on which the first one does better; for right or wrong: that it alone solves."""
    second_better: int
    difference: float
    """Mean of the first less mean of the second, in [-1, 1]."""
    low: float
    """Of its 95% interval."""
    high: float
    p_value: float
    """Two-sided, for this test alone."""


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """[n] whether each task was solved, in the same order. Raises `ValueError` for none, or two lengths."""
    n = _paired(first, second)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    difference = (only_first - only_second) / n
    low, high = _newcombe(sum(map(bool, first)), sum(map(bool, second)), only_first, only_second, n)
    return PairedTest(
        method="mcnemar",
        n=n,
        first_better=only_first,
        second_better=only_second,
        difference=difference,
        low=min(low, difference),
        high=max(high, difference),
        p_value=_exact_binomial(only_first, only_first + only_second),
    )


def paired_bootstrap(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedTest:
    """[n] a number for each task, in the same order. Raises `ValueError` for none, or two lengths."""
    n = _paired(first, second)
    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    difference = sum(differences) / n
    low, high = bootstrap(differences, seed=seed)
    return PairedTest(
        method="permutation",
        n=n,
        first_better=sum(each > _EQUAL for each in differences),
        second_better=sum(each < -_EQUAL for each in differences),
        difference=difference,
        low=min(low, difference),
        high=max(high, difference),
        p_value=_sign_flips(differences, seed),
    )


def paired_test(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedTest:
    """`mcnemar` where all numbers are 0 or 1, else `paired_bootstrap`."""
    if all(value in (0, 1) for value in (*first, *second)):
        return mcnemar([value == 1 for value in first], [value == 1 for value in second])
    return paired_bootstrap(first, second, seed=seed)


def paired_average(sets: Sequence[tuple[Sequence[float], Sequence[float]]], *, seed: int = 0) -> PairedTest:
    """Of the means over sets of tasks, each set counting the same. `sets`: (first, second) of each, a number a task.

    The interval is those of the sets, squared and added as in `launch.evaluation.intervals.average`; the p-value is a
    sign-flip test in which a task of a small set weighs more. Raises `ValueError` for no set, or one without tasks.
    """
    if not sets:
        raise ValueError("an average needs at least one set of tasks")
    tests = [paired_test(first, second, seed=seed) for first, second in sets]
    difference = sum(test.difference for test in tests) / len(tests)
    below = math.sqrt(sum((test.difference - test.low) ** 2 for test in tests)) / len(tests)
    above = math.sqrt(sum((test.high - test.difference) ** 2 for test in tests)) / len(tests)
    weighted = [
        (float(a) - float(b)) / len(first) for first, second in sets for a, b in zip(first, second, strict=True)
    ]
    return PairedTest(
        method="permutation",
        n=sum(test.n for test in tests),
        first_better=sum(test.first_better for test in tests),
        second_better=sum(test.second_better for test in tests),
        difference=difference,
        low=max(-1.0, difference - below),
        high=min(1.0, difference + above),
        p_value=_sign_flips(weighted, seed),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the same order: compare them with the level as they are."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _paired(first: Sequence[object], second: Sequence[object]) -> int:
    if len(first) != len(second) or not first:
        raise ValueError(f"a paired test needs the same tasks twice, at least one, not {len(first)} and {len(second)}")
    return len(first)


def _exact_binomial(k: int, n: int) -> float:
    """Two-sided p-value of k of n by a fair coin; 1 when n is 0."""
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(k, n - k) + 1))
    return min(1.0, 2 * tail / 2**n)


def _newcombe(first: int, second: int, only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """The interval of the difference of two paired proportions, first / n - second / n."""
    one, two = score(first, n), score(second, n)
    both, neither = first - only_first, n - second - only_first
    margins = first * (n - first) * second * (n - second)
    if margins == 0:
        phi = 0.0
    else:
        product = both * neither - only_first * only_second
        if product > 0:  # the continuity correction of method 10
            product = max(product - n / 2, 0.0)
        phi = product / math.sqrt(margins)
    down, up = one.mean - one.low, two.high - two.mean
    low = math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))
    up_one, down_two = one.high - one.mean, two.mean - two.low
    high = math.sqrt(max(0.0, up_one**2 - 2 * phi * up_one * down_two + down_two**2))
    difference = one.mean - two.mean
    return max(-1.0, difference - low), min(1.0, difference + high)


def _sign_flips(differences: Sequence[float], seed: int) -> float:
    """Two-sided p-value; never 0, as what was measured is one of the arrangements."""
    import numpy

    values = numpy.asarray([each for each in differences if abs(each) > _EQUAL], dtype=numpy.float64)
    # The float sums of two arrangements that are equal may differ in their last digits.
    if not len(values):
        return 1.0
    random = numpy.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(values))
    measured = abs(float(values.sum())) - 1e-9 * float(numpy.abs(values).sum())
    as_large = 0
    for done in range(0, RESAMPLES, rows):
        signs = random.integers(0, 2, size=(min(rows, RESAMPLES - done), len(values)), dtype=numpy.int8) * 2 - 1
        as_large += int((numpy.abs(signs @ values) >= measured).sum())
    return (as_large + 1) / (RESAMPLES + 1)
