"""TRL: an env as `environment_factory` of `GRPOTrainer`, with its tools as methods and its reward as reward function.

`trl_environment` makes the class that TRL wants: `reset(**row)` and one method a tool, with the signature and docstring
that the chat template shows to the model. TRL runs the conversation; the model answers in plain words (or by
`final_answer` in its code), and `episode_reward` gives the env's own grade. Where the env itself failed the reward is
None, which TRL keeps out of the group's baseline and of the loss; the model is told no details.

Example::

    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        args=GRPOConfig(max_tool_calling_iterations=5),
        train_dataset=Dataset.from_list(task_rows(tasks)),
        environment_factory=trl_environment("code", tools=[search_tool]),
        reward_funcs=episode_reward,
    )

TRL 1.x: https://huggingface.co/docs/trl/grpo_trainer (`environment_factory` is marked experimental there).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from envs.adapters.task_json import task_from_json, task_to_json
from envs.base import EnvError, StepResult, Task
from envs.registry import env_factory
from envs.tools import Tool

_PYTHON_TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": None,
}
_OVER = "The answer was given already: the episode is over."
_OUT_OF_ORDER = "the tool is out of order"
_THINK = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surface:
    """How calls and words become actions of an env."""

    calls: Sequence[Tool]
    """What the model may call; each one's function gives the env's action."""
    answer: Callable[[str], str]
    """The action that gives a final answer."""


class TrlEnvironment:
    """One env as TRL uses it, reset for every rollout; `trl_environment` adds the methods that the model may call.

    TRL takes every public method for a tool, so all else here begins with an underscore.
    """

    _surface: _Surface
    _factory: Any
    """Makes the env; a static method."""

    def __init__(self) -> None:
        self._env = type(self)._factory()
        self._failed = False
        self._last: StepResult | None = None

    def reset(self, **row: Any) -> None:
        """Start the episode of a row of `task_rows`."""
        if not isinstance(row.get("task"), str):
            raise ValueError("the data set needs a column 'task': make its rows with task_rows(tasks)")
        self._failed, self._last = False, None
        try:
            self._env.reset(task_from_json(json.loads(row["task"])), seed=0)
        except EnvError:
            self._failed = True

    def _call(self, tool: Tool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """What the model is shown of one call. Raises `ToolError` for its mistake; TRL shows that, too."""
        action = tool.call(args, kwargs)
        if self._failed:
            raise RuntimeError(_OUT_OF_ORDER)
        if self._over:
            return _OVER
        result = self._step(action)
        if result is None:
            raise RuntimeError(_OUT_OF_ORDER)
        shown = result.info.get("results")  # bare, where TRL puts its own tags around
        return "\n".join(shown) if shown else result.observation.text

    def _score(self, completion: Any) -> float | None:
        """The reward of the rollout that ended with `completion`; None when the env failed."""
        if not self._over and not self._failed:
            words = _last_words(completion)
            if words:
                self._step(type(self)._surface.answer(words))
        if self._failed:
            return None
        return self._last.reward if self._last is not None else 0.0

    def _step(self, action: str) -> StepResult | None:
        try:
            self._last = self._env.step(action)
        except EnvError:
            self._failed = True
            return None
        return self._last

    @property
    def _over(self) -> bool:
        return self._last is not None and (self._last.terminated or self._last.truncated)


def trl_environment(name: str, *, tools: Sequence[Tool] = (), **settings: Any) -> type[TrlEnvironment]:
    """The class for `environment_factory=`, over envs `make_env(name, ...)` that share what they can.

    "code" offers `python(code)`, "tool" its tools, "search" `search(query)`. Raises `ValueError` for another name.
    """
    if name == "code":
        factory = env_factory(name, tools=tools, **settings)
        surface = _Surface(calls=[_python_tool(tools)], answer=lambda words: f"final_answer({words!r})")
    elif name == "tool":
        factory = env_factory(name, tools=tools, **settings)
        surface = _Surface(
            calls=[_as_call(tool) for tool in tools], answer=lambda words: _call_text("final_answer", answer=words)
        )
    elif name == "search":
        factory = env_factory(name, **settings)
        surface = _Surface(calls=[Tool.from_function(search)], answer=lambda words: f"<answer>{words}</answer>")
    else:
        raise ValueError(f"env {name!r} cannot be used by TRL; there are code, search, tool")
    members: dict[str, Any] = {tool.name: _method(tool) for tool in surface.calls}
    if "reset" in members or any(member.startswith("_") or member == "get_reward" for member in members):
        raise ValueError(f"TRL has its own use for 'reset', 'get_reward' and '_...': {sorted(members)}")
    members.update(_surface=surface, _factory=staticmethod(factory), __doc__=TrlEnvironment.__doc__)
    return type(f"{name.capitalize()}Environment", (TrlEnvironment,), members)


def episode_reward(completions: Sequence[Any], environments: Sequence[TrlEnvironment], **_: Any) -> list[float | None]:
    """For `reward_funcs=`: the env's grade of each rollout in [0, 1], None where the env failed."""
    return [environment._score(completion) for completion, environment in zip(completions, environments, strict=True)]


def task_rows(tasks: Iterable[Task], *, system_prompt: str = "") -> list[dict[str, Any]]:
    """Rows of a data set: a conversational `prompt`, and the `task` that `reset` reads."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [
        {"prompt": [*system, {"role": "user", "content": task.question}], "task": json.dumps(task_to_json(task))}
        for task in tasks
    ]


def search(query: str) -> str:
    """Search for passages that fit the query.

    Args:
        query: what to look for.
    """
    return f"<search>{query}</search>"


def _python_tool(tools: Sequence[Tool]) -> Tool:
    """Runs code; its description tells which functions the code finds."""
    found = [f"{tool.name}({', '.join(tool.parameters.get('properties', {}))}): {tool.description}" for tool in tools]
    listed = " It may call: " + "; ".join([*found, "final_answer(answer): gives the answer and ends"]) + "."

    def python(code: str) -> str:
        """Run Python code; variables stay until the next call, and what it prints comes back.

        Args:
            code: Python source.
        """
        return code

    plain = Tool.from_function(python)
    return Tool(name="python", description=plain.description + listed, parameters=plain.parameters, function=python)


def _as_call(tool: Tool) -> Tool:
    """Makes the JSON call of `tool`, for a `ToolEnv`."""

    def call(**arguments: Any) -> str:
        return _call_text(tool.name, **arguments)

    return Tool(name=tool.name, description=tool.description, parameters=tool.parameters, function=call)


def _call_text(name: str, /, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def _method(tool: Tool) -> Callable[..., str]:
    """A method with the signature, the annotations and the docstring that transformers makes its schema of."""

    def method(self: TrlEnvironment, *args: Any, **kwargs: Any) -> str:
        return self._call(tool, args, kwargs)

    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    required = set(tool.parameters.get("required", ()))
    hints = {name: _hint(schema) for name, schema in properties.items()}
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[name],
            default=inspect.Parameter.empty if name in required else _told(schema, "default"),
        )
        for name, schema in properties.items()
    ]
    method.__name__ = method.__qualname__ = tool.name
    method.__signature__ = inspect.Signature(parameters, return_annotation=str)  # type: ignore[attr-defined]
    method.__annotations__ = {**hints, "return": str}
    described = [
        f"    {name}: {_one_line(_told(schema, 'description')) or name}" for name, schema in properties.items()
    ]
    method.__doc__ = "\n".join(
        [_one_line(tool.description) or tool.name, "", *(["Args:", *described] if described else [])]
    )
    return method


def _hint(schema: Any) -> Any:
    """The annotation of one JSON schema."""
    if not isinstance(schema, Mapping):
        return Any
    if schema.get("enum"):
        return Literal[tuple(schema["enum"])]
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return Union[tuple(_PYTHON_TYPES.get(kind, Any) for kind in kinds)]  # noqa: UP007  (made at run time)
    if kinds == "array" and isinstance(schema.get("items"), Mapping) and schema["items"]:
        return list[_hint(schema["items"])]
    return _PYTHON_TYPES.get(str(kinds), Any)


def _told(schema: Any, key: str) -> Any:
    return schema.get(key) if isinstance(schema, Mapping) else None


def _one_line(text: Any) -> str:
    return " ".join(str(text or "").replace("Args:", "").split())


def _last_words(completion: Any) -> str:
    """What the model said last, thoughts aside; "" when that was a tool call, or nothing."""
    if isinstance(completion, str):
        return _THINK.sub("", completion).strip()
    last = completion[-1] if completion else {}
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return ""
    content = last.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part.get("text", "") for part in content)
    return _THINK.sub("", content).strip()
