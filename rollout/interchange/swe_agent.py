"""SWE-agent's `.traj` files (arXiv 2405.15793): one run each, with `history`, the messages, and `trajectory`.

With function calling the calls are the history's own; without it the command of a turn becomes the call of `bash`. What
the file says of the end is whether something was submitted, not whether it is right, so the outcome is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rollout.interchange.chat_turns import chat
from rollout.interchange.fields import content_text, listed, mapping, text
from rollout.interchange.recorded import ReadOptions, RecordedRun
from rollout.trajectory import StopReason


def matches(record: Any) -> bool:
    return isinstance(record, Mapping) and isinstance(record.get("history"), list) and "trajectory" in record


def read(record: Any, options: ReadOptions) -> RecordedRun:
    document = mapping(record, "the file")
    messages: list[dict[str, Any]] = []
    as_bash = demonstrations = False
    for given in listed(document, "history"):
        message = mapping(given, "a message")
        if message.get("is_demo"):
            demonstrations = True
            continue
        made = {name: message.get(name) for name in ("role", "content", "tool_calls")}
        action = message.get("action")
        if message.get("role") == "assistant" and not message.get("tool_calls") and isinstance(action, str):
            as_bash = True
            thought = message.get("thought")
            made["content"] = thought if isinstance(thought, str) else content_text(message.get("content"))
            made["tool_calls"] = [{"function": {"name": "bash", "arguments": {"command": action.rstrip("\n")}}}]
        messages.append(made)
    told = chat(messages, options, dialect="tool")
    replay, info = _replay(document), document.get("info")
    info = info if isinstance(info, Mapping) else {}
    submission = info.get("submission")
    submitted = isinstance(submission, str) and bool(submission.strip())
    problem = _inside(replay, "problem_statement")
    return RecordedRun(
        question=told.question,
        turns=told.turns,
        dialect="tool",
        kind="swe",
        task_id=text(problem, "id") if isinstance(problem.get("id"), str) else options.file_stem,
        policy=str(_inside(replay, "agent", "model").get("name") or ""),
        prediction=submission if submitted else None,
        stop_reason=StopReason.FINAL if submitted else StopReason.MAX_STEPS,
        stop_detail=str(info.get("exit_status") or ""),
        system_prompt=told.system,
        reworded=(*told.reworded, *(("commands as calls of bash",) if as_bash else ())),
        notes={"left_out": "demonstrations in front of the task"} if demonstrations else {},
    )


def _replay(document: Mapping[str, Any]) -> Mapping[str, Any]:
    config = document.get("replay_config")
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except (ValueError, RecursionError):
            return {}
    return config if isinstance(config, Mapping) else {}


def _inside(tree: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    for name in path:
        inner = tree.get(name)
        if not isinstance(inner, Mapping):
            return {}
        tree = inner
    return tree
