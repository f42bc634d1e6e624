"""Ray actors that host envs: `EnvHost` holds many episodes at once around one sandbox, `RemoteEnv` is one slot seen
from afar.

Consumes calls from rollout workers, one slot an episode; waits for the retrieval actor inside a step, never longer
than the call's limit. A dead host is an `EnvError` for the episodes that lived on it; Ray starts the actor again and
the next `reset` finds a fresh one.

Example::

    hosts = start_env_hosts(EnvSpec(name="code"), count=1, slots_per_host=32, search=client)
    env = RemoteEnv(hosts[0], slot=0, timeout_s=30)
    await env.reset(task, seed=0)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from envs.answer_env import AnswerEnv
from envs.base import Env, EnvError, Observation, StepResult, Task, TaskError
from envs.bounds import check_bounds
from envs.grading import grade
from envs.grading_math import MathSpec, configure_math
from envs.judge import JudgeSpec, configure_judge
from envs.mcp_tools import McpServer, McpSpec
from envs.sandbox import DEFAULT_MODULES, Sandbox, SandboxLimits
from envs.tools import Tool

SearchFunction = Callable[[str, int], list[Any]]
"""(query, k) -> hits, best first."""


_HOST_AWAY_S = 0.5
"""Between two calls to a host that is being started again."""
_HOST_GONE_S = 10.0
"""One that is away for longer is left for another, if there is one."""
ENV_NAMES = ("answer", "code", "search", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSpec:
    """Which env, and its limits; picklable."""

    name: str = "code"
    max_steps: int = 5
    limits: SandboxLimits = field(default_factory=SandboxLimits)
    search_results: int = 2
    """Passages that one web_search shows."""
    search_format: str = "numbered"
    context_passages: int = 0
    """Env "answer" alone: so many passages, found with the question, stand in front of it (CoT + retrieval)."""
    modules: tuple[str, ...] = DEFAULT_MODULES
    """What code may import. Loaded once a host and shared by its episodes; large ones (numpy, sympy) make each start
    some 15 ms slower."""
    unsafe: bool = False
    """Run without kernel confinement where there is none; refused otherwise."""
    mcp_servers: tuple[McpSpec, ...] = ()
    """Servers whose tools the agent has beside web_search (envs "code" and "tool"); each host starts its own. Every
    candidate that is previewed calls its tools, so they should change nothing."""
    stateless_tools: bool = True
    """False: env "tool" does not preview, since its tools change something."""
    math: MathSpec = field(default_factory=MathSpec)
    """Limits of the grader "math"."""
    judge: JudgeSpec | None = None
    """The LLM judge of tasks whose grader is "judge"; asked by each host, with a pace of its own."""

    def __post_init__(self) -> None:
        check_bounds(self, at_least_1=("max_steps", "search_results"))
        if self.name not in ENV_NAMES:
            raise ValueError(f"env {self.name!r} is unknown; there are {', '.join(ENV_NAMES)}")
        if self.search_format != "numbered":
            from envs.retrieval.formatting import get_formatter

            get_formatter(self.search_format)
        if self.mcp_servers and self.name not in ("code", "tool"):
            raise ValueError(f"env {self.name!r} calls no tools, so mcp_servers must be left out")
        if self.context_passages < 0:
            raise ValueError(f"context_passages={self.context_passages} must not be negative")
        if self.context_passages and self.name != "answer":
            raise ValueError(
                f"context_passages={self.context_passages} is for env 'answer'; "
                f"in env {self.name!r} the agent searches by itself, so leave it out"
            )


class EnvHost:
    """Many envs of one spec in one process, by slot number. Its methods block; call them from several threads."""

    def __init__(self, spec: EnvSpec, search: SearchFunction | None = None) -> None:
        if search is None and (spec.name == "search" or spec.context_passages):
            what = "'search'" if spec.name == "search" else f"'answer' with context_passages={spec.context_passages}"
            raise ValueError(f"env {what} needs something to search: give it a retriever")
        self._spec = spec
        self._envs: dict[int, Env] = {}
        self._tools: list[Tool] = []
        self._servers: list[McpServer] = []
        self._sandbox: Sandbox | None = None
        self._context: Callable[[str], str] | None = None
        self._leaves = False
        # Graders belong to the process: those of the newest host hold, and they end with it.
        configure_math(replace(spec.math, unsafe=spec.math.unsafe or spec.unsafe))
        if spec.judge is not None:
            configure_judge(spec.judge)
        if spec.name == "answer":
            if search is not None and spec.context_passages:
                self._context = _passages(search, spec.context_passages, spec.search_format)
            return
        if search is not None:
            from envs.retrieval.search_tool import web_search_tool

            self._tools = [web_search_tool(search, k=spec.search_results, formatter=spec.search_format)]
        try:
            for server in spec.mcp_servers:
                self._servers.append(McpServer.from_spec(server))
                self._tools += self._servers[-1].tools()
            if spec.name == "code":
                names = [tool.name for tool in self._tools]
                self._sandbox = Sandbox(tool_names=names, modules=spec.modules, limits=spec.limits, unsafe=spec.unsafe)
        except BaseException:
            self.close()
            raise

    def make(self) -> Env:
        """A new env that shares this host's sandbox and tools."""
        spec = self._spec
        if spec.name == "code":
            from envs.code_env import CodeEnv

            assert self._sandbox is not None
            return CodeEnv(sandbox=self._sandbox, tools=self._tools, grade=grade, max_steps=spec.max_steps)
        if spec.name == "tool":
            from envs.tool_env import ToolEnv

            limits = spec.limits
            return ToolEnv(
                tools=self._tools, grade=grade, max_steps=spec.max_steps, stateless=spec.stateless_tools,
                tool_s=limits.tool_s, output_chars=limits.output_chars,
            )  # fmt: skip
        if spec.name == "search":
            from envs.search_env import SearchEnv

            [web_search] = self._tools
            return SearchEnv(
                search=lambda query: web_search.call([query], {}), grade=grade, max_steps=spec.max_steps,
                search_s=spec.limits.tool_s, output_chars=spec.limits.output_chars,
            )  # fmt: skip
        return AnswerEnv(grade=grade, context=self._context)

    def can_preview(self) -> bool:
        return self.make().can_preview

    def leave(self) -> None:
        """Begin no episode any more: the node is to go."""
        self._leaves = True

    def reset(self, slot: int, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        if self._leaves:
            raise HostLeavesError("the env host leaves with its node")
        if slot not in self._envs:
            self._envs[slot] = self.make()
        return self._envs[slot].reset(task, seed)

    def step(self, slot: int, action: str) -> StepResult:
        return self._episode(slot).step(action)

    def preview(self, slot: int, actions: Sequence[str]) -> list[StepResult]:
        return self._episode(slot).preview(actions)

    def preview_more(self, slot: int, actions: Sequence[str]) -> list[StepResult]:
        return self._episode(slot).preview_more(actions)  # type: ignore[attr-defined]  # all that are made here have it

    def commit(self, slot: int, index: int) -> StepResult:
        return self._episode(slot).commit(index)

    def release(self, slot: int) -> None:
        """End the slot's episode; its process is freed."""
        env = self._envs.pop(slot, None)
        if env is not None:
            env.close()

    def close(self) -> None:
        for slot in list(self._envs):
            self.release(slot)
        if self._sandbox is not None:
            self._sandbox.close()
        for server in self._servers:
            server.close()

    def _episode(self, slot: int) -> Env:
        if slot not in self._envs:  # the host was restarted under a running episode
            raise EnvError(f"env slot {slot} has no episode: its host was restarted")
        return self._envs[slot]


def _passages(search: SearchFunction, k: int, formatter: str) -> Callable[[str], str]:
    from envs.retrieval.formatting import get_formatter
    from envs.retrieval.retriever import check_k

    check_k(k)
    as_text = get_formatter(formatter)
    return lambda question: as_text(search(question, k))


def start_env_hosts(
    spec: EnvSpec,
    *,
    count: int,
    slots_per_host: int,
    search: SearchFunction | None,
    options: Sequence[Mapping[str, Any]] = (),
) -> list[Any]:
    """`count` Ray actors, each with `slots_per_host` threads. They are killed with the job that started them.

    `options`: of each, for Ray: what it takes (nothing, by default) and where it is.
    """
    import ray

    actor = ray.remote(EnvHost)
    own = {"num_cpus": 0, "max_concurrency": slots_per_host + 1, "max_restarts": -1, "max_task_retries": 0}
    each = list(options) or [{}] * count
    return [actor.options(**{**own, **each[i]}).remote(spec, search) for i in range(count)]  # type: ignore[attr-defined]


class HostAwayError(EnvError):
    """The host has died; it will be back, unless `for_good`."""

    def __init__(self, message: str, *, for_good: bool = False) -> None:
        super().__init__(message)
        self.for_good = for_good


class HostLeavesError(EnvError):
    """The host begins no episode any more."""


class RemoteEnv:
    """One slot of an `EnvHost` actor as an awaited env."""

    def __init__(
        self, host: Any, slot: int, *, can_preview: bool, timeout_s: float, others: Sequence[Any] = ()
    ) -> None:
        """`others`: hosts that may take the slot when `host` stays away; no other env has that number on them."""
        self._host, self._slot, self._timeout_s = host, slot, timeout_s
        self._hosts = list(others) or [host]
        self.can_preview = self.can_preview_more = can_preview
        self._open = False

    async def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        """Waits for a host that is being started again: until it is there calls fail at once, and so would episode
        after episode. One that stays away, or will not have it, is left for another."""
        self._open = True
        deadline_s = time.monotonic() + self._timeout_s
        leave_s = time.monotonic() + _HOST_GONE_S
        while True:
            try:
                return await self._call(self._host.reset.remote(self._slot, task, seed), "reset")
            except HostAwayError as error:
                alone = len(self._hosts) == 1
                if time.monotonic() > deadline_s or (error.for_good and alone):
                    raise
                if not alone and (time.monotonic() > leave_s or error.for_good):
                    self._host = self._hosts[(self._hosts.index(self._host) + 1) % len(self._hosts)]
                    leave_s = time.monotonic() + _HOST_GONE_S
                await asyncio.sleep(_HOST_AWAY_S)

    async def step(self, action: str) -> StepResult:
        return self._after(await self._call(self._host.step.remote(self._slot, action), "step"))

    async def preview(self, actions: Sequence[str]) -> list[StepResult]:
        return await self._call(self._host.preview.remote(self._slot, list(actions)), "preview")

    async def preview_more(self, actions: Sequence[str]) -> list[StepResult]:
        return await self._call(self._host.preview_more.remote(self._slot, list(actions)), "preview")

    async def commit(self, index: int) -> StepResult:
        return self._after(await self._call(self._host.commit.remote(self._slot, index), "commit"))

    async def close(self) -> None:
        """Nothing to do, and no call, after an episode that came to its end: an env frees its own then."""
        if self._open:
            self._open = False
            await self._call(self._host.release.remote(self._slot), "release")

    def _after(self, result: StepResult) -> StepResult:
        self._open = self._open and not (result.terminated or result.truncated)
        return result

    async def _call(self, reference: Awaitable[Any], what: str) -> Any:
        from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

        try:
            return await asyncio.wait_for(reference, self._timeout_s)
        except TimeoutError:
            raise EnvError(f"env host did not finish {what} within {self._timeout_s:g} s") from None
        except ActorUnavailableError:
            raise HostAwayError(f"env host died during {what}, or was not back yet") from None
        except RayActorError as error:
            raise HostAwayError(f"env host died during {what}: {type(error).__name__}", for_good=True) from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, HostLeavesError):
                raise HostAwayError(str(cause), for_good=True) from None
            if isinstance(cause, EnvError):
                raise EnvError(str(cause)) from None
            if isinstance(cause, TaskError):  # no attempt would end better
                raise TaskError(str(cause)) from None
            raise EnvError(f"env host failed in {what}: {type(cause).__name__}: {cause}") from None
