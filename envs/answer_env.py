"""`AnswerEnv`: no tools, one step, the action is the answer. The env of chain-of-thought policies, the paper's
baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from envs.base import Observation, ObservationKind, StepResult, Task


class AnswerEnv:
    """Grades the action and ends."""

    can_preview = True

    def __init__(self, *, grade: Callable[[Task, str], float]) -> None:
        self._grade = grade
        self._task: Task | None = None
        self._previews: list[StepResult] = []

    def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        self._task, self._previews = task, []
        return Observation(text=task.question), {"seed": seed}

    def step(self, action: str) -> StepResult:
        result = self._answer(action)
        self._task = None
        return result

    def preview(self, actions: Sequence[str]) -> list[StepResult]:
        self._previews = [self._answer(action) for action in actions]
        return list(self._previews)

    def commit(self, index: int) -> StepResult:
        if not 0 <= index < len(self._previews):
            raise RuntimeError(
                f"commit({index}) without a preview of that action; {len(self._previews)} were previewed"
            )
        result, self._previews, self._task = self._previews[index], [], None
        return result

    def close(self) -> None:
        self._task, self._previews = None, []

    def _answer(self, action: str) -> StepResult:
        if self._task is None:
            raise RuntimeError("no episode is running: call reset() first")
        info = {"final_answer": action, "tool_calls": 0, "wall_s": 0.0}
        observation = Observation(text=action, kind=ObservationKind.FINAL)
        return StepResult(observation, self._grade(self._task, action), True, False, info)
