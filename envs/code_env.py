"""`CodeEnv`: the agent acts by writing Python (CodeAct); tools are functions that its code calls.

An action is source text, already parsed out of the model's reply; this module knows nothing of prompts. Observations
read as the paper's (arXiv 2505.17612) and smolagents' do. Grading belongs to the caller; the sandbox is shared by many
envs and is not closed here.

Example::

    sandbox = Sandbox(tool_names=["web_search"])
    env = CodeEnv(sandbox=sandbox, tools=[search_tool], grade=lambda task, answer: float(answer == task.answer))
    env.reset(task, seed=0)
    env.step("print(6 * 7)").observation.text
    # 'Execution logs:\\n42\\nLast output from code snippet:\\nNone'
    env.step("final_answer(42)").terminated     # True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from envs.base import EnvError, Observation, ObservationKind, StepResult, Task
from envs.sandbox import Execution, Sandbox, SandboxError, Session
from envs.sandbox.execution import CallTool
from envs.tools import Tool, tool_schemas


class CodeEnv:
    """One episode at a time over one session of `sandbox`; see `envs.base.Env` for the contract.

    `tools` must be the ones that the sandbox was made for, by name. `grade(task, final_answer)` is in [0, 1]. An
    episode is truncated after `max_steps` steps without a final answer. Tools are called from several threads in a
    preview.
    """

    can_preview = True

    def __init__(
        self,
        *,
        sandbox: Sandbox,
        tools: Sequence[Tool],
        grade: Callable[[Task, str], float],
        max_steps: int = 5,
    ) -> None:
        if {tool.name for tool in tools} != set(sandbox.tool_names):
            names = sorted(tool.name for tool in tools)
            raise ValueError(f"the tools are {names}, but the sandbox was made for {sorted(sandbox.tool_names)}")
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps} must be at least 1")
        self._sandbox, self._grade, self._max_steps = sandbox, grade, max_steps
        self._tools = {tool.name: tool for tool in tools}
        self._schemas = tool_schemas(tools)
        self._task: Task | None = None
        self._session: Session | None = None
        self._steps = 0
        self._previews: list[StepResult] = []

    def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        self.close()
        try:
            self._session = self._sandbox.start(seed)
        except SandboxError as error:
            raise EnvError(f"no episode could be started: {error}") from error
        self._task, self._steps = task, 0
        return Observation(text=task.question), {"seed": seed, "tools": self._schemas}

    def step(self, action: str) -> StepResult:
        session = self._running()
        self._previews = []
        try:
            execution = session.run(action, self._call_tool)
        except Exception as error:
            self.close()  # the state was lost in the middle of the step
            raise EnvError(f"the step failed on our side: {type(error).__name__}: {error}") from error
        return self._after(self._result(execution))

    def preview(self, actions: Sequence[str]) -> list[StepResult]:
        session = self._running()
        self._previews = []
        return self._previewed(session.preview, actions)

    def preview_more(self, actions: Sequence[str]) -> list[StepResult]:
        """Add to the last preview, which stays; `commit` counts on behind it. Tool calls are shared with it."""
        return self._previewed(self._running().preview_more, actions)

    def commit(self, index: int) -> StepResult:
        session = self._running()
        if not 0 <= index < len(self._previews):
            raise RuntimeError(f"commit({index}) without a preview of it; {len(self._previews)} actions were previewed")
        session.commit(index)
        result, self._previews = self._previews[index], []
        return self._after(result)

    def close(self) -> None:
        session, self._session, self._task, self._previews = self._session, None, None, []
        if session is not None:
            session.close()

    def _previewed(
        self, preview: Callable[[Sequence[str], CallTool], list[Execution]], actions: Sequence[str]
    ) -> list[StepResult]:
        try:
            executions = preview(actions, self._call_tool)
        except Exception as error:
            raise EnvError(f"the preview failed on our side: {type(error).__name__}: {error}") from error
        results = [self._result(execution) for execution in executions]
        self._previews += results
        return results

    def _running(self) -> Session:
        if self._session is None:
            raise RuntimeError("no episode is running: call reset() first")
        return self._session

    def _call_tool(self, name: str, args: list, kwargs: dict[str, Any]) -> Any:
        return self._tools[name].call(args, kwargs)

    def _result(self, execution: Execution) -> StepResult:
        """What a step with this outcome returns, if it is the next one of the episode."""
        assert self._task is not None
        terminated = execution.is_final
        truncated = not terminated and self._steps + 1 >= self._max_steps
        final = execution.final if terminated else None
        reward = float(self._grade(self._task, final)) if final is not None else 0.0
        info = {"final_answer": final, "tool_calls": len(execution.tool_calls), "wall_s": execution.wall_s}
        return StepResult(observe(execution), reward, terminated, truncated, info)

    def _after(self, result: StepResult) -> StepResult:
        self._steps += 1
        if result.terminated or result.truncated:
            self.close()
        return result


def observe(execution: Execution) -> Observation:
    """The text an agent is shown of one execution."""
    if execution.is_final:
        return Observation(text=execution.final or "", kind=ObservationKind.FINAL)
    printed = execution.stdout.removesuffix("\n")
    logs = f"Execution logs:\n{printed}\n" if execution.stdout else ""
    if execution.limit is not None:
        return Observation(text=f"{logs}Limit ({execution.limit}): {execution.error}", kind=ObservationKind.LIMIT)
    if execution.error is not None:
        return Observation(text=f"{logs}Error: {execution.error}", kind=ObservationKind.CODE_ERROR)
    return Observation(text=f"{logs}Last output from code snippet:\n{execution.value}")
