"""tau-bench's recorded conversations: a JSON list of task_id, trial, reward, info and `traj`, OpenAI messages (arXiv
2406.12045).

The agent talks to a simulated user and calls tools; each turn is a step of the tool dialect, the user's reply or the
tool's result its observation. The policy text stays the system prompt: without it a student could not know the rules.
`reward` is 1 when the database ended as it should; there is no answer to grade. A run that ends without its last call
answered, or without the user's "###STOP###", ran out of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rollout.interchange.chat_turns import chat
from rollout.interchange.fields import listed, mapping, real, verdict
from rollout.interchange.recorded import ReadOptions, RecordedRun
from rollout.trajectory import StopReason

_STOP = "###STOP###"
_ENDING_CALL = "transfer_to_human_agents"


def matches(record: Any) -> bool:
    return isinstance(record, Mapping) and isinstance(record.get("traj"), list) and "task_id" in record


def read(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the run")
    messages = listed(row, "traj")
    told = chat(messages, options, dialect="tool")
    last = mapping(messages[-1], "a message")
    ended = _STOP in str(last.get("content")) or last.get("name") == _ENDING_CALL
    info = row.get("info")
    task = info.get("task") if isinstance(info, Mapping) else None
    trial = row.get("trial")
    # What the agent says to the user is no final answer, so no prediction: no step of it is the last by itself.
    turns = tuple(dataclasses.replace(turn, tool_calls=turn.text.count("<tool_call>\n")) for turn in told.turns)
    return RecordedRun(
        question=told.question,
        turns=turns,
        dialect="tool",
        kind="tau_bench",
        task_id=f"tau_bench-{options.file_stem}-{row['task_id']}",
        sample_index=trial if isinstance(trial, int) else None,
        success=verdict(row.get("reward")),
        reward=real(row.get("reward")),
        stop_reason=StopReason.FINAL if ended else StopReason.MAX_STEPS,
        system_prompt=told.system,
        reworded=told.reworded,
        metadata={"instruction": task["instruction"]} if isinstance(task, Mapping) and "instruction" in task else {},
    )
