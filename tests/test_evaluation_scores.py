"""Intervals of means and averages, and pass@k against all choices enumerated."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.evaluation.intervals import Score, average, bootstrap, mean_score, score
from launch.evaluation.pass_at_k import ks, pass_at_k


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_choices_of_k_runs_with_a_right_one(case):
    n, right, k = case
    runs = [True] * right + [False] * (n - right)
    choices = list(combinations(runs, k))
    assert pass_at_k(n=n, right=right, k=k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_of_many_runs_does_not_overflow():
    assert pass_at_k(n=10_000, right=1, k=100) == pytest.approx(0.01)


@given(st.integers(1, 200))
def test_the_ks_that_are_reported_begin_at_one_and_end_at_all(n):
    found = ks(n)
    assert found[0] == 1 and found[-1] == n and list(found) == sorted(set(found))


@pytest.mark.parametrize(("n", "right", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_cannot_be(n, right, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n=n, right=right, k=k)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_mean_lies_in_its_interval(values):
    each = mean_score(values)
    assert 0 <= each.low <= each.mean <= each.high <= 1 and each.n == len(values)


def test_right_or_wrong_has_wilsons_interval():
    assert mean_score([1.0, 0.0, 1.0]) == score(2, 3)


def test_a_bootstrap_of_many_numbers_is_near_the_normal_interval():
    values = [(i * 37 % 101) / 100 for i in range(400)]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    margin = 1.96 * deviation / math.sqrt(len(values))
    assert bootstrap(values) == pytest.approx((mean - margin, mean + margin), abs=0.1 * margin)


def test_each_benchmark_of_an_average_counts_the_same():
    each = average([score(1, 2), score(0, 100)])
    assert each.mean == 0.25 and each.n == 102


def test_an_average_of_benchmarks_that_nobody_solves_is_not_certain():
    assert average([score(0, 20)] * 8).high == pytest.approx(score(0, 20).high / math.sqrt(8))


def test_the_interval_of_an_average_is_near_a_bootstrap_over_its_benchmarks():
    sets = [[i % 5 == 0 for i in range(300)], [i % 2 == 0 for i in range(300)]]
    found = average([score(sum(each), len(each)) for each in sets])
    low, high = bootstrap([a + b for a, b in zip(sets[0], sets[1][::-1], strict=True)])
    assert (found.low, found.high) == pytest.approx((low / 2, high / 2), abs=0.01)


@pytest.mark.parametrize("values", [[], [0.5, 1.5]])
def test_a_mean_of_what_is_no_score_is_refused(values):
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
        mean_score(values)


def test_an_average_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        average([])
    assert isinstance(average([score(1, 1)]), Score)
