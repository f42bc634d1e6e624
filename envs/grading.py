"""Graders: does a prediction answer a task? They never raise on what a model wrote, however odd, and never hang.

| name | what |
|---|---|
| `exact` | equal after SQuAD's normalisation (case, articles, punctuation, white space); a task's aliases count |
| `f1` | overlap of words after the same normalisation, the best of answer and aliases, as HotpotQA's script counts it |
| `numeric` | the same number: integers exactly, others within a tolerance; falls back to `exact` |
| `math` | symbolically equal (`grading_math.py`: math-verify in a sandboxed process with a deadline) |
| `judge` | an LLM says so (`judge.py`); needs `configure_judge` in this process first |

A prediction may be a megabyte of anything: `exact` and `f1` read none that is longer than 50,000 characters, `numeric`
reads 400, `math` the last 16,000.

The first three are pure functions; `grade_many` grades a whole ledger. SQuAD: https://arxiv.org/abs/1606.05250,
`evaluate-v1.1.py`. HotpotQA: https://arxiv.org/abs/1809.09600, `hotpot_evaluate_v1.py`.

Example::

    grade(task, "The Silver Harbor!")      # 1.0 if the answer is "silver harbor"
"""

from __future__ import annotations

import re
import string
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction

from envs.base import Task

Grader = Callable[[Task, str], float]

INTEGER_TOLERANCE = 1e-6
"""Relative; for an answer that is an integer and a prediction that floating point left beside it (41.9999999)."""
NUMERIC_TOLERANCE = 1e-4
"""Relative; for answers that are no integers, which predictions round."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LONGEST_TEXT_CHARS = 50_000
"""Of a prediction to `exact` and `f1`; what is longer is no answer to a question, and wrong."""
_AHEAD = 1024
_WHOLE_ANSWERS = {"yes", "no", "noanswer"}
_LONGEST_NUMBER_CHARS = 400
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_FRACTION = re.compile(r"([-+]?\d{1,40})/(\d{1,40})")
_LATEX_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(\d{1,40})\}\{(\d{1,40})\}")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: SQuAD's `normalize_answer`."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(task: Task, prediction: str) -> float:
    if len(prediction) > _LONGEST_TEXT_CHARS:
        return 0.0
    return float(any(_equal(answer, prediction) for answer in (task.answer, *task.aliases)))


def f1(task: Task, prediction: str) -> float:
    if len(prediction) > _LONGEST_TEXT_CHARS:
        return 0.0
    return max(_f1(answer, prediction) for answer in (task.answer, *task.aliases))


def numeric(task: Task, prediction: str) -> float:
    got = number(prediction)
    for answer in (task.answer, *task.aliases):
        wanted = number(answer)
        if got is not None and wanted is not None and _numbers_equal(wanted, got):
            return 1.0
    if got is not None and number(task.answer) is not None:
        return 0.0
    return exact(task, prediction)


def symbolic(task: Task, prediction: str) -> float:
    """Raises `EnvError` when the sandbox of `grading_math.py` cannot start."""
    from envs.grading_math import shared_math_grader

    grader = shared_math_grader()
    return float(any(grader.equal(answer, prediction) for answer in (task.answer, *task.aliases)))


def judged(task: Task, prediction: str) -> float:
    """Raises `EnvError` when no judge is configured or its endpoint keeps failing."""
    from envs.judge import shared_judge

    return float(shared_judge().verdict(task, prediction).correct)


GRADERS: dict[str, Grader] = {"exact": exact, "f1": f1, "numeric": numeric, "math": symbolic, "judge": judged}


def grade(task: Task, prediction: str) -> float:
    """Score in [0, 1] by the task's own grader; safe from any thread.

    Raises `KeyError` for a grader that does not exist (checked at loading), `EnvError` for our own failures (no
    sandbox, no judge), never for a prediction.
    """
    return GRADERS[task.grader](task, prediction)


def grade_many(answers: Iterable[tuple[Task, str | None]], *, at_once: int = 2) -> Iterator[float]:
    """Scores in order, each as `grade` gives it; 0 where there is no prediction.

    At most `at_once` are graded at a moment: as many as the math grader has processes, or as the judge's endpoint
    likes. One that takes long holds up only itself. `answers` is read at most 1,024 ahead. Raises as `grade` does.
    """
    waiting: deque[Future[float]] = deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix="grade") as threads:
        try:
            for task, prediction in answers:
                waiting.append(threads.submit(_grade_if_any, task, prediction))
                if len(waiting) >= _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _grade_if_any(task: Task, prediction: str | None) -> float:
    return 0.0 if prediction is None else grade(task, prediction)


def number(text: str) -> Fraction | None:
    """The value of a text that is one number: `-1,234.5`, `$3`, `12%`, `2/3`, `\\frac{2}{3}`, `6.7e-05`, `\\boxed{8}`.

    Exact where it is written exactly; None for all else, infinities and NaN included.
    """
    if len(text) > _LONGEST_NUMBER_CHARS:
        return None
    cleaned = text.strip().strip("*").strip().rstrip(".").strip().strip("$").strip()
    if cleaned.startswith("\\boxed{") and cleaned.endswith("}"):
        cleaned = cleaned.removeprefix("\\boxed{")[:-1].strip()
    cleaned = cleaned.replace("\\$", "").replace("$", "").replace("\\!", "").replace("\N{MINUS SIGN}", "-")
    cleaned = cleaned.removesuffix("%").removesuffix("\\").strip()
    cleaned = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", cleaned)
    if not cleaned.isascii():
        return None
    if match := _LATEX_FRACTION.fullmatch(cleaned):
        cleaned = f"{match[1]}{match[2]}/{match[3]}"
    if match := _FRACTION.fullmatch(cleaned):
        return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
    if not _NUMBER.fullmatch(cleaned):
        return None
    return Fraction(cleaned)


def _equal(answer: str, prediction: str) -> bool:
    wanted = normalise(answer)
    if not wanted:  # such as "A" or "+": nothing is left of it, and of many other texts
        return " ".join(answer.split()).casefold() == " ".join(prediction.split()).casefold()
    return normalise(prediction) == wanted


def _f1(answer: str, prediction: str) -> float:
    wanted, got = normalise(answer), normalise(prediction)
    if wanted != got and (wanted in _WHOLE_ANSWERS or got in _WHOLE_ANSWERS):
        return 0.0
    wanted_words, got_words = wanted.split(), got.split()
    shared = sum((Counter(wanted_words) & Counter(got_words)).values())
    if shared == 0:
        return float(_equal(answer, prediction))
    return 2 * shared / (len(wanted_words) + len(got_words))


def _numbers_equal(wanted: Fraction, got: Fraction) -> bool:
    if wanted == got:
        return True
    if wanted.denominator == 1 and got.denominator == 1:
        return False
    tolerance = Fraction(INTEGER_TOLERANCE if wanted.denominator == 1 else NUMERIC_TOLERANCE)
    return abs(wanted - got) <= tolerance * max(abs(wanted), abs(got))
