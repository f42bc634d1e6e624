"""A `Task` as a JSON object and back, for what crosses a process: requests of the env server, columns of a data set.

Example::

    told = task_to_json(task)              # {"id": ..., "question": ..., "answer": ..., ...}
    assert task_from_json(told) == task    # "question" and "answer" alone would do
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from envs.base import Task

_FIELDS = {field.name for field in fields(Task)}


def task_to_json(task: Task) -> dict[str, Any]:
    """Every field of the task; `metadata` must be JSON already."""
    told = {name: getattr(task, name) for name in sorted(_FIELDS)}
    return {**told, "aliases": list(task.aliases), "metadata": dict(task.metadata)}


def task_from_json(told: Any) -> Task:
    """The task. Raises `ValueError` that names the field that is wrong."""
    from envs.grading import GRADERS

    if not isinstance(told, dict):
        raise ValueError(f"'task' must be an object, not {told!r:.80}")
    unknown = sorted(set(told) - _FIELDS)
    if unknown:
        raise ValueError(f"'task' has no field {unknown[0]!r:.80}; it has {', '.join(sorted(_FIELDS))}")
    values = {"id": "task", "kind": "task", "grader": "exact", **told}
    for name in ("id", "question", "answer", "kind", "grader"):
        if not isinstance(values.get(name), str):
            raise ValueError(f"the task's {name!r} must be a string, not {values.get(name)!r:.80}")
    if values["grader"] not in GRADERS:
        raise ValueError(f"grader {values['grader']!r:.80} is unknown; there are {', '.join(sorted(GRADERS))}")
    aliases, metadata = values.get("aliases", ()), values.get("metadata", {})
    if not isinstance(aliases, (list, tuple)) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError(f"the task's 'aliases' must be a list of strings, not {aliases!r:.80}")
    if not isinstance(metadata, dict):
        raise ValueError(f"the task's 'metadata' must be an object, not {metadata!r:.80}")
    return Task(**{**values, "aliases": tuple(aliases), "metadata": metadata})
