"""The chat messages that smolagents makes of a run: roles system, user, assistant, tool-call and tool-response.

Shared by the formats that record runs so (`smolagents_runs`, `agent_distillation`). What smolagents says around an
observation for its own bookkeeping ("Call id: ...", "Observation:") is taken off; "Reached max steps" ends a run and is
no observation. Source: smolagents 1.26, `memory.py`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from envs.base import ObservationKind
from rollout.dialects import CODE
from rollout.interchange.fields import content_text
from rollout.interchange.recorded import RowError, Turn
from rollout.interchange.rewording import FINAL, code_turn, tool_response, tool_turn

INTERPRETER = "python_interpreter"
TASK_LABEL = "New task:\n"
_CALL_ID = re.compile(r"\ACall id: [^\n]*\n")
_PARSING = re.compile(r"Error in (?:code|tool call|action)? ?parsing|Error while parsing|parsing error", re.IGNORECASE)
_MAX_STEPS = "Error:\nReached max steps"
_TOOL_DEFINITION = re.compile(r"^def (\w+)\(", re.MULTILINE)
_ACTION_JSON = re.compile(r"(?:^|\n)\s*Action:\s*(?=\{)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A run as smolagents told it."""

    system: str
    user: str
    """Without "New task:"."""
    dialect: str
    """"code" or "tool"."""
    turns: tuple[Turn, ...]
    out_of_steps: bool
    reworded: tuple[str, ...]
    tool_names: frozenset[str]
    """Of the system prompt's own list, without `final_answer`."""


@dataclass(slots=True, kw_only=True)
class _Open:
    """A turn that is being read."""

    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)


def conversation(messages: Sequence[Any]) -> Conversation:
    """Raises `RowError` for what is no such conversation."""
    system, user, open_turns, out_of_steps = _parts(messages)
    names = {name for turn in open_turns for name, _ in turn.calls}
    as_code = not names or INTERPRETER in names
    turns, reworded = [], set()
    for turn in open_turns:
        made = _code(turn) if as_code else _tool(turn)
        if made.text != turn.text:
            reworded.add("code blocks as this dialect's" if as_code else "tool calls as <tool_call>")
        turns.append(made)
    return Conversation(
        system=system,
        user=user,
        dialect="code" if as_code else "tool",
        turns=tuple(turns),
        out_of_steps=out_of_steps,
        reworded=tuple(sorted(reworded)),
        tool_names=frozenset(_TOOL_DEFINITION.findall(system)) - {FINAL},
    )


def _parts(messages: Sequence[Any]) -> tuple[str, str, list[_Open], bool]:
    system, user = "", None
    turns: list[_Open] = []
    out_of_steps = False
    for message in messages:
        if not isinstance(message, Mapping):
            raise RowError("a message is no object", str(message)[:80])
        role = str(message.get("role")).rpartition(".")[2].lower().replace("_", "-")
        said = content_text(message.get("content"))
        if role == "system":
            if system or user is not None:
                raise RowError("a second system message", said[:80])
            system = said
        elif role == "assistant":
            if user is None:
                raise RowError("an assistant turn before the question")
            turns.append(_Open(text=said))
        elif role == "tool-call":
            if not turns or turns[-1].calls or turns[-1].pieces:
                turns.append(_Open())  # a tool-calling agent that said nothing
            turns[-1].calls += _calls(said)
        elif role in ("tool-response", "user") and turns:
            piece = _CALL_ID.sub("", said)
            if piece.startswith(_MAX_STEPS):
                out_of_steps = True
            else:
                turns[-1].pieces.append(piece)
        elif role == "user" and user is None:
            user = said.removeprefix(TASK_LABEL)
        else:
            raise RowError("a message of an unexpected role", f"{role!r} before any assistant turn")
    if user is None:
        raise RowError("no question")
    return system, user, turns, out_of_steps


def _calls(said: str) -> list[tuple[str, Any]]:
    """Of "Calling tools:" and a list as Python prints it."""
    listed = said.partition("\n")[2]
    try:
        calls = ast.literal_eval(listed)
        return [(str(call["function"]["name"]), call["function"]["arguments"]) for call in calls]
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as error:
        raise RowError("tool calls that cannot be read", f"{type(error).__name__}: {listed[:80]!r}") from error


def _kind(pieces: Sequence[str]) -> ObservationKind:
    errors = [piece for piece in pieces if piece.startswith("Error:")]
    if not errors:
        return ObservationKind.OK
    parsing = any(_PARSING.search(piece[:200]) for piece in errors)
    return ObservationKind.PARSE_ERROR if parsing else ObservationKind.CODE_ERROR


def _code(turn: _Open) -> Turn:
    ran = next((arguments for name, arguments in turn.calls if name == INTERPRETER), None)
    pieces = [piece.removeprefix("Observation:\n") for piece in turn.pieces]
    return Turn(
        text=code_turn(turn.text),
        observation=CODE.observation("\n".join(pieces)),
        kind=_kind(turn.pieces),
        ran=ran if isinstance(ran, str) else None,
    )


def _tool(turn: _Open) -> Turn:
    said = turn.text
    action = _ACTION_JSON.search(said)
    if action and turn.calls:
        said = said[: action.start()]  # the call as text: it is among the calls
    elif turn.calls and said.strip().startswith("{") and _is_json(said):
        said = ""
    pieces = [piece.removeprefix("Observation:\n") for piece in turn.pieces]
    return Turn(
        text=tool_turn(said, turn.calls),
        observation="\n".join(map(tool_response, pieces)),
        kind=_kind(turn.pieces),
    )


def _is_json(said: str) -> bool:
    try:
        json.loads(said)
    except (ValueError, RecursionError):
        return False
    return True
