"""`AnswerEnv`: no tools, one step, the action is the answer. The env of chain-of-thought policies, the paper's
baseline; with `context`, of chain of thought over retrieved passages (its CoT + RAG baseline).

Example::

    env = AnswerEnv(grade=grade, context=lambda question: format_hits("numbered", search(question, 3)))
    observation, _ = env.reset(task, seed=0)     # the passages, and behind them the question
    env.step("42").reward
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from envs.base import EnvError, Observation, ObservationKind, StepResult, Task


class AnswerEnv:
    """Grades the action and ends. `context(question)` is what stands in front of the question in the first
    observation; what it raises is an `EnvError`."""

    can_preview = True

    def __init__(self, *, grade: Callable[[Task, str], float], context: Callable[[str], str] | None = None) -> None:
        self._grade, self._context = grade, context
        self._task: Task | None = None
        self._previews: list[StepResult] = []

    def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        self.close()
        text = task.question if self._context is None else self._with_context(self._context, task.question)
        self._task = task
        return Observation(text=text), {"seed": seed}

    def step(self, action: str) -> StepResult:
        result = self._answer(action)
        self.close()
        return result

    def preview(self, actions: Sequence[str]) -> list[StepResult]:
        self._previews = []
        return self.preview_more(actions)

    def preview_more(self, actions: Sequence[str]) -> list[StepResult]:
        """Add to the last preview, which stays; `commit` counts on behind it."""
        results = [self._answer(action) for action in actions]
        self._previews += results
        return results

    def commit(self, index: int) -> StepResult:
        if not 0 <= index < len(self._previews):
            raise RuntimeError(
                f"commit({index}) without a preview of that action; {len(self._previews)} were previewed"
            )
        result = self._previews[index]
        self.close()
        return result

    def close(self) -> None:
        self._task, self._previews = None, []

    def _with_context(self, context: Callable[[str], str], question: str) -> str:
        try:
            passages = context(question)
        except EnvError:
            raise
        except Exception as error:
            raise EnvError(f"no passages for the question: {type(error).__name__}: {error}") from error
        return f"{PASSAGES}\n{passages}\n\n{QUESTION}{question}"

    def _answer(self, action: str) -> StepResult:
        if self._task is None:
            raise RuntimeError("no episode is running: call reset() first")
        info = {"final_answer": action, "tool_calls": 0, "wall_s": 0.0}
        observation = Observation(text=action, kind=ObservationKind.FINAL)
        return StepResult(observation, self._grade(self._task, action), True, False, info)


PASSAGES, QUESTION = "Passages that may help:", "Question: "
"""How passages and the question behind them are introduced."""


def question_of(prompt: str) -> str:
    """The question alone of what `reset` shows, with passages or without."""
    return prompt.rpartition(f"\n\n{QUESTION}")[2] if prompt.startswith(PASSAGES) else prompt
