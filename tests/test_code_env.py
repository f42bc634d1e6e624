"""`CodeEnv` over a real sandbox, `Tool`, and `check_env` on envs that keep and that break the contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from envs.base import EnvError, ObservationKind, StepResult, Task
from envs.check import ContractError, check_env
from envs.code_env import CodeEnv
from envs.sandbox import Sandbox, SandboxLimits
from envs.tools import Tool, ToolError

TASK = Task(id="t1", question="What is 6 * 7?", answer="42", kind="arithmetic")


def double(number: int, times: int = 1) -> int:
    """Double a number.

    Args:
        number: what to double,
            a whole number.
        times: how often.
    """
    if number == 13:
        raise ToolError("13 is not doubled here")
    if number == 99:
        raise OSError("the doubling service is down")
    return number * 2**times


TOOL = Tool.from_function(double)


def grade(task: Task, answer: str) -> float:
    return float(task.answer == answer)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    limits = SandboxLimits(wall_s=0.6, tool_calls=3)
    with Sandbox(tool_names=["double"], modules=["math", "random", "time"], limits=limits) as sandbox:
        yield sandbox


@pytest.fixture
def env(sandbox: Sandbox) -> Iterator[CodeEnv]:
    env = CodeEnv(sandbox=sandbox, tools=[TOOL], grade=grade)
    env.reset(TASK, seed=0)
    yield env
    env.close()


def test_observation_reads_as_the_papers(env: CodeEnv):
    result = env.step("print(6 * 7)")
    assert result.observation.text == "Execution logs:\n42\nLast output from code snippet:\nNone"
    assert result.observation.kind is ObservationKind.OK
    assert env.step("6 * 7").observation.text == "Last output from code snippet:\n42"


def test_error_names_itself_and_its_line_after_the_logs(env: CodeEnv):
    result = env.step("print('before')\nint('x')")
    assert result.observation.kind is ObservationKind.CODE_ERROR
    text = "Execution logs:\nbefore\nError: ValueError: invalid literal for int() with base 10: 'x'\n  line 2: int('x')"
    assert result.observation.text == text


def test_limit_is_named_and_the_state_is_kept(env: CodeEnv):
    env.step("x = 5")
    result = env.step("while True: pass")
    assert result.observation.kind is ObservationKind.LIMIT
    assert "wall time" in result.observation.text
    assert env.step("x").observation.text.endswith("5")


def test_final_answer_ends_the_episode_and_is_graded(env: CodeEnv):
    result = env.step("final_answer(double(21))")
    assert result.observation.kind is ObservationKind.FINAL
    assert (result.observation.text, result.reward, result.terminated, result.truncated) == ("42", 1.0, True, False)
    assert (result.info["final_answer"], result.info["tool_calls"]) == ("42", 1)
    with pytest.raises(RuntimeError, match="reset"):
        env.step("1")


def test_wrong_answer_earns_nothing(env: CodeEnv):
    assert env.step("final_answer(41)").reward == 0.0


def test_last_step_truncates(sandbox: Sandbox):
    env = CodeEnv(sandbox=sandbox, tools=[TOOL], grade=grade, max_steps=2)
    env.reset(TASK, seed=0)
    assert not env.step("1").truncated
    assert env.step("1").truncated
    env.reset(TASK, seed=0)
    env.step("1")
    assert env.step("final_answer(42)")[1:4] == (1.0, True, False)


def test_models_mistake_with_a_tool_is_an_observation(env: CodeEnv):
    assert "ToolError: 13 is not doubled here" in env.step("double(13)").observation.text
    assert "argument 'number' must be integer, got str 'a'" in env.step("double('a')").observation.text
    assert env.step("try:\n  double(13)\nexcept ToolError as e:\n  print('caught', e)").observation.valid


def test_preview_in_waves_is_one_preview(env: CodeEnv):
    first = env.preview(["x = 1\nx"])
    second = env.preview_more(["x = double(1)\nx", "final_answer(42)"])
    assert [result.observation.text[-2:] for result in (*first, *second)] == ["\n1", "\n2", "42"]
    assert env.commit(1) == second[0]
    assert env.step("x").observation.text.endswith("2")
    with pytest.raises(RuntimeError, match="without a preview"):
        env.commit(0)


def test_reset_tells_of_the_tools(sandbox: Sandbox):
    env = CodeEnv(sandbox=sandbox, tools=[TOOL], grade=grade)
    _, info = env.reset(TASK, seed=0)
    assert info["tools"] == [TOOL.as_json_schema()]
    env.close()


def test_failure_of_a_tool_is_ours_and_not_an_observation(env: CodeEnv):
    with pytest.raises(EnvError, match="doubling service is down"):
        env.preview(["double(99)", "1"])
    assert env.step("1").observation.valid  # a preview that failed leaves the episode as it was
    with pytest.raises(EnvError, match="doubling service is down"):
        env.step("double(99)")
    env.reset(TASK, seed=0)
    assert env.step("double(4)").observation.text.endswith("8")


def test_tools_must_be_the_sandboxs(sandbox: Sandbox):
    with pytest.raises(ValueError, match="'double'"):
        CodeEnv(sandbox=sandbox, tools=[], grade=grade)


def test_code_env_keeps_the_contract(sandbox: Sandbox):
    actions = [
        "x = globals().get('x', 0) + 1\nimport random\nprint(x, random.random())",
        "x.bit_length()",
        "x = double(x)\nx",
        "final_answer(42)",
    ]
    check_env(lambda: CodeEnv(sandbox=sandbox, tools=[TOOL], grade=grade, max_steps=3), [TASK], actions)


class _LosesWaves(CodeEnv):
    """Forgets the first wave of a preview."""

    def preview_more(self, actions: Sequence[str]) -> list[StepResult]:
        return self.preview(actions)


class _Leaky(CodeEnv):
    """Runs previewed candidates on the live interpreter, as the paper's own code does."""

    def preview(self, actions: Sequence[str]) -> list[StepResult]:
        session = self._running()
        self._previews = [self._result(session.run(action, self._call_tool)) for action in actions]
        return list(self._previews)

    def commit(self, index: int) -> StepResult:
        if not self._previews:
            raise RuntimeError("nothing was previewed")
        return self._after(self._previews.pop(index))


class _RunsTwice(CodeEnv):
    """Runs the winner again."""

    def preview(self, actions: Sequence[str]) -> list[StepResult]:
        self._actions = list(actions)
        return super().preview(actions)

    def commit(self, index: int) -> StepResult:
        if not self._previews:
            raise RuntimeError("nothing was previewed")
        return self.step(self._actions[index])


class _GoesOn(CodeEnv):
    """Begins an episode by itself."""

    def step(self, action: str) -> StepResult:
        if self._session is None:
            self.reset(TASK, seed=0)
        return super().step(action)


class _Forgetful(CodeEnv):
    """Commits nothing."""

    def commit(self, index: int) -> StepResult:
        if not self._previews:
            raise RuntimeError("nothing was previewed")
        return self._after(self._previews.pop(index))


class _WrongReward(CodeEnv):
    def step(self, action: str) -> StepResult:
        return super().step(action)._replace(reward=2.0)


@pytest.mark.parametrize(
    ("broken", "clause"),
    [
        (_Leaky, "no previewed action sees another"),
        (_LosesWaves, "commit.. counts on behind the first preview"),
        (_RunsTwice, "does not run it again"),
        (_GoesOn, r"step\(\) before reset\(\) raises RuntimeError"),
        (_Forgetful, "without a new preview|commit.i. leads to the state"),
        (_WrongReward, "reward is a float in"),
    ],
)
def test_check_env_names_the_broken_clause(sandbox: Sandbox, broken: Any, clause: str):
    actions = ["x = globals().get('x', 0) + 1\nprint(x)", "print(globals().get('x'))"]
    with pytest.raises(ContractError, match=clause):
        check_env(lambda: broken(sandbox=sandbox, tools=[TOOL], grade=grade, max_steps=3), [TASK], actions)


def test_tool_schema_comes_from_the_signature_and_the_docstring():
    assert TOOL.name == "double"
    assert TOOL.description == "Double a number."
    assert TOOL.parameters == {
        "type": "object",
        "properties": {
            "number": {"type": "integer", "description": "what to double, a whole number."},
            "times": {"type": "integer", "description": "how often.", "default": 1},
        },
        "required": ["number"],
    }


def test_tool_schema_of_other_annotations():
    def look(words: list[str], where: str | None = None, weight: float = 1.0) -> str:
        """Look."""
        return f"{words} {where} {weight}"

    tool = Tool.from_function(look)
    assert tool.parameters["properties"]["words"] == {"type": "array", "items": {"type": "string"}}
    assert tool.parameters["properties"]["where"]["type"] == ["string", "null"]
    assert tool.call([["a"]], {"weight": 2}) == "['a'] None 2"
    with pytest.raises(ToolError, match="'weight' must be number, got bool"):
        tool.call([["a"]], {"weight": True})


@pytest.mark.parametrize(
    ("args", "kwargs", "wrong"),
    [
        ([], {}, "needs argument 'number'"),
        ([1, 2, 3], {}, "at most 2 arguments"),
        ([1], {"number": 1}, "two values for argument 'number'"),
        ([1], {"factor": 1}, "no argument 'factor'"),
        (["1"], {}, "'number' must be integer"),
    ],
)
def test_tool_call_names_what_is_wrong(args: list, kwargs: dict[str, Any], wrong: str):
    with pytest.raises(ToolError, match=wrong):
        TOOL.call(args, kwargs)


def test_tool_needs_annotations():
    with pytest.raises(TypeError, match="'x' needs a type annotation"):
        Tool.from_function(lambda x: x, name="untyped")
