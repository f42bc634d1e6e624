"""`ToolEnv`: the agent acts by JSON function calls, as Qwen, Hermes and OpenAI-compatible APIs have them.

An action is JSON text, parsed out of the model's turn already (`rollout.dialects` has the `<tool_call>` wording): one
call `{"name": ..., "arguments": {...}}` or a list of them, which run at the same moment. The call of `final_answer`,
which is built in and stands alone, ends the episode. What comes back is one `<tool_response>` block a call, as Qwen's
chat template shows tool messages; the bare results are in `info["results"]`. A call that cannot be made is told to
the model; a tool that breaks or takes longer than `tool_s` is our own failure.

Example::

    env = ToolEnv(tools=[Tool.from_function(add)], grade=grade)
    env.reset(task, seed=0)
    env.step('{"name": "add", "arguments": {"a": 40, "b": 2}}').observation.text
    # '<tool_response>\\n42\\n</tool_response>'
    env.step('{"name": "final_answer", "arguments": {"answer": "42"}}').terminated      # True

Format: https://qwen.readthedocs.io/en/latest/framework/function_call.html (Hermes style).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.base import Observation, ObservationKind, Task
from envs.stateless_env import Outcome, StatelessEnv, clip, run_together
from envs.tools import Tool, ToolError, tool_schemas

FINAL_ANSWER = "final_answer"
_FORM = 'a call is {"name": "...", "arguments": {...}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One function call, well-formed; whether there is such a function shows when it is made."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The same for calls that are the same."""
        return json.dumps([self.name, self.arguments], sort_keys=True)


class ActionError(ValueError):
    """An action that holds no calls; the message says what is wrong and is shown to the model."""


class ToolEnv(StatelessEnv):
    """One episode at a time; see `envs.base.Env` for the contract.

    Tools are called from several threads. `stateless=False` says that a tool changes something: such an env cannot
    preview. Results longer than `output_chars` lose their middle; a turn may hold `max_calls` calls.
    """

    def __init__(
        self,
        *,
        tools: Sequence[Tool],
        grade: Callable[[Task, str], float],
        max_steps: int = 5,
        max_calls: int = 8,
        tool_s: float = 120.0,
        output_chars: int = 8000,
        stateless: bool = True,
    ) -> None:
        super().__init__(grade=grade, max_steps=max_steps)
        for name, value in (("max_calls", max_calls), ("tool_s", tool_s), ("output_chars", output_chars)):
            if value <= 0:
                raise ValueError(f"{name}={value!r} must be positive")
        self.can_preview = stateless
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) != len(tools) or FINAL_ANSWER in self._tools:
            raise ValueError(f"tool names must differ, from {FINAL_ANSWER!r} too: {[tool.name for tool in tools]}")
        self._schemas = tool_schemas(tools)
        self._max_calls, self._tool_s, self._output_chars = max_calls, tool_s, output_chars

    def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        observation, info = super().reset(task, seed)
        return observation, {**info, "tools": self._schemas}

    def _act(self, actions: Sequence[str]) -> list[Outcome]:
        turns: list[Outcome | list[Call]] = [self._read(action) for action in actions]
        # Candidates of one step often ask for the same thing: it is asked once.
        calls = {call.key: call for turn in turns if isinstance(turn, list) for call in turn}
        if self.can_preview:
            made, new = self._made, [call for key, call in calls.items() if key not in self._made]
            made |= zip([call.key for call in new], self._make(new), strict=True)
            return [turn if isinstance(turn, Outcome) else self._show([made[c.key] for c in turn]) for turn in turns]
        return [turn if isinstance(turn, Outcome) else self._show(self._make(turn)) for turn in turns]

    def _read(self, action: str) -> Outcome | list[Call]:
        """The calls to make, or what the action leads to without any."""
        try:
            calls = parse_calls(action)
        except ActionError as error:
            return Outcome(text=_response(f"Error: {error}"), kind=ObservationKind.PARSE_ERROR)
        if len(calls) > self._max_calls:
            text = f"Error: {len(calls)} calls in one turn, {self._max_calls} are allowed; none was made"
            return Outcome(text=_response(text), kind=ObservationKind.LIMIT)
        finals = [call for call in calls if call.name == FINAL_ANSWER]
        if not finals:
            return calls
        if len(calls) > 1:
            text = f"Error: {FINAL_ANSWER} must be the only call of its turn; none was made"
            return Outcome(text=_response(text), kind=ObservationKind.PARSE_ERROR)
        [arguments] = [call.arguments for call in finals]
        if set(arguments) != {"answer"}:
            text = f"Error: {FINAL_ANSWER} needs argument 'answer' and no other, got {', '.join(arguments) or 'none'}"
            return Outcome(text=_response(text), kind=ObservationKind.PARSE_ERROR)
        return Outcome(text="", final=clip(_as_text(arguments["answer"]), self._output_chars))

    def _make(self, calls: Sequence[Call]) -> list[str | ToolError]:
        """Each call's result as text, or the model's mistake. Raises `EnvError`."""
        if not calls:
            return []
        results = run_together([lambda call=call: self._call(call) for call in calls], timeout_s=self._tool_s)
        return [result if isinstance(result, ToolError) else clip(result, self._output_chars) for result in results]

    def _call(self, call: Call) -> str:
        if call.name not in self._tools:
            raise ToolError(f"there is no tool {call.name!r:.80}; there are {', '.join([*self._tools, FINAL_ANSWER])}")
        return _as_text(self._tools[call.name].call([], call.arguments))

    def _show(self, results: Sequence[str | ToolError]) -> Outcome:
        chars = self._output_chars
        texts = [f"Error: {clip(str(each), chars)}" if isinstance(each, ToolError) else each for each in results]
        failed = any(isinstance(result, ToolError) for result in results)
        return Outcome(
            text="\n".join(map(_response, texts)),
            kind=ObservationKind.CODE_ERROR if failed else ObservationKind.OK,
            tool_calls=len(results),
            info={"results": texts},
        )


def parse_calls(action: str) -> list[Call]:
    """The calls that an action's JSON text holds, one at least. Raises `ActionError`."""
    try:
        document = json.loads(action)
        json.dumps(document)  # what can be read may be nested too deeply to be written
    except json.JSONDecodeError as error:
        raise ActionError(f"the call is not JSON: {error.msg} at character {error.pos}; {_FORM}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets in brackets in brackets
        raise ActionError(f"the call is no JSON that can be read; {_FORM}") from None
    entries = document if isinstance(document, list) else [document]
    if not entries:
        raise ActionError(f"there is no call; {_FORM}")
    return [_call(entry) for entry in entries]


def _call(entry: Any) -> Call:
    if not isinstance(entry, dict):
        raise ActionError(f"{_FORM}, not {json.dumps(entry):.80}")
    name, arguments = entry.get("name"), entry.get("arguments")
    if not isinstance(name, str) or not name:
        raise ActionError(f"a call needs a 'name', a string, got {json.dumps(name):.80}; {_FORM}")
    if not isinstance(arguments, dict):
        raise ActionError(f"a call needs 'arguments', an object, got {json.dumps(arguments):.80}; {_FORM}")
    return Call(name=name, arguments=arguments)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _response(text: str) -> str:
    return f"<tool_response>\n{text}\n</tool_response>"
