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
from typing import TYPE_CHECKING, Any

from envs.adapters.env_sessions import Refused, ServerSettings, Session, Sessions
from envs.base import Env, EnvError, Task

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.websockets import WebSocket

_ACTION_SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
_STARTS_S = 30.0


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
            except Refused as error:
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
            raise Refused(400, "VALIDATION_ERROR", f"'actions' must be a list of strings, not {actions!r:.80}")
        return await sessions.preview(sessions.find(asked.get("episode_id")), actions)

    async def commit(asked: dict[str, Any]) -> dict[str, Any]:
        index = asked.get("index")
        if isinstance(index, bool) or not isinstance(index, int):
            raise Refused(400, "VALIDATION_ERROR", f"'index' must be a whole number, not {index!r:.80}")
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
    except Refused:
        await socket.close(1008)
        return
    if "origin" in socket.headers and not limits.token:  # a page in a browser, which may have been sent here
        await socket.close(1008)
        return
    await socket.accept()
    session: Session | None = None
    try:
        while True:
            text = await asyncio.wait_for(socket.receive_text(), limits.idle_s)
            try:
                asked = _parse(text.encode(), limits.max_body_bytes)
                kind, data = asked.get("type"), asked.get("data") or {}
                if kind == "close":
                    return
                if not isinstance(data, dict):
                    raise Refused(400, "VALIDATION_ERROR", f"'data' must be an object, not {data!r:.80}")
                if kind == "reset":
                    episode_id = session.episode_id if session else uuid.uuid4().hex
                    session, told = await sessions.reset({**data, "episode_id": episode_id})
                    answer = {"type": "observation", "data": told}
                elif kind in ("step", "state") and session is None:
                    raise Refused(409, "SESSION_ERROR", "no episode is running: send a reset first")
                elif kind == "step" and session is not None:
                    answer = {"type": "observation", "data": await sessions.step(session, _action(data))}
                elif kind == "state" and session is not None:
                    answer = {"type": "state", "data": sessions.state(session)}
                else:
                    message = f"message type {kind!r:.80} is unknown; there are reset, step, state and close"
                    raise Refused(400, "UNKNOWN_TYPE", message)
            except Refused as error:
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


def _action(action: Any) -> str:
    text = action.get("text") if isinstance(action, dict) else None
    if not isinstance(text, str):
        raise Refused(400, "VALIDATION_ERROR", f'an action is {{"text": "..."}}, not {action!r:.80}')
    return text


def _timeout(body: Mapping[str, Any]) -> float | None:
    timeout_s = body.get("timeout_s")
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise Refused(400, "VALIDATION_ERROR", f"'timeout_s' must be a positive number, not {timeout_s!r:.80}")
    return float(timeout_s)


async def _read_body(request: Request, limit: int) -> dict[str, Any]:
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refused(400, "INVALID_JSON", "the request's Content-Type must be application/json")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise Refused(413, "VALIDATION_ERROR", f"the request is longer than {limit} bytes")
    return _parse(bytes(body or b"{}"), limit)


def _parse(body: bytes, limit: int) -> dict[str, Any]:
    if len(body) > limit:
        raise Refused(413, "VALIDATION_ERROR", f"the message is longer than {limit} bytes")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "INVALID_JSON", f"the request is not JSON: {error!s:.200}") from None
    if not isinstance(document, dict):
        raise Refused(400, "INVALID_JSON", f"the request must be a JSON object, not {document!r:.80}")
    return document


def _check_token(headers: Mapping[str, str], token: str) -> None:
    if token and not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {token}".encode()):
        raise Refused(401, "SESSION_ERROR", "this server wants 'Authorization: Bearer <token>'")
