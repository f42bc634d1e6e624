"""Chat messages, read and written: JSON lines or Parquet with `messages` (OpenAI, TRL), `prompt` and `completion`
(TRL), or `conversations` (ShareGPT).

Rows that we write carry `key`, `task_id`, `question`, `answer`, `kind`, `dialect`, `policy`, `success` and `reward`
beside the messages; TRL leaves them alone. `prompt`/`completion` rows are one per assistant turn, so that a loss on the
completion alone trains every turn and no observation; read back, the last row of each run holds the whole. ShareGPT's
rows have "human" say the observations, as every reader of them knows that name (TRL does not: give it `chat`). Formats:
https://huggingface.co/docs/trl/dataset_formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rollout.interchange.chat_turns import chat
from rollout.interchange.fields import (
    ANSWERS,
    OUTCOMES,
    PREDICTIONS,
    answer_text,
    first,
    listed,
    mapping,
    real,
    verdict,
)
from rollout.interchange.recorded import SEARCHES, ReadOptions, RecordedRun, RowError
from rollout.interchange.smolagents_messages import conversation
from rollout.trajectory import Message, StopReason, Trajectory

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
}
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def matches_chat(record: Any) -> bool:
    return isinstance(record, Mapping) and isinstance(record.get("messages"), list)


def matches_prompt_completion(record: Any) -> bool:
    return isinstance(record, Mapping) and record.get("prompt") is not None and record.get("completion") is not None


def matches_sharegpt(record: Any) -> bool:
    return isinstance(record, Mapping) and isinstance(record.get("conversations"), list)


def read_chat(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the row")
    return _run(row, listed(row, "messages"), options)


def read_prompt_completion(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the row")
    turn, turns = row.get("turn"), row.get("turns")
    if isinstance(turn, int) and isinstance(turns, int) and turn < turns:
        raise RowError("a turn that a later row holds too", f"turn {turn} of {turns} of {row.get('key')!r}")
    prompt, completion = row["prompt"], row["completion"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else listed(row, "prompt")
    completion = (
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else listed(row, "completion")
    )
    return _run(row, [*prompt, *completion], options)


def read_sharegpt(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the row")
    messages: list[dict[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append({"role": "system", "content": row["system"]})
    for given in listed(row, "conversations"):
        entry = mapping(given, "a message")
        speaker = str(entry.get("from", entry.get("role", ""))).lower()
        said = entry.get("value", entry.get("content"))
        role = _SPEAKERS.get(speaker)
        if role is None:
            raise RowError("a message of an unexpected speaker", repr(speaker))
        if role == "call":
            role, said = "assistant", said if "<tool_call>" in str(said) else f"<tool_call>\n{said}\n</tool_call>"
        messages.append({"role": role, "content": said})
    return _run(row, messages, options)


def _run(row: Mapping[str, Any], messages: Sequence[Any], options: ReadOptions) -> RecordedRun:
    if any(isinstance(each, Mapping) and each.get("role") in ("tool-call", "tool-response") for each in messages):
        return _smolagents_run(row, messages)
    told = chat(messages, options, dialect=str(row.get("dialect") or ""))
    question = row["question"] if isinstance(row.get("question"), str) else told.question
    return RecordedRun(
        question=question,
        user_prompt=told.question if told.question != question else None,
        turns=told.turns,
        dialect=told.dialect,
        system_prompt=told.system,
        reworded=told.reworded,
        **_told(row, told.prediction),
    )


def _smolagents_run(row: Mapping[str, Any], messages: Sequence[Any]) -> RecordedRun:
    told = conversation(messages)
    return RecordedRun(
        question=told.user,
        turns=told.turns,
        dialect=told.dialect,
        shown_system_prompt=told.system or None,
        stop_reason=StopReason.MAX_STEPS if told.out_of_steps else StopReason.FINAL,
        tool_names=told.tool_names or SEARCHES,
        reworded=told.reworded,
        **_told(row, None),
    )


def _told(row: Mapping[str, Any], prediction: str | None) -> dict[str, Any]:
    """What a row says of its run beside the messages."""
    answer = first(row, ANSWERS)
    accepted = [answer_text(each) for each in answer] if isinstance(answer, list) else [answer_text(answer)]
    accepted = [each for each in accepted if each is not None]
    recorded = answer_text(first(row, PREDICTIONS))
    outcome = next((verdict(row[name]) for name in OUTCOMES if verdict(row.get(name)) is not None), None)
    reward = row.get("reward")
    identity = row.get("task_id", row.get("id"))
    return {
        "answer": accepted[0] if accepted else "",
        "aliases": tuple(accepted[1:]),
        "kind": str(row.get("kind") or "chat"),
        "task_id": str(identity) if isinstance(identity, str | int) and str(identity) else "",
        "policy": str(row.get("policy") or row.get("model") or row.get("model_id") or ""),
        "prediction": recorded if recorded is not None else prediction,
        "success": outcome,
        "reward": real(reward) if isinstance(reward, int | float) and not isinstance(reward, bool) else None,
        "notes": {"key": row["key"]} if isinstance(row.get("key"), str) else {},
    }


def chat_rows(trajectory: Trajectory, messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    yield {"messages": [_openai(message) for message in messages], **_columns(trajectory)}


def sharegpt_rows(trajectory: Trajectory, messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    said = [{"from": _SHAREGPT[message.role], "value": message.content} for message in messages]
    yield {"conversations": said, **_columns(trajectory)}


def prompt_completion_rows(trajectory: Trajectory, messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    ends = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for turn, end in enumerate(ends, start=1):
        yield {
            "prompt": [_openai(message) for message in messages[:end]],
            "completion": [_openai(messages[end])],
            "turn": turn,
            "turns": len(ends),
            **_columns(trajectory),
        }


def _openai(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _columns(trajectory: Trajectory) -> dict[str, Any]:
    task = trajectory.task
    return {
        "key": trajectory.key,
        "task_id": task.id,
        "question": task.question,
        "answer": task.answer,
        "kind": task.kind,
        "dialect": trajectory.dialect,
        "policy": trajectory.policy,
        "prediction": trajectory.prediction,
        "success": trajectory.success,
        "reward": trajectory.reward,
    }
