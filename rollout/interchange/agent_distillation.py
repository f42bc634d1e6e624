"""The published agent-distillation files (arXiv 2505.17612's code): JSON lines or Parquet with `log_data`, and the rows
of its chain-of-thought baseline, with `response`.

`score` is 1, true or blank; a blank one is graded here. `cost` is the run's own in a raw file and the judge's in a
scored one, so `log_data.metadata.cost` comes first. Rows with an `error` and no `log_data` are runs that failed. What
stands behind the question in the task's message (an instruction, a `<reference>` solution) was for the teacher alone:
it becomes the guide, and turns that speak of a reference are named in `leaks`.

Source: `exps_research/unified_framework` of that repository (Apache-2.0): processors, score_answers, and
`save_memory_to_logs` of its smolagents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rollout.dialects import COT
from rollout.interchange.fields import answer_text, content_text, count, first, listed, mapping, real, text, verdict
from rollout.interchange.recorded import SEARCHES, ReadOptions, RecordedRun, RowError, Turn
from rollout.interchange.smolagents_messages import Conversation, conversation
from rollout.trajectory import StopReason, Usage

_REFERENCE = re.compile(r"<reference>(.*?)</reference>", re.DOTALL)
_LEAK = re.compile(r"\b(?:the|this|given|provided) reference\b|\breference (?:solution|answer)\b", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>\s*\Z", re.DOTALL)


def matches(record: Any) -> bool:
    if not isinstance(record, Mapping):
        return False
    return "log_data" in record or ("response" in record and "messages" in record)


def read(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the row")
    if "log_data" not in row:
        return _read_reasoning(row)
    log = row["log_data"]
    if isinstance(log, str) and log.strip():
        try:
            log = json.loads(log)
        except (ValueError, RecursionError) as error:
            raise RowError("a 'log_data' that is no JSON", str(error)) from error
    if not log:
        raise RowError("the run failed when it was recorded", str(row.get("error") or "no log_data")[:120])
    log = mapping(log, "'log_data'")
    metadata = log.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    told = conversation(listed(log, "messages"))
    asked = row.get("question")
    question = asked if isinstance(asked, str) and asked.strip() else _REFERENCE.sub("", told.user).strip()
    reference = _REFERENCE.search(told.user)
    user_prompt, guide = None, told.user.removeprefix(question).strip() or None
    if not told.user.startswith(question):
        user_prompt, guide = _REFERENCE.sub("", told.user).strip(), reference and reference[1].strip()
    prediction = answer_text(row.get("generated_answer"))
    if prediction is None:
        prediction = answer_text(metadata.get("final_answer"))
    source = log.get("source")
    return RecordedRun(
        question=question,
        turns=told.turns,
        dialect=told.dialect,
        answer=answer_text(first(row, ("true_answer", "answer"))) or "",
        grader="math" if _is_math(source) else "",
        kind="math" if _is_math(source) else "agent_distillation",
        policy=_policy(row, metadata),
        prediction=prediction,
        success=verdict(row.get("score")),
        stop_reason=StopReason.MAX_STEPS if _out_of_steps(told, metadata) else StopReason.FINAL,
        shown_system_prompt=told.system or None,
        user_prompt=user_prompt,
        guide=guide,
        leaks=_leaks(told) if reference else (),
        usage=_usage(row, metadata, len(told.turns)),
        duration_s=_duration(metadata),
        tool_names=told.tool_names or SEARCHES,
        reworded=told.reworded,
        metadata={"source": dict(source)} if isinstance(source, Mapping) else {},
    )


def _read_reasoning(row: Mapping[str, Any]) -> RecordedRun:
    if row.get("error"):
        raise RowError("the run failed when it was recorded", str(row["error"])[:120])
    messages = [mapping(message, "a message") for message in listed(row, "messages")]
    asked = [content_text(message.get("content")) for message in messages if message.get("role") == "user"]
    systems = [content_text(message.get("content")) for message in messages if message.get("role") == "system"]
    if len(asked) != 1:
        raise RowError("not exactly one question", f"{len(asked)} user messages")
    response = text(row, "response")
    prediction = answer_text(row.get("generated_answer"))
    said, reworded = _as_answer(response, prediction)
    question = row["question"] if isinstance(row.get("question"), str) else asked[0]
    return RecordedRun(
        question=question,
        user_prompt=asked[0] if asked[0] != question else None,
        turns=(Turn(text=said, tool_calls=0),),
        dialect="cot",
        answer=answer_text(first(row, ("true_answer", "answer"))) or "",
        kind="agent_distillation",
        policy=str(row.get("model_id") or ""),
        prediction=prediction,
        success=verdict(row.get("score")),
        shown_system_prompt=systems[0] if systems else None,
        usage=_usage(row, {}, 1),
        reworded=reworded,
    )


def _as_answer(response: str, prediction: str | None) -> tuple[str, tuple[str, ...]]:
    """The response as the answer dialect writes it: `<answer>` at its end as a line, or the line put behind it."""
    tag = _ANSWER_TAG.search(response)
    if tag:
        return f"{response[: tag.start()].rstrip()}\nAnswer: {tag[1].strip()}", ("<answer> as a line 'Answer:'",)
    if COT.parse(response).action is None and prediction is not None and prediction.strip():
        return f"{response.rstrip()}\nAnswer: {prediction.strip()}", ("a line 'Answer:' behind the response",)
    return response, ()


def _is_math(source: Any) -> bool:
    return isinstance(source, Mapping) and "math" in str(source.get("dataset_name", "")).lower()


def _policy(row: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    model = metadata.get("model")
    named = model.get("model_id") if isinstance(model, Mapping) else None
    return str(row.get("model_id") or named or "")


def _out_of_steps(told: Conversation, metadata: Mapping[str, Any]) -> bool:
    return told.out_of_steps or metadata.get("state") == "max_steps_error"


def _usage(row: Mapping[str, Any], metadata: Mapping[str, Any], requests: int) -> Usage:
    cost, tokens = metadata.get("cost"), metadata.get("token_usage")
    cost = cost if isinstance(cost, Mapping) else {"total_cost": cost}
    tokens = tokens if isinstance(tokens, Mapping) else {}
    own = cost.get("total_cost")
    if own is None and "score" not in row:
        own = row.get("cost")
    return Usage(
        requests=requests,
        prompt_tokens=count(first({**row, **cost, **tokens}, ("input_tokens", "prompt_tokens", "input_token_count"))),
        completion_tokens=count(
            first({**row, **cost, **tokens}, ("output_tokens", "completion_tokens", "output_token_count"))
        ),
        cost_usd=max(real(own), 0.0),
    )


def _duration(metadata: Mapping[str, Any]) -> float:
    performance = metadata.get("performance")
    return real(performance.get("total_duration")) if isinstance(performance, Mapping) else 0.0


def _leaks(told: Conversation) -> tuple[str, ...]:
    found = []
    for i, turn in enumerate(told.turns, start=1):
        leak = _LEAK.search(turn.text)
        if leak:
            found.append(f"step {i} speaks of the guide: {leak[0]!r}")
    return tuple(found)
