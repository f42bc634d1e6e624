"""Envs behind HTTP and WebSocket, for trainers in other processes; the protocol is OpenEnv's.

OpenEnv (https://github.com/meta-pytorch/OpenEnv) has `/reset`, `/step`, `/state`, `/health`, `/metadata`, `/schema` and
a WebSocket `/ws` that is a session; its clients work with this server. Over plain HTTP OpenEnv keeps no session, so
its `episode_id` does that here: `/reset` answers with one, and `/step` and `/state` want it back. Beyond OpenEnv
there are `/preview`, `/commit` and `/close`. An action is `{"text": ...}`, an observation `{"text": ..., "kind": ...}`.

    POST /reset    {"seed": 0, "task": {...} | "task_id": "..."}     -> observation, reward, done, metadata.episode_id
    POST /step     {"episode_id": "...", "action": {"text": "..."}}  -> observation, reward, done, metadata.terminated,
                   .truncated and .info; "timeout_s" may shorten the wait
    POST /preview  {"episode_id": "...", "actions": ["...", ...]}    -> results: [as of /step, ...]
    POST /commit   {"episode_id": "...", "index": 0}                 -> as of /step
    POST /close    {"episode_id": "..."}
    GET  /state?episode_id=...                                       -> episode_id, step_count, task_id, done

Errors are `{"error": {"code", "message"}}`: 400 a bad request, 404 an episode that is not there (any more), 409 a call
out of order, 503 a failure of ours or no room. An episode that nobody uses for `idle_s` is closed.

Example::

    with serving(build_app(env_factory("code"), tasks=tasks), port=8765) as url:
        env = HttpEnv(url)

Every session's env runs in this process; to use more processors, start more servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from envs.adapters.task_json import task_from_json
from envs.base import Env, EnvError, Observation, StepResult, Task

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.websockets import WebSocket

T = TypeVar("T")
_ACTION_SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
_STARTS_S = 30.0


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


class _Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Session:
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
        self._sessions: dict[str, _Session] = {}
        self._starting = 0
        self._can_preview: bool | None = None
        # One thread more than there are sessions, so that closing one never waits for the others.
        self._threads = ThreadPoolExecutor(settings.max_sessions + 1, thread_name_prefix="env")

    async def reset(self, body: Mapping[str, Any]) -> tuple[_Session, dict[str, Any]]:
        """The session and the answer."""
        seed, task = _seed(body), self._task(body)
        episode_id = body.get("episode_id")
        if episode_id is not None and (not isinstance(episode_id, str) or not 0 < len(episode_id) <= 255):
            raise _Refused(400, "VALIDATION_ERROR", f"'episode_id' must be a string, not {episode_id!r:.80}")
        session = self._sessions.get(episode_id or "")
        if session is None:
            session = await self._start(episode_id or uuid.uuid4().hex)
        observation, info = await self._call(session, lambda env: env.reset(task, seed))
        session.task, session.steps, session.done = task, 0, False
        metadata = {"episode_id": session.episode_id, "task_id": task.id, "info": info}
        return session, _answer(observation, reward=None, done=False, metadata=metadata)

    async def step(self, session: _Session, action: str, timeout_s: float | None = None) -> dict[str, Any]:
        return self._after(session, await self._call(session, lambda env: env.step(action), timeout_s))

    async def preview(self, session: _Session, actions: list[str]) -> dict[str, Any]:
        results = await self._call(session, lambda env: env.preview(actions))
        return {"results": [_result(result) for result in results]}

    async def commit(self, session: _Session, index: int) -> dict[str, Any]:
        return self._after(session, await self._call(session, lambda env: env.commit(index)))

    def state(self, session: _Session) -> dict[str, Any]:
        task_id = session.task.id if session.task else None
        return {
            "episode_id": session.episode_id,
            "step_count": session.steps,
            "task_id": task_id,
            "done": session.done,
        }

    def find(self, episode_id: Any) -> _Session:
        if not isinstance(episode_id, str) or not episode_id:
            raise _Refused(400, "VALIDATION_ERROR", "'episode_id' is needed: /reset answers with it, in its metadata")
        if episode_id not in self._sessions:
            idle_s = self._settings.idle_s
            message = (
                f"episode {episode_id!r:.80} is not there: it was never reset, was closed, or idle for {idle_s:g} s"
            )
            raise _Refused(404, "SESSION_ERROR", message)
        return self._sessions[episode_id]

    async def close(self, session: _Session) -> None:
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
                raise _Refused(503, "FACTORY_ERROR", f"the env could not be made: {error}") from error
        return self._can_preview

    async def _start(self, episode_id: str) -> _Session:
        if len(self._sessions) + self._starting >= self._settings.max_sessions:
            message = f"all {self._settings.max_sessions} sessions are taken; close one, or come again"
            raise _Refused(503, "CAPACITY_REACHED", message)
        self._starting += 1  # the place is taken before anything is awaited
        try:
            env = await self._in_thread(self._make)
        except Exception as error:
            raise _Refused(503, "FACTORY_ERROR", f"the env could not be made: {error}") from error
        finally:
            self._starting -= 1
        if episode_id in self._sessions:
            await self._in_thread(env.close)
            raise _Refused(409, "SESSION_ERROR", "the episode is busy with another reset")
        session = self._sessions[episode_id] = _Session(env, episode_id)
        return session

    async def _call(self, session: _Session, act: Callable[[Env], T], timeout_s: float | None = None) -> T:
        """What `act` returns on the session's env, in a thread; the env's errors become refusals."""
        if session.busy:
            raise _Refused(409, "SESSION_ERROR", "the episode is busy with another call")
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
            raise _Refused(503, "EXECUTION_ERROR", message) from error
        except EnvError as error:
            raise _Refused(503, "EXECUTION_ERROR", str(error)) from error
        except RuntimeError as error:  # out of order: no episode, no preview
            raise _Refused(409, "SESSION_ERROR", str(error)) from error
        except Exception as error:
            raise _Refused(503, "EXECUTION_ERROR", f"{type(error).__name__}: {error}") from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _after(self, session: _Session, result: StepResult) -> dict[str, Any]:
        session.steps += 1
        session.done = result.terminated or result.truncated
        return _result(result)

    def _task(self, body: Mapping[str, Any]) -> Task:
        """The task that a reset asks for, else one of the server's own by the seed."""
        if body.get("task") is not None:
            try:
                return task_from_json(body["task"])
            except ValueError as error:
                raise _Refused(400, "VALIDATION_ERROR", str(error)) from error
        if body.get("task_id") is not None:
            if body["task_id"] not in self._by_id:
                message = f"there is no task {body['task_id']!r:.80} here; there are {len(self._by_id)}"
                raise _Refused(400, "VALIDATION_ERROR", message)
            return self._by_id[body["task_id"]]
        if not self._tasks:
            raise _Refused(400, "VALIDATION_ERROR", "this server has no tasks of its own: send a 'task' with the reset")
        return self._tasks[_seed(body) % len(self._tasks)]


def build_app(
    make: Callable[[], Env], *, tasks: Sequence[Task] = (), settings: ServerSettings | None = None, name: str = "env"
) -> Starlette:
    """The ASGI application; `make` is called for every session, in a thread. `tasks` are for resets that bring none."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route, WebSocketRoute

    limits = settings or ServerSettings()
    sessions = Sessions(make, tasks, limits)

    def route(path: str, answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]], *, body: bool = True) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                _check_token(request.headers, limits.token)
                asked = await _read_body(request, limits.max_body_bytes) if body else dict(request.query_params)
                return JSONResponse(await answer(asked))
            except _Refused as error:
                told = {"error": {"code": error.code, "message": str(error)}}
                return JSONResponse(told, error.status, headers={"Retry-After": "1"} if error.status == 503 else None)

        return Route(path, endpoint, methods=["POST"] if body else ["GET"])

    async def reset(asked: dict[str, Any]) -> dict[str, Any]:
        return (await sessions.reset(asked))[1]

    async def step(asked: dict[str, Any]) -> dict[str, Any]:
        session, action = sessions.find(asked.get("episode_id")), _action(asked.get("action"))
        return await sessions.step(session, action, _timeout(asked))

    async def preview(asked: dict[str, Any]) -> dict[str, Any]:
        actions = asked.get("actions")
        if not isinstance(actions, list) or not all(isinstance(action, str) for action in actions):
            raise _Refused(400, "VALIDATION_ERROR", f"'actions' must be a list of strings, not {actions!r:.80}")
        return await sessions.preview(sessions.find(asked.get("episode_id")), actions)

    async def commit(asked: dict[str, Any]) -> dict[str, Any]:
        index = asked.get("index")
        if isinstance(index, bool) or not isinstance(index, int):
            raise _Refused(400, "VALIDATION_ERROR", f"'index' must be a whole number, not {index!r:.80}")
        return await sessions.commit(sessions.find(asked.get("episode_id")), index)

    async def close(asked: dict[str, Any]) -> dict[str, Any]:
        await sessions.close(sessions.find(asked.get("episode_id")))
        return {}

    async def state(asked: dict[str, Any]) -> dict[str, Any]:
        return sessions.state(sessions.find(asked.get("episode_id")))

    async def health(asked: dict[str, Any]) -> dict[str, Any]:
        return {"status": "healthy", "active_sessions": sessions.count, "max_sessions": limits.max_sessions}

    async def metadata(asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": name,
            "description": "text actions, text observations",
            "can_preview": await sessions.can_preview(),
            "tasks": len(tasks),
        }

    async def schema(asked: dict[str, Any]) -> dict[str, Any]:
        text = {"type": "string"}
        state_fields = {"episode_id": text, "step_count": {"type": "integer"}, "task_id": text}
        return {
            "action": _ACTION_SCHEMA,
            "observation": {"type": "object", "properties": {"text": text, "kind": text}},
            "state": {"type": "object", "properties": state_fields},
        }

    async def websocket(socket: WebSocket) -> None:
        await _talk(socket, sessions, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        closing = asyncio.create_task(sessions.close_idle())
        try:
            yield
        finally:
            closing.cancel()
            await sessions.close_all()

    posts = {"reset": reset, "step": step, "preview": preview, "commit": commit, "close": close}
    gets = {"state": state, "health": health, "metadata": metadata, "schema": schema}
    routes = [route(f"/{path}", answer) for path, answer in posts.items()]
    routes += [route(f"/{path}", answer, body=False) for path, answer in gets.items()]
    return Starlette(routes=[*routes, WebSocketRoute("/ws", websocket)], lifespan=lifespan)


async def _talk(socket: WebSocket, sessions: Sessions, limits: ServerSettings) -> None:
    """One WebSocket is one session, as OpenEnv has it: messages `{"type", "data"}`, answered one by one."""
    from starlette.websockets import WebSocketDisconnect

    try:
        _check_token(socket.headers, limits.token)
    except _Refused:
        await socket.close(1008)
        return
    if "origin" in socket.headers and not limits.token:  # a page in a browser, which may have been sent here
        await socket.close(1008)
        return
    await socket.accept()
    session: _Session | None = None
    try:
        while True:
            text = await asyncio.wait_for(socket.receive_text(), limits.idle_s)
            try:
                asked = _parse(text.encode(), limits.max_body_bytes)
                kind, data = asked.get("type"), asked.get("data") or {}
                if kind == "close":
                    return
                if not isinstance(data, dict):
                    raise _Refused(400, "VALIDATION_ERROR", f"'data' must be an object, not {data!r:.80}")
                if kind == "reset":
                    episode_id = session.episode_id if session else uuid.uuid4().hex
                    session, told = await sessions.reset({**data, "episode_id": episode_id})
                    answer = {"type": "observation", "data": told}
                elif kind in ("step", "state") and session is None:
                    raise _Refused(409, "SESSION_ERROR", "no episode is running: send a reset first")
                elif kind == "step" and session is not None:
                    answer = {"type": "observation", "data": await sessions.step(session, _action(data))}
                elif kind == "state" and session is not None:
                    answer = {"type": "state", "data": sessions.state(session)}
                else:
                    message = f"message type {kind!r:.80} is unknown; there are reset, step, state and close"
                    raise _Refused(400, "UNKNOWN_TYPE", message)
            except _Refused as error:
                answer = {"type": "error", "data": {"message": str(error), "code": error.code}}
            await socket.send_text(json.dumps(answer))
    except (WebSocketDisconnect, TimeoutError):
        pass
    finally:
        if session is not None:
            await sessions.close(session)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # it is closed already
            await socket.close()


@contextlib.contextmanager
def serving(app: Starlette, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The URL of `app`, served from a thread until the block ends; port 0 takes a free one."""
    server = _uvicorn(app, host, port)

    def run() -> None:
        with contextlib.suppress(SystemExit):  # uvicorn's way to say that it could not start
            server.run()

    thread = threading.Thread(target=run, name="env server", daemon=True)
    thread.start()
    deadline = time.monotonic() + _STARTS_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            server.should_exit = True
            raise EnvError(f"the env server could not start at {host}:{port}; is the port taken?")
        time.sleep(0.01)
    try:
        yield f"http://{host}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30.0)


def serve(app: Starlette, *, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM. Prints the URL when it is ready."""
    server = _uvicorn(app, host, port)

    def announce() -> None:
        while not server.started and not server.should_exit:
            time.sleep(0.01)
        if server.started:
            print(f"env server at http://{host}:{server.servers[0].sockets[0].getsockname()[1]}", flush=True)

    threading.Thread(target=announce, daemon=True).start()
    server.run()


def _uvicorn(app: Starlette, host: str, port: int) -> Any:
    import uvicorn

    # A client thinks between two steps: its connection waits for it.
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_keep_alive=120, timeout_graceful_shutdown=5
    )
    return uvicorn.Server(config)


def _result(result: StepResult) -> dict[str, Any]:
    metadata = {"terminated": result.terminated, "truncated": result.truncated, "info": result.info}
    done = result.terminated or result.truncated
    return _answer(result.observation, reward=result.reward, done=done, metadata=metadata)


def _answer(observation: Observation, *, reward: float | None, done: bool, metadata: dict[str, Any]) -> dict[str, Any]:
    shown = {"text": observation.text, "kind": observation.kind.value}
    return {"observation": shown, "reward": reward, "done": done, "metadata": metadata}


def _action(action: Any) -> str:
    text = action.get("text") if isinstance(action, dict) else None
    if not isinstance(text, str):
        raise _Refused(400, "VALIDATION_ERROR", f'an action is {{"text": "..."}}, not {action!r:.80}')
    return text


def _timeout(body: Mapping[str, Any]) -> float | None:
    timeout_s = body.get("timeout_s")
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise _Refused(400, "VALIDATION_ERROR", f"'timeout_s' must be a positive number, not {timeout_s!r:.80}")
    return float(timeout_s)


def _seed(body: Mapping[str, Any]) -> int:
    seed = body.get("seed")
    if seed is None:
        return 0
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise _Refused(400, "VALIDATION_ERROR", f"'seed' must be a whole number of at least 0, not {seed!r:.80}")
    return seed


async def _read_body(request: Request, limit: int) -> dict[str, Any]:
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise _Refused(400, "INVALID_JSON", "the request's Content-Type must be application/json")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise _Refused(413, "VALIDATION_ERROR", f"the request is longer than {limit} bytes")
    return _parse(bytes(body or b"{}"), limit)


def _parse(body: bytes, limit: int) -> dict[str, Any]:
    if len(body) > limit:
        raise _Refused(413, "VALIDATION_ERROR", f"the message is longer than {limit} bytes")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, "INVALID_JSON", f"the request is not JSON: {error!s:.200}") from None
    if not isinstance(document, dict):
        raise _Refused(400, "INVALID_JSON", f"the request must be a JSON object, not {document!r:.80}")
    return document


def _check_token(headers: Mapping[str, str], token: str) -> None:
    if token and not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {token}".encode()):
        raise _Refused(401, "SESSION_ERROR", "this server wants 'Authorization: Bearer <token>'")
