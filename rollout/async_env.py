"""The env as the episode loop sees it: the same contract, awaited. Adapts an env of this process; `envs.pool` has the
remote one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from envs.base import Env, Observation, StepResult, Task


class AsyncEnv(Protocol):
    """`envs.base.Env`, awaited; every call has a limit and raises `EnvError` when it passes.

    One that can add to a preview, which lets a vote end early, says so by `can_preview_more = True` and has
    `preview_more(actions)`: `preview` without forgetting what was previewed before; `commit` counts on behind that.
    """

    can_preview: bool

    async def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]: ...

    async def step(self, action: str) -> StepResult: ...

    async def preview(self, actions: Sequence[str]) -> list[StepResult]: ...

    async def commit(self, index: int) -> StepResult: ...

    async def close(self) -> None: ...


class ThreadedEnv:
    """An env of this process, each call in a thread of its own."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self.can_preview = env.can_preview
        self.can_preview_more = env.can_preview and callable(getattr(env, "preview_more", None))

    async def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        return await asyncio.to_thread(self._env.reset, task, seed)

    async def step(self, action: str) -> StepResult:
        return await asyncio.to_thread(self._env.step, action)

    async def preview(self, actions: Sequence[str]) -> list[StepResult]:
        return await asyncio.to_thread(self._env.preview, actions)

    async def preview_more(self, actions: Sequence[str]) -> list[StepResult]:
        return await asyncio.to_thread(self._env.preview_more, actions)  # type: ignore[attr-defined]

    async def commit(self, index: int) -> StepResult:
        return await asyncio.to_thread(self._env.commit, index)

    async def close(self) -> None:
        await asyncio.to_thread(self._env.close)
