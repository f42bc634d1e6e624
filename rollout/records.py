"""Trajectories as Arrow rows: one explicit schema, `to_table` and `from_table`, an exact round trip.

No files and no Ray in here: `rollout.ledger` writes these tables as Parquet, `rollout.trajectory_queue` carries them
through the object store. One row is one trajectory; steps are a list of structs, enums are strings, the task's free
metadata is a JSON string, token ids are int32 and log-probabilities float32, so pandas, DuckDB and `datasets` read the
files as they are. Prompt ids are kept as what each prompt adds to the conversation so far (`rollout.prompt_ids`).

The columns from `task_id` to `cost_usd` repeat what the nested ones say, so that tools can group and filter without
taking anything apart; they are written and never read back.

Two things are not kept bit by bit: log-probabilities finer than float32 are rounded, and a lone surrogate, which UTF-8
cannot hold, is stored as its escape (``\\ud800``).

Example::

    table = to_table(trajectories)
    assert from_table(table) == trajectories
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pyarrow as pa

from envs.base import ObservationKind, Task
from rollout import prompt_ids
from rollout.columns import Column, Field, Items, Leaf, Struct
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
    Usage,
)

SCHEMA_VERSION = 3
"""Goes up when a reader of the last version could not read what is written now."""
READABLE_VERSIONS = (1, 2, 3)
"""1 knows no prompt ids, usage, guides, losers' tokens and flat columns, 2 no likeliest tokens; they come back as their
defaults."""

_VERSION_KEY = b"trajectory_schema_version"


class RecordsError(ValueError):
    """A table that holds no trajectories of a schema version that this code reads."""


@dataclass(frozen=True, slots=True)
class _StepRow:
    step: Step
    kept: int | None
    new: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Row:
    """A trajectory, its steps with their prompts split."""

    of: Trajectory
    steps: list[_StepRow]


def _text(*, null: bool = False) -> Column:
    return Leaf(pa.string(), null=null)


def _count(*, null: bool = False) -> Column:
    return Leaf(pa.int32(), null=null)


def _ids() -> Column:
    return Items(Leaf(pa.int32()), null=True)


def _logprobs() -> Column:
    return Items(Leaf(pa.float32()), null=True)


_TASK = Struct(
    Field("id", _text()),
    Field("question", _text()),
    Field("answer", _text()),
    Field("kind", _text()),
    Field("grader", _text()),
    Field("aliases", Items(_text())),
    Field("metadata_json", _text(), get=lambda task: _json(task)),
    make=lambda *, metadata_json, **fields: Task(**fields, metadata=json.loads(metadata_json)),
)
_SPAN = Struct(
    Field("type", Leaf(pa.string(), enum=SpanType)), Field("start", _count()), Field("end", _count()), make=Span
)
_COMPLETION = Struct(  # made when the prompts are joined again
    Field("text", _text(), get=attrgetter("step.completion.text")),
    Field("token_ids", _ids(), get=attrgetter("step.completion.token_ids")),
    Field("logprobs", _logprobs(), get=attrgetter("step.completion.logprobs")),
    Field("finish_reason", _text(), get=attrgetter("step.completion.finish_reason")),
    Field("weights_version", _text(), get=attrgetter("step.completion.weights_version")),
    Field("prompt_tokens", _count(), get=attrgetter("step.completion.prompt_tokens")),
    Field("completion_tokens", _count(), get=attrgetter("step.completion.completion_tokens")),
    Field("prompt_kept", _count(null=True), get=attrgetter("kept"), since=2),
    Field("prompt_new", _ids(), get=attrgetter("new"), since=2),
    Field("prefix_by", _text(), get=attrgetter("step.completion.prefix_by"), since=2),
    Field("cost_usd", Leaf(pa.float64()), get=attrgetter("step.completion.cost_usd"), since=2),
    Field("cached", Leaf(pa.bool_()), get=attrgetter("step.completion.cached"), since=2),
    Field("top_ids", _ids(), get=attrgetter("step.completion.top_ids"), since=3),
    Field("top_logprobs", _logprobs(), get=attrgetter("step.completion.top_logprobs"), since=3),
    make=dict,
)
_CANDIDATE = Struct(
    Field("text", _text()),
    Field("observation", _text()),
    Field("kind", Leaf(pa.string(), enum=ObservationKind)),
    Field("votes", _count()),
    Field("ran", Leaf(pa.bool_()), since=2),
    Field("token_ids", _ids(), since=2),
    Field("logprobs", _logprobs(), since=2),
    make=Candidate,
)
_STEP = Struct(
    Field("completion", _COMPLETION, get=lambda row: row),
    Field("spans", Items(_SPAN), get=attrgetter("step.spans")),
    Field("action", _text(null=True), get=attrgetter("step.action")),
    Field("observation", _text(), get=attrgetter("step.observation")),
    Field("observation_kind", Leaf(pa.string(), enum=ObservationKind), get=attrgetter("step.observation_kind")),
    Field("candidates", Items(_CANDIDATE), get=attrgetter("step.candidates")),
    Field("chosen", _count(), get=attrgetter("step.chosen")),
    Field("tool_calls", _count(), get=attrgetter("step.tool_calls")),
    Field("policy_s", Leaf(pa.float64()), get=attrgetter("step.policy_s")),
    Field("env_s", Leaf(pa.float64()), get=attrgetter("step.env_s")),
    make=dict,
)
_FAILURE = Struct(
    Field("failure_class", Leaf(pa.string(), enum=FailureClass)),
    Field("message", _text()),
    make=Failure,
    blank=Failure(failure_class=FailureClass.ENGINE, message=""),
)
_USAGE = Struct(
    Field("requests", Leaf(pa.int64())),
    Field("prompt_tokens", Leaf(pa.int64())),
    Field("completion_tokens", Leaf(pa.int64())),
    Field("cost_usd", Leaf(pa.float64())),
    make=Usage,
)


def _of(name: str, column: Column, *, since: int = 1) -> Field:
    return Field(name, column, get=attrgetter(f"of.{name}"), since=since)


def _flat(name: str, column: Column, get: str | None = None) -> Field:
    return Field(name, column, get=attrgetter(f"of.{get or name}"), since=2, read=False)


def _trajectory(*, steps: Sequence[dict[str, Any]], **fields: Any) -> Trajectory:
    made: list[Step] = []
    conversation: tuple[int, ...] = ()
    for step in steps:
        said = step["completion"]
        kept, new = said.pop("prompt_kept", None), said.pop("prompt_new", None)
        if kept is not None and new is not None:
            said["prompt_ids"] = prompt = conversation[:kept] + new
            conversation = prompt_ids.after(prompt, said["token_ids"], said["completion_tokens"])
        step["completion"] = Completion(**said)
        made.append(Step(**step))
    return Trajectory(steps=tuple(made), **fields)


_TRAJECTORY = Struct(
    _of("key", _text()),
    _of("task", _TASK),
    _of("dialect", _text()),
    _of("system_prompt", _text()),
    Field("steps", Items(_STEP)),
    _of("policy", _text()),
    _of("weights_version", _text()),
    _of("sample_index", Leaf(pa.int64())),
    _of("seed", Leaf(pa.int64())),
    _of("reward", Leaf(pa.float64())),
    _of("success", Leaf(pa.bool_())),
    _of("prediction", _text(null=True)),
    _of("stop_reason", Leaf(pa.string(), enum=StopReason)),
    _of("failure", _FAILURE),
    _of("first_thought", _text(null=True)),
    _of("started_at_s", Leaf(pa.float64())),
    _of("duration_s", Leaf(pa.float64())),
    _of("stop_detail", _text(), since=2),
    _of("shown_system_prompt", _text(null=True), since=2),
    _of("user_prompt", _text(null=True), since=2),
    _of("guide", _text(null=True), since=2),
    _of("leaks", Items(_text()), since=2),
    _of("usage", _USAGE, since=2),
    _flat("task_id", _text(), "task.id"),
    _flat("kind", _text(), "task.kind"),
    Field("failure_class", _text(null=True), get=lambda row: _failure_class(row.of), since=2, read=False),
    _flat("trainable", Leaf(pa.bool_())),
    _flat("truncated", Leaf(pa.bool_())),
    _flat("tokens", _text()),
    Field("step_count", _count(), get=lambda row: len(row.steps), since=2, read=False),
    Field(
        "tool_calls",
        Leaf(pa.int64()),
        get=lambda row: sum(each.step.tool_calls for each in row.steps),
        since=2,
        read=False,
    ),
    Field(
        "parse_errors",
        _count(),
        get=lambda row: sum(each.step.observation_kind is ObservationKind.PARSE_ERROR for each in row.steps),
        since=2,
        read=False,
    ),
    Field(
        "completion_tokens",
        Leaf(pa.int64()),
        get=lambda row: sum(each.step.completion.completion_tokens for each in row.steps),
        since=2,
        read=False,
    ),
    _flat("cost_usd", Leaf(pa.float64()), "usage.cost_usd"),
    make=_trajectory,
)


def _schema() -> pa.Schema:
    version = {_VERSION_KEY: str(SCHEMA_VERSION).encode()}
    return pa.schema([each.arrow() for each in _TRAJECTORY.fields], metadata=version)


SCHEMA = _schema()
"""One row is one trajectory; the schema's metadata names its version."""
_NEEDED = {
    version: {each.name for each in _TRAJECTORY.fields if each.read and each.since <= version}
    for version in READABLE_VERSIONS
}


def to_table(trajectories: Sequence[Trajectory]) -> pa.Table:
    """[n] rows in the given order. Raises `RecordsError` for task metadata that is not JSON-able."""
    rows = [_Row(each, _split(each)) for each in trajectories]
    return pa.Table.from_arrays(_TRAJECTORY.build_fields(rows), schema=SCHEMA)


def from_table(table: pa.Table) -> list[Trajectory]:
    """The trajectories of a table with `SCHEMA`, or with that of an earlier version that is still readable.

    Raises `RecordsError` for another version or another schema.
    """
    version = schema_version(table.schema)
    missing = sorted(_NEEDED[version].difference(table.schema.names))
    if missing:
        raise RecordsError(f"no table of trajectories: it has no column {missing[0]!r}")
    arrays = {name: table.column(name).combine_chunks() for name in _NEEDED[version]}
    try:
        return _TRAJECTORY.read_fields(arrays, table.num_rows)
    except (TypeError, KeyError, ValueError) as error:
        raise RecordsError(f"columns are not those of a trajectory of schema version {version}: {error!r}") from error


def schema_version(schema: pa.Schema) -> int:
    """Raises `RecordsError` when the schema names none, or one that this code does not read."""
    named = (schema.metadata or {}).get(_VERSION_KEY)
    if named is None:
        raise RecordsError(f"no table of trajectories: its schema names no {_VERSION_KEY.decode()}")
    if not named.isdigit() or int(named) not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise RecordsError(f"trajectories of schema version {named.decode()}; this code reads {readable}")
    return int(named)


def current(table: pa.Table) -> pa.Table:
    """The same rows with `SCHEMA`, when the table is of an earlier version."""
    return table if schema_version(table.schema) == SCHEMA_VERSION else to_table(from_table(table))


def _split(trajectory: Trajectory) -> list[_StepRow]:
    split = prompt_ids.split([step.completion for step in trajectory.steps])
    return [_StepRow(step, kept, new) for step, (kept, new) in zip(trajectory.steps, split, strict=True)]


def _failure_class(trajectory: Trajectory) -> str | None:
    return None if trajectory.failure is None else trajectory.failure.failure_class.value


def _json(task: Task) -> str:
    if not task.metadata:
        return "{}"
    try:
        return json.dumps(dict(task.metadata), ensure_ascii=False)
    except TypeError as error:
        raise RecordsError(f"the metadata of task {task.id!r} cannot be kept as JSON: {error}") from error
