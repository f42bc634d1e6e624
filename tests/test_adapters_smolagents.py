"""Our tools, sandbox and policies inside real smolagents agents."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from smolagents import CodeAgent, LogLevel, ToolCallingAgent
from smolagents.models import ChatMessageToolCall, ChatMessageToolCallFunction

from envs import make_env
from envs.adapters.smolagents_adapter import PolicyModel, SandboxExecutor, StudentAgent, as_smolagents_tool
from envs.base import EnvError, Task
from envs.sandbox import SandboxLimits
from envs.tools import Tool, ToolError
from rollout.async_env import ThreadedEnv
from rollout.dialects import CODE
from rollout.episode import EpisodeSettings, run_episode
from rollout.policy import ScriptedPolicy

TASK = Task(id="t", question="What is 20 doubled, plus 2?", answer="42", kind="sum")
LIMITS = SandboxLimits(wall_s=2)


def double(x: int, times: int = 1) -> int:
    """Double a number.

    Args:
        x: the number.
    """
    if x == 13:
        raise ToolError("13 is not doubled here")
    if x == 99:
        raise OSError("the doubling service is down")
    return x * 2**times


TOOL = Tool.from_function(double)


class Scripted:
    """Says one text after the other, and keeps what it was shown."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.seen = list(texts), []

    def __call__(self, messages: list[dict[str, str]], stop: list[str]) -> str:
        self.seen.append(messages)
        return self.texts[len(self.seen) - 1]


def turn(code: str) -> str:
    return f"Thought: I go on.\nCode:\n```py\n{code}\n```<end_code>"


def student(policy: Any, **settings: Any) -> StudentAgent:
    return StudentAgent(
        model=PolicyModel(policy), tools=[TOOL], system_prompt=CODE.system_prompt, limits=LIMITS, modules=["math"],
        verbosity_level=LogLevel.OFF, **settings,
    )  # fmt: skip


def test_student_answers_with_our_tool():
    policy = Scripted(turn("y = double(20)\nprint(y)"), turn("final_answer(y + 2)"))
    with student(policy) as agent:
        assert agent.run(TASK.question) == "42"


TURNS = [
    "I do not know.",
    turn("print('first')\nint('x')"),
    turn("double(13)"),
    turn("y = double(20)\nprint(y)\ny").removesuffix("<end_code>"),  # as an endpoint leaves it
    turn("while True: pass"),
    turn("final_answer(y + 2)"),
]


def test_student_sees_what_an_episode_shows():
    policy = Scripted(*TURNS)
    with student(policy, max_steps=6) as agent:
        assert agent.run(TASK.question) == "42"
    put_back = [text + "<end_code>" if text.endswith("```") else text for text in TURNS]
    scripted = ScriptedPolicy(lambda messages, _: put_back[(len(messages) - 2) // 2])
    env = make_env("code", tools=[TOOL], max_steps=6, limits=LIMITS, modules=["math"])
    settings = EpisodeSettings(max_steps=6)
    trajectory = asyncio.run(run_episode(TASK, policy=scripted, env=ThreadedEnv(env), settings=settings))
    assert trajectory.reward == 1.0
    shown = [[(message.role, message.content) for message in messages] for messages, _, _ in scripted.calls]
    assert [[(m["role"], m["content"]) for m in messages] for messages in policy.seen] == shown


def test_student_out_of_steps_has_no_answer():
    with student(Scripted(turn("1"), turn("2")), max_steps=2) as agent:
        assert agent.run(TASK.question) is None


def test_failure_of_a_tool_ends_the_run_and_is_never_shown():
    policy = Scripted(turn("double(99)"), turn("final_answer(1)"))
    with student(policy) as agent:
        with pytest.raises(EnvError, match="the doubling service is down"):
            agent.run(TASK.question)
        assert len(policy.seen) == 1


def test_runs_start_afresh_unless_told_otherwise():
    policy = Scripted(turn("a = 1\nfinal_answer(a)"), turn("final_answer(a)"), turn("final_answer('a' in globals())"))
    with student(policy) as agent:
        assert agent.run("one") == "1"
        assert agent.run("two", reset=False) == "1"
        assert agent.run("three") == "False"


def test_cleanup_ends_the_sandbox():
    with student(Scripted(turn("final_answer(1)"))) as agent:
        agent.run("one")
        executor: Any = agent.python_executor
        zygote = executor._sandbox.zygote_pid
        assert Path(f"/proc/{zygote}").exists()
    assert not Path(f"/proc/{zygote}").exists()


# -- the pieces, in agents of smolagents' own


@pytest.fixture
def executor() -> Iterator[SandboxExecutor]:
    executor = SandboxExecutor(limits=LIMITS, modules=["math"])
    yield executor
    executor.cleanup()


def test_plain_code_agent_runs_in_our_sandbox(executor: SandboxExecutor):
    policy = Scripted(
        "Thoughts: I try.\n<code>\nimport os\n</code>",
        "Thoughts: I see.\n<code>\nprint(words)\nfinal_answer(double(x=len(words), times=2))\n</code>",
    )
    agent = CodeAgent(
        tools=[as_smolagents_tool(TOOL)], model=PolicyModel(policy), executor=executor, verbosity_level=LogLevel.OFF
    )
    assert agent.run("go", additional_args={"words": ["a", "b"]}) == "8"
    assert "def double(x: integer, times: integer)" in policy.seen[0][0]["content"]
    assert "ImportError" in policy.seen[1][-1]["content"]


def test_executor_takes_json_variables_alone(executor: SandboxExecutor):
    executor.send_variables({"data": {"a": [1, None, "é'\n"]}})
    assert executor("data['a'][2] + 'x'").output == "é'\nx"
    with pytest.raises(ValueError, match="variable 'path' must be made of JSON values"):
        executor.send_variables({"path": Path("x")})
    with pytest.raises(ValueError, match="'a b' cannot be the name of a variable"):
        executor.send_variables({"a b": 1})


def test_executor_tells_what_was_printed_before_an_error(executor: SandboxExecutor):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        executor("print('here')\n1/0")
    assert executor.state["_print_outputs"] == "here\n"


def test_tool_calling_agent_calls_our_tool():
    class Model(PolicyModel):
        def generate(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
            message = super().generate(messages, *args, **kwargs)
            name, arguments = str(message.content).split(" ")
            function = ChatMessageToolCallFunction(name=name, arguments=arguments)
            message.tool_calls = [ChatMessageToolCall(function=function, id="1", type="function")]
            return message

    policy = Scripted('double {"x":20}', 'double {"x":13}', 'final_answer {"answer":"40"}')
    agent = ToolCallingAgent(tools=[as_smolagents_tool(TOOL)], model=Model(policy), verbosity_level=LogLevel.OFF)
    assert agent.run("go") == "40"
    assert "40" in policy.seen[1][-1]["content"]
    assert "13 is not doubled here" in policy.seen[2][-1]["content"]


def test_tool_with_open_types_keeps_its_schema():
    def look(words: list[str], where: str | None = None, depth: int | list[int] = 1) -> str:
        """Look."""
        return f"{words} {where} {depth}"

    tool = as_smolagents_tool(Tool.from_function(look))
    assert tool.inputs["words"] == {"type": "array", "description": ""}
    assert tool.inputs["where"] == {"type": ["string", "null"], "description": "", "nullable": True}
    assert tool(["a"], depth=[2]) == "['a'] None [2]"
