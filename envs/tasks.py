"""Task files: JSON lines (`{"question", "answer", ...}` a line) and the paper's JSON (`{"metadata", "examples":
[...]}`).

Every row is checked before anything starts; a bad one is named by file and line.

Example::

    tasks = load_tasks("my_tasks.jsonl", kind="math", grader="numeric")
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from envs.base import Task, TaskError
from envs.grading import GRADERS

_KNOWN = {"id", "question", "answer", "kind", "grader", "aliases"}


def load_tasks(path: str | Path, *, kind: str = "task", grader: str = "exact") -> list[Task]:
    """All tasks of a `.jsonl` or `.json` file; `kind` and `grader` hold for rows that name none.

    Raises `TaskError` for a missing file, a malformed row or a repeated id.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(f"task file {str(path)!r} does not exist")
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    for place, row in _rows(path):
        task = _task(row, place, default_id=f"{path.stem}-{len(tasks)}", kind=kind, grader=grader)
        if task.id in seen:
            raise TaskError(f"{place}: id {task.id!r} was already used at {seen[task.id]}; ids must be unique")
        seen[task.id] = place
        tasks.append(task)
    if not tasks:
        raise TaskError(f"task file {str(path)!r} holds no task")
    return tasks


def check_disjoint(train: list[Task], test: list[Task]) -> None:
    """Raises `TaskError` when a test question also stands in training (white space and case aside)."""
    known = {_folded(task.question): task.id for task in train}
    for task in test:
        if _folded(task.question) in known:
            raise TaskError(
                f"test task {task.id!r} has the same question as training task {known[_folded(task.question)]!r}: "
                "train and test must share none"
            )


def _folded(question: str) -> str:
    return " ".join(question.split()).casefold()


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        examples = document.get("examples") if isinstance(document, dict) else document
        if not isinstance(examples, list):
            raise TaskError(f'{path}:1: expected {{"examples": [...]}} or a list of tasks')
        yield from ((f"{path}: example {i}", row) for i, row in enumerate(examples))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None


def _task(row: Any, place: str, *, default_id: str, kind: str, grader: str) -> Task:
    if not isinstance(row, dict):
        raise TaskError(f"{place}: a task is a JSON object, not {type(row).__name__}")
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise TaskError(f"{place}: 'question' must be a non-empty string, not {question!r}")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise TaskError(f"{place}: 'answer' must be a non-empty string or a number, not {answer!r}")
    aliases = row.get("aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise TaskError(f"{place}: 'aliases' must be a list of strings, not {aliases!r}")
    name = row.get("grader") or grader
    if name not in GRADERS:
        raise TaskError(f"{place}: grader {name!r} is unknown; there are {sorted(GRADERS)}")
    return Task(
        id=str(row.get("id") or default_id),
        question=question,
        answer=str(answer),
        kind=str(row.get("kind") or kind),
        grader=name,
        aliases=tuple(aliases),
        metadata={key: value for key, value in row.items() if key not in _KNOWN},
    )
