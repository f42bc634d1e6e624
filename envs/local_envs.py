"""Envs in the process of those who act in them: `LocalEnvs`, the counterpart of `envs.pool`'s hosts on Ray.

On one machine a remote call costs several times what a step in the sandbox costs, and nothing is gained by it: the code
of models runs in the sandbox's own processes either way. Hosts on Ray are for when envs outgrow the machine. Calls
block, so each runs in a thread; one that does not return in time is an `EnvError`, and its env is given up.

Example::

    envs = LocalEnvs(EnvSpec(name="code"), search, count=64, timeout_s=60)
    [first, *_] = await envs.connect()
    await first.reset(task, seed=0)
    await envs.close()
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from envs.base import Env, EnvError, Observation, StepResult, Task, TaskError
from envs.pool import EnvHost, EnvSpec, SearchFunction

T = TypeVar("T")


@dataclass(slots=True)
class LocalEnvs:
    """`count` envs of `spec`, not made yet; picklable until `connect`."""

    spec: EnvSpec
    search: SearchFunction | None
    count: int
    timeout_s: float
    """Of each call."""
    _host: EnvHost | None = field(default=None, init=False)
    _threads: ThreadPoolExecutor | None = field(default=None, init=False)

    async def connect(self) -> list[LocalEnv]:
        """Start the sandbox and make the envs. Raises what `EnvHost` raises."""
        self._host = await asyncio.to_thread(EnvHost, self.spec, self.search)
        # Twice as many as envs: a call that was given up keeps its thread until it returns.
        self._threads = ThreadPoolExecutor(max_workers=2 * self.count, thread_name_prefix="env")
        return [LocalEnv(self._host.make, self._threads, timeout_s=self.timeout_s) for _ in range(self.count)]

    async def close(self) -> None:
        """End all of them; may be called twice."""
        host, self._host = self._host, None
        if host is not None:
            await asyncio.to_thread(host.close)  # what a given-up call waits for ends with the sandbox
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)


class LocalEnv:
    """One env, awaited; see `rollout.async_env.AsyncEnv`."""

    def __init__(self, make: Callable[[], Env], threads: ThreadPoolExecutor, *, timeout_s: float) -> None:
        self._make, self._threads, self._timeout_s = make, threads, timeout_s
        self._env: Env = make()
        self._open = False
        self.can_preview = self._env.can_preview
        self.can_preview_more = self.can_preview and hasattr(self._env, "preview_more")

    async def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        self._open = True
        return await self._call(lambda env: env.reset(task, seed), "reset")

    async def step(self, action: str) -> StepResult:
        return self._after(await self._call(lambda env: env.step(action), "step"))

    async def preview(self, actions: Sequence[str]) -> list[StepResult]:
        return await self._call(lambda env: env.preview(actions), "preview")

    async def preview_more(self, actions: Sequence[str]) -> list[StepResult]:
        """See `envs.code_env.CodeEnv.preview_more`; only where `can_preview_more`."""
        return await self._call(lambda env: env.preview_more(actions), "preview")  # type: ignore[attr-defined]

    async def commit(self, index: int) -> StepResult:
        return self._after(await self._call(lambda env: env.commit(index), "commit"))

    async def close(self) -> None:
        """Nothing to do after an episode that came to its end: an env frees its own then."""
        if self._open:
            self._open = False
            await self._call(lambda env: env.close(), "close")

    def _after(self, result: StepResult) -> StepResult:
        self._open = self._open and not (result.terminated or result.truncated)
        return result

    async def _call(self, work: Callable[[Env], T], what: str) -> T:
        env = self._env
        try:
            future = self._threads.submit(work, env)
        except RuntimeError as error:
            raise EnvError(f"the envs were closed before {what}") from error
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), self._timeout_s)
        except TimeoutError:
            self._give_up(env, future)
            raise EnvError(f"the env did not finish {what} within {self._timeout_s:g} s") from None
        except asyncio.CancelledError:
            self._give_up(env, future)
            raise
        except (EnvError, TaskError):
            raise
        except Exception as error:
            raise EnvError(f"the env failed in {what}: {type(error).__name__}: {error}") from error

    def _give_up(self, env: Env, future: Future[Any]) -> None:
        """The next episode gets a new env; the old one is freed when its call has returned."""
        self._env, self._open = self._make(), False
        future.add_done_callback(lambda _: env.close())
