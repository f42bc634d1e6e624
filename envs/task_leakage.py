"""Do two sets of tasks share questions? Exact and normalised overlap; not paraphrases, which no rule finds.

Two questions are the same when they are equal after Unicode's NFKC and case folding, without articles, punctuation and
white space. Signs that carry meaning in mathematics are kept where they stand in a formula or beside a digit, so that
`3 - 2` and `3 + 2` stay different.

Example::

    overlaps(train, test)                     # [Overlap(first="math-3", second="math500-17")]
    train = without_overlap(train, test)      # the tasks of `train` that `test` does not hold
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from envs.base import Task, TaskError

_SHOWN = 5
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ARTICLES_OF_FORMULAS = re.compile(r"\b(?:an|the)\b")  # "a" may be a variable
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_FORMULA_SIGN = re.compile(r"[-+*/%^=<>|\\!_()\[\]{}]")
_SIGN_BY_DIGIT = re.compile(r"(?<=\d)[-+*/%^=<>]|(?<=\d )[-+*/%^=<>]|[-+*/%^=<>](?= ?\d)")
_HIDDEN = 0xF0000
"""Kept signs wait in a private part of Unicode while the others are taken away."""


class Overlap(NamedTuple):
    """Ids of two tasks with the same question."""

    first: str
    second: str


def question_key(question: str) -> str:
    """What is left of a question when everything that does not change its meaning is taken away."""
    folded = unicodedata.normalize("NFKC", question).casefold().replace("\N{MINUS SIGN}", "-")
    text = " ".join(folded.split())
    is_formula = "$" in text or "\\" in text
    kept = _DECIMAL_POINT.sub(_hide, _THOUSANDS.sub("", text))
    kept = (_FORMULA_SIGN if is_formula else _SIGN_BY_DIGIT).sub(_hide, kept)
    kept = (_ARTICLES_OF_FORMULAS if is_formula else _ARTICLES).sub(" ", kept.translate(_WITHOUT_PUNCTUATION))
    return " ".join(kept.split()) or text


def overlaps(first: Iterable[Task], second: Iterable[Task]) -> list[Overlap]:
    """Pairs of tasks that ask the same, in the order of `second`; of several in `first` the first one."""
    known: dict[str, str] = {}
    for task in first:
        known.setdefault(question_key(task.question), task.id)
    found = ((known.get(question_key(task.question)), task.id) for task in second)
    return [Overlap(one, other) for one, other in found if one is not None]


def without_overlap(train: Iterable[Task], test: Iterable[Task]) -> list[Task]:
    """The training tasks that ask nothing that `test` asks."""
    asked = {question_key(task.question) for task in test}
    return [task for task in train if question_key(task.question) not in asked]


def check_disjoint(train: Sequence[Task], test: Sequence[Task]) -> None:
    """Raises `TaskError` when train and test share a question, and when two tasks of them have the same id."""
    if found := overlaps(train, test):
        more = ", ".join(f"{one!r} and {other!r}" for one, other in found[1:_SHOWN])
        rest = len(found) - 1
        raise TaskError(
            f"test task {found[0].second!r} has the same question as training task {found[0].first!r}: "
            "train and test must share none"
            + (f"; {rest} more: {more}{', ...' if rest >= _SHOWN else ''}" if rest else "")
        )
    seen: set[str] = set()
    for task in (*train, *test):
        if task.id in seen:
            raise TaskError(
                f"id {task.id!r} belongs to two tasks: results are kept by id, so ids must differ across all files"
            )
        seen.add(task.id)


def _hide(match: re.Match[str]) -> str:
    return chr(_HIDDEN + ord(match[0]))


class _WithoutPunctuation(dict[int, str]):
    """For `str.translate`: punctuation, symbols and control characters become spaces, hidden signs come back."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if _HIDDEN <= code < _HIDDEN + 128:
            kept = chr(code - _HIDDEN)
        else:
            category = unicodedata.category(character)  # signs such as × and ≤ (Sm) always mean something
            kept = " " if category[0] in "PSC" and (category != "Sm" or code < 128) else character
        self[code] = kept
        return kept


_WITHOUT_PUNCTUATION = _WithoutPunctuation()
