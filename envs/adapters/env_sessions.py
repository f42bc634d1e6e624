"""The sessions of an env server: episodes by id, their limits, and what is told of them as JSON; no network in here.

Every method that calls an env does so in a thread and raises `Refused` with the HTTP status and OpenEnv's error code
for what goes wrong. `envs.adapters.http_server` puts them behind HTTP and WebSocket.

Example::

    sessions = Sessions(env_factory("code"), tasks=[], settings=ServerSettings())
    session, told = await sessions.reset({"task": {"question": "6 * 7?", "answer": "42"}})
    told = await sessions.step(session, "final_answer(42)")        # {"observation": {...}, "reward": 1.0, ...}
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from envs.adapters.task_json import task_from_json
from envs.base import Env, EnvError, Observation, StepResult, Task

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Limits of a server."""

    max_sessions: int = 64
    """Episodes at the same moment; a reset that would start one more is refused with 503."""
    idle_s: float = 600.0
    """Episodes that were not used for so long are closed."""
    step_s: float = 130.0
    """Longest call of an env; one that takes longer is given up with its session."""
    max_body_bytes: int = 1 << 20
    token: str = ""
    """Wanted as `Authorization: Bearer <token>` from every caller when it is not empty."""

    def __post_init__(self) -> None:
        for name in ("max_sessions", "idle_s", "step_s", "max_body_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Session:
    """One env with one episode at a time."""

    def __init__(self, env: Env, episode_id: str) -> None:
        self.env, self.episode_id = env, episode_id
        self.task: Task | None = None
        self.steps = 0
        self.done = False
        self.busy = False
        self.used_at = time.monotonic()


class Sessions:
    """Episodes by id: starts them up to the limit, calls their envs in threads, closes those left idle."""

    def __init__(self, make: Callable[[], Env], tasks: Sequence[Task], settings: ServerSettings) -> None:
        self._make, self._tasks, self._settings = make, tuple(tasks), settings
        self._by_id = {task.id: task for task in self._tasks}
        self._sessions: dict[str, Session] = {}
        self._starting = 0
        self._can_preview: bool | None = None
        # One thread more than there are sessions, so that closing one never waits for the others.
        self._threads = ThreadPoolExecutor(settings.max_sessions + 1, thread_name_prefix="env")

    async def reset(self, body: Mapping[str, Any]) -> tuple[Session, dict[str, Any]]:
        """The session and the answer."""
        seed, task = seed_of(body), self._task(body)
        episode_id = body.get("episode_id")
        if episode_id is not None and (not isinstance(episode_id, str) or not 0 < len(episode_id) <= 255):
            raise Refused(400, "VALIDATION_ERROR", f"'episode_id' must be a string, not {episode_id!r:.80}")
        session = self._sessions.get(episode_id or "")
        if session is None:
            session = await self._start(episode_id or uuid.uuid4().hex)
        observation, info = await self._call(session, lambda env: env.reset(task, seed))
        session.task, session.steps, session.done = task, 0, False
        metadata = {"episode_id": session.episode_id, "task_id": task.id, "info": info}
        return session, answer_to_json(observation, reward=None, done=False, metadata=metadata)

    async def step(self, session: Session, action: str, timeout_s: float | None = None) -> dict[str, Any]:
        return self._after(session, await self._call(session, lambda env: env.step(action), timeout_s))

    async def preview(self, session: Session, actions: list[str]) -> dict[str, Any]:
        results = await self._call(session, lambda env: env.preview(actions))
        return {"results": [result_to_json(result) for result in results]}

    async def commit(self, session: Session, index: int) -> dict[str, Any]:
        return self._after(session, await self._call(session, lambda env: env.commit(index)))

    def state(self, session: Session) -> dict[str, Any]:
        task_id = session.task.id if session.task else None
        return {
            "episode_id": session.episode_id,
            "step_count": session.steps,
            "task_id": task_id,
            "done": session.done,
        }

    def find(self, episode_id: Any) -> Session:
        if not isinstance(episode_id, str) or not episode_id:
            raise Refused(400, "VALIDATION_ERROR", "'episode_id' is needed: /reset answers with it, in its metadata")
        if episode_id not in self._sessions:
            idle_s = self._settings.idle_s
            message = (
                f"episode {episode_id!r:.80} is not there: it was never reset, was closed, or idle for {idle_s:g} s"
            )
            raise Refused(404, "SESSION_ERROR", message)
        return self._sessions[episode_id]

    async def close(self, session: Session) -> None:
        self._sessions.pop(session.episode_id, None)
        if not session.busy:  # else the call that is under way closes it
            await self._in_thread(session.env.close)

    async def close_idle(self) -> None:
        """For ever: closes what nobody uses."""
        while True:
            await asyncio.sleep(min(self._settings.idle_s / 4, 5.0))
            before = time.monotonic() - self._settings.idle_s
            for session in list(self._sessions.values()):
                if session.used_at < before and not session.busy:
                    with contextlib.suppress(Exception):
                        await self.close(session)

    async def close_all(self) -> None:
        for session in list(self._sessions.values()):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.close(session), 10.0)
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def count(self) -> int:
        return len(self._sessions)

    async def can_preview(self) -> bool:
        def ask() -> bool:
            env = self._make()
            try:
                return env.can_preview
            finally:
                env.close()

        if self._can_preview is None:
            try:
                self._can_preview = await self._in_thread(ask)
            except Exception as error:
                raise Refused(503, "FACTORY_ERROR", f"the env could not be made: {error}") from error
        return self._can_preview

    async def _start(self, episode_id: str) -> Session:
        if len(self._sessions) + self._starting >= self._settings.max_sessions:
            message = f"all {self._settings.max_sessions} sessions are taken; close one, or come again"
            raise Refused(503, "CAPACITY_REACHED", message)
        self._starting += 1  # the place is taken before anything is awaited
        try:
            env = await self._in_thread(self._make)
        except Exception as error:
            raise Refused(503, "FACTORY_ERROR", f"the env could not be made: {error}") from error
        finally:
            self._starting -= 1
        if episode_id in self._sessions:
            await self._in_thread(env.close)
            raise Refused(409, "SESSION_ERROR", "the episode is busy with another reset")
        session = self._sessions[episode_id] = Session(env, episode_id)
        return session

    async def _call(self, session: Session, act: Callable[[Env], T], timeout_s: float | None = None) -> T:
        """What `act` returns on the session's env, in a thread; the env's errors become refusals."""
        if session.busy:
            raise Refused(409, "SESSION_ERROR", "the episode is busy with another call")
        session.busy, session.used_at = True, time.monotonic()
        limit_s = min(self._settings.step_s, timeout_s or self._settings.step_s)

        def work() -> T:
            try:
                return act(session.env)
            finally:
                session.busy, session.used_at = False, time.monotonic()
                if self._sessions.get(session.episode_id) is not session:  # closed or given up meanwhile
                    session.env.close()

        try:
            return await asyncio.wait_for(self._in_thread(work), limit_s)
        except TimeoutError as error:
            self._sessions.pop(session.episode_id, None)
            message = f"the env did not answer within {limit_s:g} s; the episode is lost"
            raise Refused(503, "EXECUTION_ERROR", message) from error
        except EnvError as error:
            raise Refused(503, "EXECUTION_ERROR", str(error)) from error
        except RuntimeError as error:  # out of order: no episode, no preview
            raise Refused(409, "SESSION_ERROR", str(error)) from error
        except Exception as error:
            raise Refused(503, "EXECUTION_ERROR", f"{type(error).__name__}: {error}") from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _after(self, session: Session, result: StepResult) -> dict[str, Any]:
        session.steps += 1
        session.done = result.terminated or result.truncated
        return result_to_json(result)

    def _task(self, body: Mapping[str, Any]) -> Task:
        """The task that a reset asks for, else one of the server's own by the seed."""
        if body.get("task") is not None:
            try:
                return task_from_json(body["task"])
            except ValueError as error:
                raise Refused(400, "VALIDATION_ERROR", str(error)) from error
        if body.get("task_id") is not None:
            if body["task_id"] not in self._by_id:
                message = f"there is no task {body['task_id']!r:.80} here; there are {len(self._by_id)}"
                raise Refused(400, "VALIDATION_ERROR", message)
            return self._by_id[body["task_id"]]
        if not self._tasks:
            raise Refused(400, "VALIDATION_ERROR", "this server has no tasks of its own: send a 'task' with the reset")
        return self._tasks[seed_of(body) % len(self._tasks)]


def result_to_json(result: StepResult) -> dict[str, Any]:
    metadata = {"terminated": result.terminated, "truncated": result.truncated, "info": result.info}
    done = result.terminated or result.truncated
    return answer_to_json(result.observation, reward=result.reward, done=done, metadata=metadata)


def answer_to_json(
    observation: Observation, *, reward: float | None, done: bool, metadata: dict[str, Any]
) -> dict[str, Any]:
    shown = {"text": observation.text, "kind": observation.kind.value}
    return {"observation": shown, "reward": reward, "done": done, "metadata": metadata}


def seed_of(body: Mapping[str, Any]) -> int:
    seed = body.get("seed")
    if seed is None:
        return 0
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise Refused(400, "VALIDATION_ERROR", f"'seed' must be a whole number of at least 0, not {seed!r:.80}")
    return seed
