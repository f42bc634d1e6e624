"""Trajectories as Arrow rows: one explicit schema, `to_table` and `from_table`, an exact round trip.

No files and no Ray in here: `rollout.ledger` writes these tables as Parquet, `rollout.trajectory_queue` carries them
through the object store. One row is one trajectory; steps are a list of structs, enums are strings, the task's free
metadata is a JSON string, token ids are int32 and log-probabilities float32, so pandas, DuckDB and `datasets` read the
files as they are.

Two things are not kept bit by bit: log-probabilities finer than float32 are rounded, and a lone surrogate, which UTF-8
cannot hold, is stored as its escape (``\\ud800``).

Example::

    table = to_table(trajectories)
    assert from_table(table) == trajectories
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from envs.base import ObservationKind, Task
from rollout.trajectory import (
    Candidate,
    Completion,
    Failure,
    FailureClass,
    Span,
    SpanType,
    Step,
    StopReason,
    Trajectory,
)

SCHEMA_VERSION = 1
"""Goes up when a reader of the last version could not read what is written now."""

_VERSION_KEY = b"trajectory_schema_version"


class RecordsError(ValueError):
    """A table that holds no trajectories of this schema version."""


def _field(name: str, type_: pa.DataType, *, null: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=null)


def _list(of: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", of, nullable=False))


_TASK = pa.struct(
    [
        _field("id", pa.string()),
        _field("question", pa.string()),
        _field("answer", pa.string()),
        _field("kind", pa.string()),
        _field("grader", pa.string()),
        _field("aliases", _list(pa.string())),
        _field("metadata_json", pa.string()),
    ]
)
_SPAN = pa.struct([_field("type", pa.string()), _field("start", pa.int32()), _field("end", pa.int32())])
_COMPLETION = pa.struct(
    [
        _field("text", pa.string()),
        _field("token_ids", _list(pa.int32()), null=True),
        _field("logprobs", _list(pa.float32()), null=True),
        _field("finish_reason", pa.string()),
        _field("weights_version", pa.string()),
        _field("prompt_tokens", pa.int32()),
        _field("completion_tokens", pa.int32()),
    ]
)
_CANDIDATE = pa.struct(
    [
        _field("text", pa.string()),
        _field("observation", pa.string()),
        _field("kind", pa.string()),
        _field("votes", pa.int32()),
    ]
)
_STEP = pa.struct(
    [
        _field("completion", _COMPLETION),
        _field("spans", _list(_SPAN)),
        _field("action", pa.string(), null=True),
        _field("observation", pa.string()),
        _field("observation_kind", pa.string()),
        _field("candidates", _list(_CANDIDATE)),
        _field("chosen", pa.int32()),
        _field("tool_calls", pa.int32()),
        _field("policy_s", pa.float64()),
        _field("env_s", pa.float64()),
    ]
)
_FAILURE = pa.struct([_field("failure_class", pa.string()), _field("message", pa.string())])

SCHEMA = pa.schema(
    [
        _field("key", pa.string()),
        _field("task", _TASK),
        _field("dialect", pa.string()),
        _field("system_prompt", pa.string()),
        _field("steps", _list(_STEP)),
        _field("policy", pa.string()),
        _field("weights_version", pa.string()),
        _field("sample_index", pa.int64()),
        _field("seed", pa.int64()),
        _field("reward", pa.float64()),
        _field("success", pa.bool_()),
        _field("prediction", pa.string(), null=True),
        _field("stop_reason", pa.string()),
        _field("failure", _FAILURE, null=True),
        _field("first_thought", pa.string(), null=True),
        _field("started_at_s", pa.float64()),
        _field("duration_s", pa.float64()),
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
"""One row is one trajectory; the schema's metadata names its version."""


def to_table(trajectories: Sequence[Trajectory]) -> pa.Table:
    """[n] rows in the given order. Raises `RecordsError` for task metadata that is not JSON-able."""
    rows = [_row(trajectory) for trajectory in trajectories]
    try:
        return pa.Table.from_pylist(rows, schema=SCHEMA)
    except UnicodeEncodeError:  # a model may write half a surrogate pair; that must not cost the whole batch
        return pa.Table.from_pylist([_encodable(row) for row in rows], schema=SCHEMA)


def from_table(table: pa.Table) -> list[Trajectory]:
    """The trajectories of a table with `SCHEMA`. Raises `RecordsError` for another version or another schema."""
    version = (table.schema.metadata or {}).get(_VERSION_KEY)
    if version is None:
        raise RecordsError(f"no table of trajectories: its schema names no {_VERSION_KEY.decode()}")
    if version.decode() != str(SCHEMA_VERSION):
        raise RecordsError(f"trajectories of schema version {version.decode()}; this code reads {SCHEMA_VERSION}")
    if table.schema.names != SCHEMA.names:
        raise RecordsError(f"columns {table.schema.names} are not those of a trajectory: {SCHEMA.names}")
    return [_trajectory(row) for row in table.to_pylist()]


def _row(trajectory: Trajectory) -> dict[str, Any]:
    task, failure = trajectory.task, trajectory.failure
    return {
        "key": trajectory.key,
        "task": {
            "id": task.id,
            "question": task.question,
            "answer": task.answer,
            "kind": task.kind,
            "grader": task.grader,
            "aliases": task.aliases,
            "metadata_json": _json(task),
        },
        "dialect": trajectory.dialect,
        "system_prompt": trajectory.system_prompt,
        "steps": [_step_row(step) for step in trajectory.steps],
        "policy": trajectory.policy,
        "weights_version": trajectory.weights_version,
        "sample_index": trajectory.sample_index,
        "seed": trajectory.seed,
        "reward": trajectory.reward,
        "success": trajectory.success,
        "prediction": trajectory.prediction,
        "stop_reason": trajectory.stop_reason.value,
        "failure": failure and {"failure_class": failure.failure_class.value, "message": failure.message},
        "first_thought": trajectory.first_thought,
        "started_at_s": trajectory.started_at_s,
        "duration_s": trajectory.duration_s,
    }


def _json(task: Task) -> str:
    if not task.metadata:
        return "{}"
    try:
        return json.dumps(dict(task.metadata), ensure_ascii=False)
    except TypeError as error:
        raise RecordsError(f"the metadata of task {task.id!r} cannot be kept as JSON: {error}") from error


def _step_row(step: Step) -> dict[str, Any]:
    completion = step.completion
    return {
        "completion": {
            "text": completion.text,
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
            "weights_version": completion.weights_version,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
        },
        "spans": [{"type": span.type.value, "start": span.start, "end": span.end} for span in step.spans],
        "action": step.action,
        "observation": step.observation,
        "observation_kind": step.observation_kind.value,
        "candidates": [
            {"text": each.text, "observation": each.observation, "kind": each.kind.value, "votes": each.votes}
            for each in step.candidates
        ],
        "chosen": step.chosen,
        "tool_calls": step.tool_calls,
        "policy_s": step.policy_s,
        "env_s": step.env_s,
    }


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {name: _encodable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(each) for each in value]
    return value


def _trajectory(row: Mapping[str, Any]) -> Trajectory:
    task, failure = row["task"], row["failure"]
    return Trajectory(
        key=row["key"],
        task=Task(
            id=task["id"],
            question=task["question"],
            answer=task["answer"],
            kind=task["kind"],
            grader=task["grader"],
            aliases=tuple(task["aliases"]),
            metadata=json.loads(task["metadata_json"]),
        ),
        dialect=row["dialect"],
        system_prompt=row["system_prompt"],
        steps=tuple(_step(step) for step in row["steps"]),
        policy=row["policy"],
        weights_version=row["weights_version"],
        sample_index=row["sample_index"],
        seed=row["seed"],
        reward=row["reward"],
        success=row["success"],
        prediction=row["prediction"],
        stop_reason=StopReason(row["stop_reason"]),
        failure=failure and Failure(failure_class=FailureClass(failure["failure_class"]), message=failure["message"]),
        first_thought=row["first_thought"],
        started_at_s=row["started_at_s"],
        duration_s=row["duration_s"],
    )


def _step(row: Mapping[str, Any]) -> Step:
    completion = row["completion"]
    return Step(
        completion=Completion(
            text=completion["text"],
            token_ids=_tuple(completion["token_ids"]),
            logprobs=_tuple(completion["logprobs"]),
            finish_reason=completion["finish_reason"],
            weights_version=completion["weights_version"],
            prompt_tokens=completion["prompt_tokens"],
            completion_tokens=completion["completion_tokens"],
        ),
        spans=tuple(Span(type=SpanType(each["type"]), start=each["start"], end=each["end"]) for each in row["spans"]),
        action=row["action"],
        observation=row["observation"],
        observation_kind=ObservationKind(row["observation_kind"]),
        candidates=tuple(
            Candidate(
                text=each["text"],
                observation=each["observation"],
                kind=ObservationKind(each["kind"]),
                votes=each["votes"],
            )
            for each in row["candidates"]
        ),
        chosen=row["chosen"],
        tool_calls=row["tool_calls"],
        policy_s=row["policy_s"],
        env_s=row["env_s"],
    )


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
