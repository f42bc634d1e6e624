"""`StatelessEnv`: episodes whose only state is the task and how many steps were taken; a base of envs, not one itself.

Where actions change nothing (a search, a lookup), previewing is running and committing is keeping a result: nothing is
forked and nothing runs twice. A subclass says what actions lead to. `ToolEnv` and `SearchEnv` are made of it.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from envs.base import EnvError, Observation, ObservationKind, StepResult, Task
from envs.tools import ToolError


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one action led to."""

    text: str
    kind: ObservationKind = ObservationKind.OK
    final: str | None = None
    """The final answer; `text` and `kind` follow from it."""
    tool_calls: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    """More for `StepResult.info`."""


class StatelessEnv(ABC):
    """See `envs.base.Env`. `grade(task, final_answer)` is in [0, 1]; truncated after `max_steps` steps."""

    can_preview = True

    def __init__(self, *, grade: Callable[[Task, str], float], max_steps: int) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps} must be at least 1")
        self._grade, self._max_steps = grade, max_steps
        self._task: Task | None = None
        self._steps = 0
        self._previews: list[StepResult] = []
        self._made: dict[Any, Any] = {}
        """What tools answered to the present preview; a subclass may keep their answers here."""

    @abstractmethod
    def _act(self, actions: Sequence[str]) -> list[Outcome]:
        """What each of these actions leads to; they may run at the same moment. Raises `EnvError` alone."""

    def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        self._task, self._steps, self._previews, self._made = task, 0, [], {}
        return Observation(text=task.question), {"seed": seed}

    def step(self, action: str) -> StepResult:
        self._previews, self._made = [], {}
        [result] = self._results([action])
        return self._after(result)

    def preview(self, actions: Sequence[str]) -> list[StepResult]:
        if not self.can_preview:
            raise RuntimeError("this env cannot preview: its tools change something")
        self._previews, self._made = [], {}
        return self.preview_more(actions)

    def preview_more(self, actions: Sequence[str]) -> list[StepResult]:
        """Add to the last preview, which stays; `commit` counts on behind it. What it asked of tools is not asked
        again."""
        if not self.can_preview:
            raise RuntimeError("this env cannot preview: its tools change something")
        results = self._results(actions)
        self._previews += results
        return results

    def commit(self, index: int) -> StepResult:
        self._running()
        if not 0 <= index < len(self._previews):
            raise RuntimeError(f"commit({index}) without a preview of it; {len(self._previews)} actions were previewed")
        result, self._previews, self._made = self._previews[index], [], {}
        return self._after(result)

    def close(self) -> None:
        self._task, self._previews, self._made = None, [], {}

    def _running(self) -> Task:
        if self._task is None:
            raise RuntimeError("no episode is running: call reset() first")
        return self._task

    def _results(self, actions: Sequence[str]) -> list[StepResult]:
        task = self._running()
        began = time.monotonic()
        outcomes = self._act(actions)
        wall_s = time.monotonic() - began
        results = []
        for outcome in outcomes:
            final = None if outcome.final is None else printable(outcome.final)
            kind = outcome.kind if final is None else ObservationKind.FINAL
            text = printable(outcome.text) if final is None else final
            reward = 0.0 if final is None else float(self._grade(task, final))
            truncated = final is None and self._steps + 1 >= self._max_steps
            info = {"final_answer": final, "tool_calls": outcome.tool_calls, "wall_s": wall_s, **outcome.info}
            results.append(StepResult(Observation(text=text, kind=kind), reward, final is not None, truncated, info))
        return results

    def _after(self, result: StepResult) -> StepResult:
        self._steps += 1
        if result.terminated or result.truncated:
            self.close()
        return result


def run_together(calls: Sequence[Callable[[], Any]], *, timeout_s: float) -> list[Any]:
    """What each call returns, or the `ToolError` that it raised; each runs in a thread of its own.

    Raises `EnvError` for any other exception, and when not all are done after `timeout_s`. Python cannot stop a
    thread: a call that hangs is left behind, and does not keep the process alive.
    """
    results: list[Any] = [None] * len(calls)
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except ToolError as error:
            results[index] = error
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        error = failures[0]
        if isinstance(error, EnvError):
            raise error
        raise EnvError(f"a tool failed on our side: {type(error).__name__}: {error}") from error
    if any(thread.is_alive() for thread in threads):
        raise EnvError(f"a tool did not answer within {timeout_s:g} s")
    return results


def clip(text: str, chars: int) -> str:
    """`text` with its middle left out if it is longer than `chars`."""
    if len(text) <= chars:
        return text
    head, tail = text[: chars // 2], text[len(text) - (chars - chars // 2) :]
    return f"{head}\n[... {len(text) - chars} characters left out ...]\n{tail}"


def printable(text: str) -> str:
    """Without lone surrogates and NUL, which neither UTF-8 nor Parquet nor a tokenizer takes."""
    return text.encode("utf-8", errors="replace").decode("utf-8").replace("\0", "�")
