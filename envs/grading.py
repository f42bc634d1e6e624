"""Graders: does a prediction answer a task? They never raise on what a model wrote, however odd.

`exact` compares as SQuAD does (case, articles, punctuation and white space aside; https://arxiv.org/abs/1606.05250)
and takes a task's aliases; `numeric` compares as numbers within a relative tolerance of 1e-6 and falls back to
`exact`.

Example::

    grade(task, "The Silver Harbor!")      # 1.0 if the answer is "silver harbor"
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable

from envs.base import Task

Grader = Callable[[Task, str], float]
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(task: Task, prediction: str) -> float:
    wanted = {normalise(answer) for answer in (task.answer, *task.aliases)}
    return float(normalise(prediction) in wanted)


def numeric(task: Task, prediction: str) -> float:
    got, wanted = _number(prediction), _number(task.answer)
    if got is None or wanted is None:
        return exact(task, prediction)
    return float(math.isclose(got, wanted, rel_tol=1e-6, abs_tol=1e-9))


GRADERS: dict[str, Grader] = {"exact": exact, "numeric": numeric}


def grade(task: Task, prediction: str) -> float:
    """Score in [0, 1] by the task's own grader. Raises `KeyError` for a grader that does not exist (checked at
    loading)."""
    return GRADERS[task.grader](task, prediction)


def _number(text: str) -> float | None:
    cleaned = text.strip().rstrip(".").replace(",", "").replace("$", "").removesuffix("%")
    try:
        value = float(cleaned)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
