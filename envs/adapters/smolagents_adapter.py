"""smolagents: our tools, our sandbox and any policy inside a smolagents `CodeAgent`.

    as_smolagents_tool     one of our tools, for any smolagents agent
    SandboxExecutor        runs a CodeAgent's Python in our sandbox: `CodeAgent(..., executor=SandboxExecutor())`
    PolicyModel            any function from messages to text, as a smolagents model
    StudentAgent           a CodeAgent that prompts, runs and words observations just as `CodeEnv` episodes do, so that
                           a distilled student sees what it was trained on

A failure of ours (`EnvError`) ends a `StudentAgent`'s run; a plain CodeAgent would show it to the model.

Example::

    model = PolicyModel(lambda messages, stop: complete(messages, stop))
    with StudentAgent(model=model, tools=[search_tool], system_prompt=SYSTEM_PROMPT) as agent:
        answer = agent.run("Who wrote the first program?")

smolagents: https://huggingface.co/docs/smolagents (1.24 and later have `executor=`).
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from smolagents import ActionStep, ChatMessage, CodeAgent, MessageRole, Model, TaskStep, TokenUsage
from smolagents import Tool as TheirTool
from smolagents.agents import EMPTY_PROMPT_TEMPLATES, ActionOutput, ToolCall
from smolagents.local_python_executor import CodeOutput, PythonExecutor
from smolagents.utils import AgentExecutionError, AgentGenerationError, AgentParsingError

from envs.base import EnvError
from envs.code_env import observe
from envs.sandbox import DEFAULT_MODULES, Execution, Sandbox, SandboxError, SandboxLimits, Session
from envs.tools import Tool, ToolError

_SMOLAGENTS_TYPES = ("string", "boolean", "integer", "number", "array", "object", "null")
_END = "<end_code>"
_FENCE = re.compile(r"```(?:py|python)?[ \t]*\n(.*?)\n?```", re.DOTALL)
NO_CODE = (
    "Error in code parsing: no code block was found in your answer. "
    "Write it as:\nThought: your thoughts\nCode:\n```py\n# your code\n```<end_code>"
)
"""What a turn without code is answered; as in training."""


class SmolagentsTool(TheirTool):
    """One of our tools; see `as_smolagents_tool`."""

    skip_forward_signature_validation = True
    name, description, inputs, output_type = "tool", "", {}, "any"

    def __init__(self, tool: Tool) -> None:
        required = set(tool.parameters.get("required", ()))
        self.tool = tool
        self.name, self.description = tool.name, tool.description
        self.inputs = {key: _input(schema, key in required) for key, schema in tool.parameters["properties"].items()}
        self.output_type = "any"
        super().__init__()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.tool.call(args, kwargs)
        except (ToolError, EnvError):
            raise
        except Exception as error:
            raise EnvError(f"{self.name} failed on our side: {type(error).__name__}: {error}") from error


def as_smolagents_tool(tool: Tool) -> SmolagentsTool:
    """`tool` for a smolagents agent. Raises `ToolError` for the model's mistakes and `EnvError` for ours."""
    return SmolagentsTool(tool)


class SandboxExecutor(PythonExecutor):
    """Python of a CodeAgent, in one episode of our sandbox; state lasts until `cleanup()` or other tools are sent.

    `__call__` raises an exception with the text of what went wrong in the code, as smolagents wants it, and
    `EnvError` for failures of ours. The agent's tools are called in this process; `final_answer` is the sandbox's own,
    and its value arrives as text.
    """

    def __init__(
        self,
        *,
        limits: SandboxLimits | None = None,
        modules: Sequence[str] = DEFAULT_MODULES,
        seed: int = 0,
        unsafe: bool = False,
    ) -> None:
        self._limits, self._modules, self._seed, self._unsafe = limits or SandboxLimits(), modules, seed, unsafe
        self._tools: Mapping[str, Callable[..., Any]] = {}
        self._variables: dict[str, Any] = {}
        self._sandbox: Sandbox | None = None
        self._session: Session | None = None
        self.last: Execution | None = None
        """What the last call did."""
        self.state: dict[str, Any] = {}
        """smolagents reads the logs of failed code from `state["_print_outputs"]`."""

    def send_tools(self, tools: Mapping[str, Callable[..., Any]]) -> None:
        names = sorted(name for name in tools if name != "final_answer")
        self._tools = dict(tools)
        if self._sandbox is None or sorted(self._sandbox.tool_names) != names:
            self.cleanup()
            try:
                self._sandbox = Sandbox(
                    tool_names=names, limits=self._limits, modules=self._modules, unsafe=self._unsafe
                )
            except SandboxError as error:
                raise EnvError(f"the sandbox could not start: {error}") from error

    def send_variables(self, variables: Mapping[str, Any]) -> None:
        """Set before the next code runs. Raises `ValueError` for what is not JSON-like, and for a name that is none."""
        for name, value in variables.items():
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(f"{name!r} cannot be the name of a variable")
            self._variables[name] = _literal(value, name)

    def restart(self) -> None:
        """The next code finds no variables of earlier code."""
        if self._session is not None:
            self._session.close()
        self._session = None

    def cleanup(self) -> None:
        """End everything that runs; may be called twice."""
        self.restart()
        if self._sandbox is not None:
            self._sandbox.close()
        self._sandbox = None

    def __call__(self, code_action: str) -> CodeOutput:
        self.last, self.state = None, {}
        if self._sandbox is None:
            self.send_tools(self._tools)
        assert self._sandbox is not None
        try:
            if self._session is None:
                self._session = self._sandbox.start(self._seed)
            if self._variables:
                given = "\n".join(f"{name} = {literal}" for name, literal in self._variables.items())
                self._variables = {}
                problem = self._session.run(given, self._call_tool)
                if problem.error is not None or problem.limit is not None:
                    raise SandboxError(f"the variables could not be set: {problem.error or problem.limit}")
            execution = self._session.run(code_action, self._call_tool)
        except Exception as error:
            self.restart()
            raise EnvError(f"the step failed on our side: {type(error).__name__}: {error}") from error
        self.last, self.state = execution, {"_print_outputs": execution.stdout}
        if execution.limit is not None:
            raise TimeoutError(f"Limit ({execution.limit}): {execution.error}")
        if execution.error is not None and not execution.is_final:
            raise RuntimeError(execution.error)
        output = execution.final if execution.is_final else execution.value
        return CodeOutput(output=output, logs=execution.stdout, is_final_answer=execution.is_final)

    def _call_tool(self, name: str, args: list, kwargs: dict[str, Any]) -> Any:
        try:
            return self._tools[name](*args, **kwargs)
        except (ToolError, EnvError):
            raise
        except Exception as error:  # smolagents' own tools tell the model of their mistakes by any exception
            raise ToolError(f"{type(error).__name__}: {error}") from error


class PolicyModel(Model):
    """Asks `complete(messages, stop)` for the next turn: messages are `{"role", "content"}` with plain text, `stop` are
    strings that end it. What it raises ends the run, as smolagents' `AgentGenerationError`."""

    def __init__(self, complete: Callable[[list[dict[str, str]], list[str]], str], *, model_id: str = "policy") -> None:
        super().__init__(model_id=model_id)
        self._complete = complete

    def generate(
        self, messages: list[Any], stop_sequences: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> ChatMessage:
        plain = [{"role": _role(message), "content": _content(message)} for message in messages]
        text = self._complete(plain, list(stop_sequences or ()))
        for stop in stop_sequences or ():  # a policy may keep the string that it stopped at, or not know of any
            text = text.split(stop, 1)[0]
        return ChatMessage(role=MessageRole.ASSISTANT, content=text, token_usage=TokenUsage(0, 0))


class StudentAgent(CodeAgent):
    """A CodeAgent for students of this project: their short system prompt, their code format, our observations.

    The model sees, message for message, what an episode of `CodeEnv` shows it. Every run begins with a fresh
    interpreter unless `reset=False`. Further `settings` are CodeAgent's own. Use it as a context manager, or call
    `cleanup()`.
    """

    def __init__(
        self,
        *,
        model: Model,
        tools: Sequence[Tool | TheirTool],
        system_prompt: str,
        max_steps: int = 5,
        limits: SandboxLimits | None = None,
        modules: Sequence[str] = DEFAULT_MODULES,
        seed: int = 0,
        unsafe: bool = False,
        **settings: Any,
    ) -> None:
        self._student_prompt = system_prompt
        super().__init__(
            tools=[as_smolagents_tool(tool) if isinstance(tool, Tool) else tool for tool in tools],  # type: ignore[misc]
            model=model,
            prompt_templates=EMPTY_PROMPT_TEMPLATES,
            executor=SandboxExecutor(limits=limits, modules=modules, seed=seed, unsafe=unsafe),
            max_steps=max_steps,
            **settings,
        )

    def initialize_system_prompt(self) -> str:
        return self._student_prompt

    def run(self, task: str, stream: bool = False, reset: bool = True, **settings: Any) -> Any:  # type: ignore[override]
        """CodeAgent's. Raises `EnvError` when the sandbox or a tool failed on our side."""
        if reset and isinstance(self.python_executor, SandboxExecutor):
            self.python_executor.restart()
        return super().run(task, stream=stream, reset=reset, **settings)

    def write_memory_to_messages(self, summary_mode: bool = False) -> list[ChatMessage]:
        """The conversation as in training."""
        messages = [] if summary_mode else [_message(MessageRole.SYSTEM, self._student_prompt)]
        for step in self.memory.steps:
            if isinstance(step, TaskStep):
                messages.append(_message(MessageRole.USER, step.task))
            elif isinstance(step, ActionStep) and step.model_output is not None:
                messages.append(_message(MessageRole.ASSISTANT, str(step.model_output)))
                messages.append(_message(MessageRole.USER, f"Observation:\n{step.observations or ''}"))
            elif not isinstance(step, ActionStep):
                messages += step.to_messages(summary_mode)
        return messages

    def provide_final_answer(self, task: str) -> ChatMessage:
        """None: an episode that is out of steps has no answer, and a student was never asked for one out of turn."""
        return ChatMessage(role=MessageRole.ASSISTANT, content=None, token_usage=TokenUsage(0, 0))

    def _step_stream(self, memory_step: ActionStep) -> Iterator[Any]:  # type: ignore[override]
        messages = self.write_memory_to_messages()
        memory_step.model_input_messages = messages
        try:
            answer = self.model.generate(messages, stop_sequences=[_END])
        except Exception as error:
            raise AgentGenerationError(f"Error in generating model output:\n{error}", self.logger) from error
        text = _content(answer)
        if text.rstrip().endswith("```"):  # students end their code so, and endpoints leave out what they stopped at
            text = text.rstrip() + _END
        memory_step.model_output_message, memory_step.model_output = answer, text
        memory_step.token_usage = answer.token_usage
        fence = _FENCE.search(text)
        if fence is None or not fence[1].strip():
            memory_step.observations = NO_CODE
            raise AgentParsingError(NO_CODE, self.logger)
        call = ToolCall(name="python_interpreter", arguments=fence[1], id=f"call_{len(self.memory.steps)}")
        yield call
        memory_step.tool_calls, memory_step.code_action = [call], fence[1]
        try:
            output = self.python_executor(fence[1])
        except EnvError:
            raise
        except Exception as error:
            memory_step.observations = self._observation()
            raise AgentExecutionError(str(error), self.logger) from error
        memory_step.observations, memory_step.action_output = self._observation(), output.output
        yield ActionOutput(output=output.output, is_final_answer=output.is_final_answer)

    def _observation(self) -> str:
        executor = self.python_executor
        last = executor.last if isinstance(executor, SandboxExecutor) else None
        return observe(last).text if last is not None else ""


def _input(schema: Any, required: bool) -> dict[str, Any]:
    """A parameter in smolagents' words, which know fewer types than JSON Schema does."""
    schema = schema if isinstance(schema, Mapping) else {}
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds or ())
    known = kinds if kinds and all(kind in _SMOLAGENTS_TYPES for kind in kinds) else ["any"]
    told = {"type": known[0] if len(known) == 1 else known, "description": str(schema.get("description", ""))}
    return told if required else {**told, "nullable": True}


def _literal(value: Any, name: str) -> str:
    """Python source of a JSON-like value."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(item, name) for item in value) + "]"
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return "{" + ", ".join(f"{key!r}: {_literal(item, name)}" for key, item in value.items()) + "}"
    raise ValueError(f"variable {name!r} must be made of JSON values to enter the sandbox, got {value!r:.80}")


def _message(role: MessageRole, text: str) -> ChatMessage:
    return ChatMessage(role=role, content=[{"type": "text", "text": text}])


def _role(message: Any) -> str:
    role = message["role"] if isinstance(message, dict) else message.role
    name = str(getattr(role, "value", role))
    return {"tool-call": "assistant", "tool-response": "user"}.get(name, name)


def _content(message: Any) -> str:
    content = message["content"] if isinstance(message, dict) else message.content
    if isinstance(content, str) or content is None:
        return content or ""
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
