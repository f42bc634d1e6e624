"""OpenAI's chat messages, with tool calls or without, as turns. Shared by every format that holds such messages.

Tool calls are written into the turn as `<tool_call>` and results come back as `<tool_response>`, as Qwen's chat
template words both. What a chat is written in is told by its text: smolagents' or our code blocks, tool calls,
Search-R1's tags, ReAct's actions, a line "Answer:", else words alone, which the tool dialect reads as an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.base import ObservationKind
from rollout.dialects import CODE, DIALECTS
from rollout.interchange.fields import content_text, mapping
from rollout.interchange.react import looks_like_react, react_turns
from rollout.interchange.recorded import ReadOptions, RowError, Turn
from rollout.interchange.rewording import code_turn, final_answer_of, tool_response, tool_turn

_OBSERVED = "Observation:"
_CODE_BLOCK = re.compile(r"<code>.*?</code>|```(?:py|python)[ \t]*\n.*?```", re.DOTALL)
_SEARCH_TAG = re.compile(r"<(?:search|answer)>.*?(?:</search>|</answer>)", re.DOTALL)
_ANSWER_LINE = re.compile(r"Answer:\s*\S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation, understood."""

    system: str
    question: str
    dialect: str
    turns: tuple[Turn, ...]
    prediction: str | None
    reworded: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class _Open:
    text: str
    calls: bool
    seen: list[str]
    by_tool: list[bool]
    failed: bool = False


def chat(messages: Sequence[Any], options: ReadOptions, dialect: str = "") -> Chat:
    """`dialect`: its name where the file tells it. Raises `RowError` for what is no conversation."""
    system, question, open_turns, reworded = _parts(messages)
    if dialect and dialect not in DIALECTS:
        raise RowError("unknown dialect", f"{dialect!r}; there are {', '.join(DIALECTS)}")
    texts = [turn.text for turn in open_turns]
    observations = [_observed(turn) for turn in open_turns]
    if not dialect and any(map(looks_like_react, texts)):
        turns, words, prediction = react_turns(texts, observations[: len(texts)], options)
        return Chat(
            system=system,
            question=question,
            dialect=options.as_dialect,
            turns=turns,
            prediction=prediction,
            reworded=(*reworded, *words),
        )
    name = dialect or _dialect_of(open_turns)
    turns = []
    for turn, observation in zip(open_turns, observations, strict=True):
        said = code_turn(turn.text) if name == "code" and "<code>" in turn.text else turn.text
        if said != turn.text:
            reworded = (*reworded, "code blocks as this dialect's")
        turns.append(Turn(text=said, observation=observation, kind=_kind(turn, observation, name)))
    return Chat(
        system=system,
        question=question,
        dialect=name,
        turns=tuple(turns),
        prediction=prediction_of(turns[-1].text, name),
        reworded=tuple(dict.fromkeys(reworded)),
    )


def _parts(messages: Sequence[Any]) -> tuple[str, str, list[_Open], tuple[str, ...]]:
    system: list[str] = []
    asked: list[str] = []
    turns: list[_Open] = []
    reworded: list[str] = []
    for given in messages:
        message = mapping(given, "a message")
        role = str(message.get("role", "")).lower()
        said = content_text(message.get("content"))
        if role in ("system", "developer"):
            if asked or turns:
                raise RowError("a system message in the middle", said[:80])
            system.append(said)
        elif role == "user":
            if turns:
                turns[-1].seen.append(said)
                turns[-1].by_tool.append(False)
            else:
                asked.append(said)
        elif role == "assistant":
            if not asked:
                raise RowError("an assistant turn before the question")
            if turns and not turns[-1].seen:
                raise RowError("two assistant turns in a row", said[:80])
            calls = _calls(message)
            thought = message.get("reasoning_content")
            if isinstance(thought, str) and thought.strip():
                said = f"<think>\n{thought.strip()}\n</think>\n\n{said}"
                reworded.append("reasoning as <think>")
            if calls:
                said = tool_turn(said, calls)
                reworded.append("tool calls as <tool_call>")
            turns.append(_Open(text=said, calls=bool(calls), seen=[], by_tool=[]))
        elif role in ("tool", "function"):
            if not turns:
                raise RowError("a tool's result before any assistant turn")
            turns[-1].seen.append(said)
            turns[-1].by_tool.append(True)
            turns[-1].failed = turns[-1].failed or said.startswith("Error")
        else:
            raise RowError("a message of an unexpected role", repr(role))
    if not asked:
        raise RowError("no question")
    if not turns:
        raise RowError("no assistant turn")
    if len(asked) > 1:
        reworded.append("user messages in a row as one")
    return "\n\n".join(system), "\n\n".join(asked), turns, tuple(dict.fromkeys(reworded))


def _calls(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    given = message.get("tool_calls")
    if not given:
        legacy = message.get("function_call")
        given = [{"function": legacy}] if legacy else []
    if not isinstance(given, list):
        raise RowError("tool calls that cannot be read", str(given)[:80])
    calls = []
    for each in given:
        call = mapping(each, "a tool call")
        function = mapping(call.get("function", call), "a tool call")
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name:
            raise RowError("tool calls that cannot be read", f"a call without a name: {str(call)[:60]}")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                pass  # the model wrote no JSON: what it wrote is kept as a text
        elif isinstance(arguments, Mapping):
            # Parquet gives every argument of any row to each row, null where it had none.
            arguments = {key: value for key, value in arguments.items() if value is not None}
        calls.append((name, {} if arguments is None else arguments))
    return calls


def _observed(turn: _Open) -> str:
    """What came back as one message."""
    return "\n".join(
        tool_response(said) if by_tool else said for said, by_tool in zip(turn.seen, turn.by_tool, strict=True)
    )


def _dialect_of(turns: Sequence[_Open]) -> str:
    texts = [turn.text for turn in turns]
    if any(turn.calls or "<tool_call>" in turn.text for turn in turns):
        return "tool"
    acts = any("final_answer(" in said for said in texts) or any(
        seen.startswith(_OBSERVED) for turn in turns for seen in turn.seen
    )
    if acts and any(map(_CODE_BLOCK.search, texts)):
        return "code"
    if any(map(_SEARCH_TAG.search, texts)):
        return "search"
    return "cot" if len(turns) == 1 and _ANSWER_LINE.search(texts[0]) else "tool"


def _kind(turn: _Open, observation: str, dialect: str) -> ObservationKind:
    if dialect == "code":
        said = observation.removeprefix(CODE.observation(""))
        if said.startswith(("Error in code parsing", "Error:\nError in code parsing")):
            return ObservationKind.PARSE_ERROR
        if re.search(r"^Limit \(", said, re.MULTILINE):
            return ObservationKind.LIMIT
        return ObservationKind.CODE_ERROR if re.search(r"^Error:", said, re.MULTILINE) else ObservationKind.OK
    if dialect == "tool" and observation.startswith("Error in tool call parsing"):
        return ObservationKind.PARSE_ERROR
    failed = turn.failed or observation.startswith("<tool_response>\nError")
    return ObservationKind.CODE_ERROR if dialect == "tool" and failed else ObservationKind.OK


def prediction_of(text: str, dialect: str) -> str | None:
    """The answer that a run's last turn gives, as far as its text tells."""
    action = DIALECTS[dialect].parse(text).action
    if action is None:
        return None
    if dialect == "code":
        return final_answer_of(action)
    if dialect == "search":
        return action.removeprefix("<answer>").removesuffix("</answer>") if action.startswith("<answer>") else None
    if dialect == "tool":
        calls = json.loads(action)
        if len(calls) == 1 and isinstance(calls[0], dict) and calls[0].get("name") == "final_answer":
            arguments = calls[0].get("arguments")
            answer = arguments.get("answer") if isinstance(arguments, dict) else None
            return answer if isinstance(answer, str) else None if answer is None else json.dumps(answer)
        return None
    return action
