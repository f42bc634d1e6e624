"""Tasks from files: every row is checked before anything starts, and a bad one is named by file and line.

The formats are in `task_files.py`: JSON lines, the paper's JSON, Parquet, Hugging Face data sets. `Columns` says which
column holds what when a file has names of its own. Splits that share questions are refused (`task_leakage.py`).

Example::

    tasks = load_tasks("my_tasks.jsonl", kind="math", grader="numeric")
    tasks = load_tasks("hf:openai/gsm8k:main:train", grader="numeric", columns=Columns(answer_after="####"))
    check_disjoint(tasks, load_tasks("test.parquet"))
"""

from __future__ import annotations

import datetime
import decimal
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.base import Task, TaskError
from envs.grading import GRADERS
from envs.task_files import is_papers_format, rows_of, stem_of
from envs.task_leakage import check_disjoint, overlaps, without_overlap

__all__ = ["Columns", "check_disjoint", "load_tasks", "overlaps", "without_overlap"]

logger = logging.getLogger(__name__)

_PROGRESS_ROWS = 1000
_SHOWN_VALUE_CHARS = 200
_MISSING = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column of a file holds what. A dot goes into a nested one: `answer.value`, `answers.text`."""

    question: str = "question"
    answer: str = "answer"
    """Text or a number; of a list of texts the first is the answer and the others are aliases."""
    id: str = "id"
    aliases: str = "aliases"
    """A list of texts; need not exist."""
    kind: str = "kind"
    grader: str = "grader"
    answer_after: str = ""
    """Where answers are worked solutions: the mark whose last occurrence comes before the answer, `####` in GSM8K.
    What stands before it is kept as the metadata's `solution`, unless a column has that name."""


def load_tasks(
    path: str | Path,
    *,
    kind: str = "task",
    grader: str = "exact",
    columns: Columns = Columns(),  # noqa: B008  (frozen)
    limit: int | None = None,
    skip_unanswered: bool | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Task]:
    """All tasks of a file, a folder or a hub data set, or the first `limit`; see `task_files.py` for names.

    `kind` and `grader` hold for rows that name none. A row without an id gets the file's name and its number, and so
    does one with a whole number for an id, since two files number their rows alike. Columns that are not mapped become
    the task's metadata, as far as they are plain data. `skip_unanswered` leaves rows out whose answer is null or blank,
    with a warning; None does so for the paper's format, whose own files hold some. `on_progress` is called with the
    number of rows read, every 1,000 and at the end.

    Raises `TaskError` for a missing file, a malformed row or a repeated id.
    """
    if grader not in GRADERS:
        raise TaskError(f"grader {grader!r} is unknown; there are {sorted(GRADERS)}")
    if limit is not None and limit < 1:
        raise TaskError(f"limit={limit!r} must be at least 1")
    skip = is_papers_format(path) if skip_unanswered is None else skip_unanswered
    stem = stem_of(path)
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    unanswered: list[str] = []
    rows = 0
    for place, row in rows_of(path):
        rows += 1
        if on_progress is not None and rows % _PROGRESS_ROWS == 0:
            on_progress(rows)
        if skip and isinstance(row, dict) and _is_blank(_at(row, columns.answer)):
            unanswered.append(place)
            continue
        task = _task(row, place, stem=stem, number=rows - 1, kind=kind, grader=grader, columns=columns)
        if task.id in seen:
            raise TaskError(f"{place}: id {task.id!r} was already used at {seen[task.id]}; ids must be unique")
        seen[task.id] = place
        tasks.append(task)
        if len(tasks) == limit:
            break
    if on_progress is not None and rows % _PROGRESS_ROWS:
        on_progress(rows)
    if unanswered:
        logger.warning("left out %d rows without an answer: %s", len(unanswered), "; ".join(unanswered[:5]))
    if not tasks:
        raise TaskError(f"task file {str(path)!r} holds no task")
    return tasks


def _task(row: Any, place: str, *, stem: str, number: int, kind: str, grader: str, columns: Columns) -> Task:
    if not isinstance(row, dict):
        raise TaskError(f"{place}: a task is a JSON object, not {type(row).__name__}")
    question = _at(row, columns.question)
    if not isinstance(question, str) or not question.strip():
        raise TaskError(f"{place}: {columns.question!r} must be a non-empty string, not {_problem(row, question)}")
    answer, aliases = _answer(row, place, columns)
    more = _at(row, columns.aliases)
    if more is _MISSING or more is None:
        more = []
    if not isinstance(more, list) or not all(isinstance(alias, str) for alias in more):
        raise TaskError(f"{place}: {columns.aliases!r} must be a list of strings, not {_shown(more)}")
    name = _or(row, columns.grader, grader)
    if name not in GRADERS:
        raise TaskError(f"{place}: grader {name!r} is unknown; there are {sorted(GRADERS)}")
    return Task(
        id=_id(row, place, stem=stem, number=number, column=columns.id),
        question=question,
        answer=answer,
        kind=str(_or(row, columns.kind, kind)),
        grader=name,
        aliases=tuple(alias for alias in dict.fromkeys((*aliases, *more)) if alias.strip() and alias != answer),
        metadata=_worked_solution(row, columns) | _metadata(row, columns),
    )


def _answer(row: Mapping[str, Any], place: str, columns: Columns) -> tuple[str, list[str]]:
    """The answer, and the aliases that stood beside it in a list."""
    value = _at(row, columns.answer)
    answers = value if isinstance(value, list) and value else [value]
    for one in answers:
        is_number = isinstance(one, int | float | decimal.Decimal) and not isinstance(one, bool) and math.isfinite(one)
        if not is_number and not (isinstance(one, str) and one.strip()):
            raise TaskError(
                f"{place}: {columns.answer!r} must be a non-empty string or a finite number, or a list of them, "
                f"not {_problem(row, value)}"
            )
    texts = [str(one) for one in answers]
    if mark := columns.answer_after:
        for index, text in enumerate(texts):
            before, found, after = text.rpartition(mark)
            if not found or not after.strip():
                raise TaskError(f"{place}: {columns.answer!r} has no answer after {mark!r}: {_shown(before + after)}")
            texts[index] = after.strip()
    return texts[0], texts[1:]


def _id(row: Mapping[str, Any], place: str, *, stem: str, number: int, column: str) -> str:
    value = _at(row, column)
    if value is _MISSING or value is None or value == "":
        return f"{stem}-{number}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{stem}-{value}"
    if not isinstance(value, str):
        raise TaskError(f"{place}: {column!r} must be a string or a whole number, not {_shown(value)}")
    return value


def _metadata(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    mapped = {
        path.partition(".")[0]
        for path in (columns.id, columns.question, columns.answer, columns.aliases, columns.kind, columns.grader)
        if "." not in path
    }
    plain = ((key, _plain(value)) for key, value in row.items() if key not in mapped)
    return {key: value for key, value in plain if value is not _MISSING}


def _worked_solution(row: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    value = _at(row, columns.answer)
    if not columns.answer_after or not isinstance(value, str):
        return {}
    solution = value.rpartition(columns.answer_after)[0].strip()
    return {"solution": solution} if solution else {}


def _plain(value: Any) -> Any:
    """JSON-like data; dates and decimals as text; `_MISSING` for all else (images, bytes)."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _MISSING if any(item is _MISSING for item in items) else items
    if isinstance(value, Mapping):
        pairs = {str(key): _plain(item) for key, item in value.items()}
        return _MISSING if any(item is _MISSING for item in pairs.values()) else pairs
    return _MISSING


def _at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, `_MISSING` when there is none. A column with dots in its name is found as well."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _or(row: Mapping[str, Any], path: str, default: str) -> Any:
    value = _at(row, path)
    return default if value is _MISSING or value is None or value == "" else value


def _problem(row: Mapping[str, Any], value: Any) -> str:
    if value is _MISSING:
        return f"missing; the columns are {', '.join(map(str, row)) or 'none'}"
    return _shown(value)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_VALUE_CHARS else text[:_SHOWN_VALUE_CHARS] + "..."
