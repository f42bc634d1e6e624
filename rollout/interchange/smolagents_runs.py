"""Recorded smolagents runs: JSON lines of the benchmark example of its repository, code and tool-calling agents.

A row has `question`, `answer` (given), `true_answer`, `source`, `model_id`, `agent_action_type` and
`intermediate_steps`, the run's chat messages. It records no score: the answer is graded here. A run that ran out of
steps was asked for its answer afterwards, without a step of its own; it counts as a failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout.interchange.fields import answer_text, count, listed, mapping, real, text
from rollout.interchange.recorded import SEARCHES, ReadOptions, RecordedRun
from rollout.interchange.smolagents_messages import conversation
from rollout.trajectory import StopReason, Usage

_KINDS = {"math": "math", "simpleqa": "factual", "gaia": "gaia"}


def matches(record: Any) -> bool:
    return isinstance(record, Mapping) and "intermediate_steps" in record


def read(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the row")
    told = conversation(listed(row, "intermediate_steps"))
    source = str(row.get("source", "")).lower()
    tokens = row.get("token_counts")
    tokens = tokens if isinstance(tokens, Mapping) else {}
    original = row.get("original_question")
    return RecordedRun(
        question=text(row, "question"),
        turns=told.turns,
        dialect=told.dialect,
        answer=(answer_text(row.get("true_answer")) or "").strip(),
        grader="math" if source == "math" else "",
        kind=_KINDS.get(source, source or "smolagents"),
        policy=str(row.get("model_id") or ""),
        prediction=answer_text(row.get("answer")),
        stop_reason=StopReason.MAX_STEPS if told.out_of_steps else StopReason.FINAL,
        shown_system_prompt=told.system or None,
        usage=Usage(
            requests=len(told.turns),
            prompt_tokens=count(tokens.get("input_tokens")),
            completion_tokens=count(tokens.get("output_tokens")),
        ),
        started_at_s=real(row.get("start_time")),
        tool_names=told.tool_names or SEARCHES,
        reworded=told.reworded,
        metadata={"original_question": original} if isinstance(original, str) else {},
    )
