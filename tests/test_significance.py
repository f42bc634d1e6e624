"""Tests on pairs against hand-computed numbers, published ones and all arrangements enumerated."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.evaluation.significance import holm, mcnemar, paired_average, paired_bootstrap, paired_test

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def table(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Outcomes with so many tasks solved by both, by one alone, by neither."""
    return (
        [True] * (both + first) + [False] * (second + neither),
        [True] * both + [False] * first + [True] * second + [False] * neither,
    )


def test_mcnemar_is_the_exact_binomial_test_of_the_tasks_that_one_alone_solves():
    test = mcnemar(*table(30, 9, 2, 59))
    # P(X <= 2 or X >= 9) for X ~ B(11, 1/2): 2 (1 + 11 + 55) / 2048
    assert test.p_value == pytest.approx(134 / 2048)
    assert (test.first_better, test.second_better, test.n) == (9, 2, 100)
    assert test.difference == pytest.approx(0.07)


def test_tasks_on_which_both_agree_say_nothing_of_a_difference():
    assert mcnemar(*table(1, 9, 2, 0)).p_value == mcnemar(*table(500, 9, 2, 900)).p_value


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((18, 12, 2, 18), 0.0562, 0.3290)],
)
def test_the_interval_of_a_difference_is_newcombes(cells, low, high):
    test = mcnemar(*table(*cells))  # Newcombe 1998, table II, method 10
    assert (test.low, test.high) == pytest.approx((low, high), abs=5e-5)


@given(outcomes)
def test_mcnemar_looks_the_same_from_either_side(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    test, mirrored = mcnemar(first, second), mcnemar(second, first)
    assert 0 < test.p_value <= 1 and test.p_value == mirrored.p_value
    assert -1 <= test.low <= test.difference <= test.high <= 1
    assert (test.low, test.high) == pytest.approx((-mirrored.high, -mirrored.low))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 0.25, 0.5, 1]), st.sampled_from([0, 0.3, 1])), min_size=1, max_size=8))
def test_the_permutation_test_estimates_the_share_of_arrangements_that_differ_as_much(pairs):
    differences = [a - b for a, b in pairs]
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(pairs))
    ]
    exact = sum(each >= abs(sum(differences)) - 1e-9 for each in sums) / len(sums)
    test = paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs])
    assert test.p_value == pytest.approx(exact, abs=0.025)
    assert test.low <= test.difference <= test.high


def test_the_test_fits_the_scores():
    assert paired_test([1, 0, 1], [0.0, 0, 1]).method == "mcnemar"
    assert paired_test([1, 0.5, 1], [0, 0, 1]).method == "permutation"


def test_the_same_numbers_give_the_same_p_value():
    first, second = [0.5, 0.2, 0.9] * 20, [0.4, 0.3, 0.8] * 20
    assert paired_bootstrap(first, second) == paired_bootstrap(first, second)


def test_each_set_of_an_average_counts_the_same():
    small = ([1.0, 1.0], [0.0, 0.0])
    large = ([0.0] * 200, [0.0] * 190 + [1.0] * 10)
    test = paired_average([small, large])
    assert test.difference == pytest.approx((1.0 - 0.05) / 2)
    assert (test.n, test.first_better, test.second_better) == (202, 2, 10)
    assert test.low < test.difference < test.high
    # The two tasks of the small set decide, and half of all arrangements give both the same sign.
    assert test.p_value == pytest.approx(0.5, abs=0.03)


def test_holm_adjusts_step_by_step():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= q <= 1 or math.isclose(p, q) for p, q in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_pairs_need_the_same_tasks(first, second):
    with pytest.raises(ValueError, match=f"not {len(first)} and {len(second)}"):
        mcnemar(first, second)
