"""Answers to the eight benchmarks of the paper as models write them, and what the graders make of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from envs import grading_math
from envs.base import Task
from envs.grading import grade
from envs.grading_math import MathGrader


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader() as shared:
        yield shared


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch, grader: MathGrader) -> None:
    monkeypatch.setattr(grading_math, "_shared", grader)


def score(grader: str, answer: str, prediction: str, *aliases: str) -> float:
    return grade(Task(id="t", question="q", answer=answer, aliases=aliases, kind="k", grader=grader), prediction)


FACTUAL = [  # answer, prediction, exact, f1
    ("President Richard Nixon", "Richard Nixon", 0.0, 0.8),  # HotpotQA
    ("yes", "Yes.", 1.0, 1.0),
    ("yes", "Yes, both are American", 0.0, 0.0),
    ("Chief of Protocol", "the chief of protocol", 1.0, 1.0),
    ("1986 to 2013", "from 1986 to 2013", 0.0, 6 / 7),
    ("9,984", "9984", 1.0, 1.0),
    ("Robert Erskine Childers DSC", "Robert Erskine Childers", 0.0, 6 / 7),
    ("21 March 1857", "March 21, 1857", 0.0, 1.0),  # 2WikiMultihopQA
    ("Isle of Man", "Isle of Wight", 0.0, 2 / 3),
    ("José Antonio", "Jose Antonio", 0.0, 0.5),
    ("Maria Bello", "maria  bello", 1.0, 1.0),  # MuSiQue
    ("1,000", "one thousand", 0.0, 0.0),
    ("the Beatles", "Beatles", 1.0, 1.0),  # Bamboogle
    ("", "", 1.0, 1.0),
    ("Amerigo Vespucci", "", 0.0, 0.0),
]


@pytest.mark.parametrize(("answer", "prediction", "exact", "f1"), FACTUAL)
def test_factual_answers(answer, prediction, exact, f1):
    assert score("exact", answer, prediction) == exact
    assert score("f1", answer, prediction) == pytest.approx(f1)


def test_an_alias_of_musique_counts():
    assert score("exact", "United States of America", "The U.S.", "US", "USA") == 1.0
    assert score("f1", "United States of America", "US", "US", "USA") == 1.0


MATH = [
    (r"\frac{3}{56}", r"\boxed{\dfrac{3}{56}}", True),
    (r"\frac{3}{56}", "0.05357142857142857", True),
    (r"\frac{3}{56}", "3/65", False),
    (r"\frac{\pi}{2}", r"\boxed{\frac\pi 2}", True),
    ("2", r"\boxed{2007 + \frac\pi 2}", False),
    ("12\\pi", "12pi", True),
    ("12\\pi", "37.69911184307752", True),
    ("12\\pi", "12", False),
    ("3p^3-6p^2", "3p**3 - 6p**2", True),
    (r"2\sqrt{3}", "2√3", True),
    (r"2\sqrt{3}", "2*3**0.5", True),
    (r"(-\infty,2]\cup[5,\infty)", "(−∞, 2] ∪ [5, ∞)", True),
    (r"(-\infty,2]\cup[5,\infty)", "(-oo, 2) U [5, oo)", False),
    (r"x^2", "x²", True),
    (r"1\frac{1}{2}", "1 1/2", True),
    ("11/2", "1 1/2", False),
    ("23", "2 3", False),
    (r"\begin{pmatrix} 12 \\ -21 \\ 3 \end{pmatrix}", "3", False),
    (r"\begin{pmatrix} 12 \\ -21 \\ 3 \end{pmatrix}", "[12, -21, 3]", True),
    (r"\text{Tuesday}", "tuesday", True),
    (r"\text{Tuesday}", "Thursday", False),
    ("10^{10^{10}}", "10**10**10", True),
    ("10^{10^{10}}", "10**10**11", False),
]
GSM_HARD = [
    ("1234567.0", "1234567", True),
    ("1234567.0", "1.234567e6", True),
    ("1234567.0", "1,234,567", True),
    ("1234567.0", "$1,234,567.00", True),
    ("1234567.0", "The answer is 1234567.", True),
    ("1234567.0", "1234568", False),
    ("1.2345e6", "1234500.0", True),
    ("-9867630.0", "-9867630", True),
    ("-9867630.0", "9867630", False),
    ("-9867630.0", "\N{MINUS SIGN}9867630", True),
    ("2054266.6666666665", "2054266.67", True),
    ("2054266.6666666665", "6162800/3", True),
    ("0.3333333333333333", "0.33", False),
    ("4.2e-07", "0.00000042", True),
    ("0.0", "0", True),
    ("0.0", "-0.0", True),
    ("1e22", "10000000000000000000000", True),
    ("14.0", "nan", False),
    ("14.0", "inf", False),
]
AIME = [
    ("033", "33", True),
    ("33", "033", True),
    ("0", "000", True),
    ("000", "0", True),
    ("7", "007.", True),
    ("113", r"Therefore, the answer is $\boxed{113}$.", True),
    ("113", "113.0", True),
    ("113", "131", False),
    ("997", "-997", False),
    ("70", r"m+n = \boxed{70}", True),
    ("540", "540 degrees", True),
]
OLYMMATH = [
    (r"\frac{3+2\sqrt{2}}{4}", "(3 + 2*sqrt(2))/4", True),
    (r"\frac{3+2\sqrt{2}}{4}", "1.457106781186548", True),
    (r"\frac{3+2\sqrt{2}}{4}", "1.46", False),
    (r"\sqrt[3]{4}-1", "4**(1/3) - 1", True),
    (r"2^{2023}-1", "2**2023 - 1", True),
    (r"2^{2023}-1", "2**2023", False),
    (r"\binom{2023}{3}", "1377795021", False),
    (r"\binom{10}{3}", "120", True),
    (r"(1,+\infty)", r"\left(1, \infty\right)", True),
    (r"\{1,2,3\}", "{3, 2, 1}", True),
    (r"\{1,2,3\}", "{1, 2}", False),
    (r"\frac{\pi}{4}+\arctan 2", "pi/4 + atan(2)", True),
    (r"(\frac{1}{2},\frac{\sqrt{3}}{2})", "(1/2, sqrt(3)/2)", True),
    (r"(\frac{1}{2},\frac{\sqrt{3}}{2})", "(sqrt(3)/2, 1/2)", False),
    ("3, 5", "5, 3", True),
    (r"4\sqrt{5}", r"\sqrt{80}", True),
]


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [*MATH, *GSM_HARD, *AIME, *OLYMMATH],
    ids=lambda value: value[:30] if isinstance(value, str) else str(value),
)
def test_mathematical_answers(answer, prediction, right):
    assert score("math", answer, prediction) == float(right)


def test_numbers_need_no_algebra(grader):
    before = grader.stats()["comparisons"]
    plain = [(answer, prediction, right) for answer, prediction, right in (*GSM_HARD, *AIME) if " " not in prediction]
    numbers = [case for case in plain if not case[1].isalpha() and "/" not in case[1]]
    assert len(numbers) > 20 and all(score("math", *pair) == right for *pair, right in numbers)
    assert grader.stats()["comparisons"] == before
