"""The endpoint: OpenAI's chat completions over an agent whose tools run on the server; a Starlette application.

    POST /v1/chat/completions     see `chat_request` and `chat_reply`; steps are streamed as they happen
    GET  /v1/models, /v1/models/{id}
    GET  /health                  200 when it answers questions, else 503 with "loading", "draining" or "failed"
    GET  /metrics                 for Prometheus

A client that leaves takes its episode with it. A stream's status is told once something has happened or `keep_alive_s`
have passed, so that what fails at once has the status that fits. Questions are in no log.

Example::

    app = build_app(service)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import traceback
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

from launch.serving.api_errors import ApiError, invalid
from launch.serving.chat_reply import DONE, KEEP_ALIVE, ChatReply, event
from launch.serving.chat_request import ChatRequest, read_chat
from launch.serving.guard import Guard
from launch.serving.service import Episode, Service, State
from launch.serving.service_metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

_SEND_S = 60.0
"""A client that reads nothing for so long is given up."""
_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold the stream back
}
_PATHS = "POST /v1/chat/completions, GET /v1/models, GET /health, GET /metrics"
_NOT_SERVED = ("/v1/responses", "/v1/completions", "/v1/embeddings")
"""What a client of OpenAI's may look for."""


def build_app(service: Service) -> Starlette:
    """The ASGI application of `service`; starting and closing it is left to the caller."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Route

    settings = service.settings

    async def health(request: Request) -> Response:
        told = {"status": service.state.value, "model": settings.model}
        told |= {"running": service.running, "waiting": service.waiting, "places": settings.places}
        return _json(told, 200 if service.state is State.READY else 503)

    async def metrics(request: Request) -> Response:
        from starlette.responses import Response

        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    def model() -> dict[str, Any]:
        return {"id": settings.model, "object": "model", "created": service.started_at_s, "owned_by": "apprentice"}

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [model()]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != settings.model:
            message = f"the model {name!r:.100} is not served here; there is {settings.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return _json(model())

    async def chat(request: Request) -> Response:
        asked = read_chat(await _read_json(request, settings.max_body_bytes, settings.body_s))
        episode = service.begin(service.question(asked))
        reply = ChatReply(model=settings.model, asked=asked, dialect=service.plan.greedy.dialect, steps=settings.steps)
        return _Answer(service, episode, reply, asked)  # type: ignore[return-value]  (an ASGI application, as they are)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return _error(error)

    async def not_there(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        asked = f"{request.method} {request.url.path:.100}"
        if error.status_code == 405:
            return _error(ApiError(405, f"{asked} is not allowed; there are {_PATHS}", code="method_not_allowed"))
        what = "not served here" if request.url.path in _NOT_SERVED else "an unknown URL"
        message = f"{asked} is {what}; there are {_PATHS}"
        return _error(ApiError(error.status_code, message, code="unknown_url"))

    async def broken(request: Request, error: Exception) -> Response:
        log_failure(error)
        return _error(_internal())

    middleware = [Middleware(Guard, settings=settings, metrics=service.metrics)]
    if settings.origins:
        middleware.insert(0, Middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"],
        ))  # fmt: skip
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/chat/completions", _caught(chat, broken), methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={ApiError: refused, HTTPException: not_there},
    )


def log_failure(error: BaseException) -> None:
    """What failed and where; not its message, which may repeat what was asked."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
    logger.error("a request failed: %s at %s", type(error).__name__, where)


def _caught(endpoint: Any, broken: Any) -> Any:
    """Starlette would log the message of whatever else is raised."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ApiError:
            raise
        except Exception as error:
            return await broken(request, error)

    return guarded


class _Answer:
    """Runs an episode to its end, as long as somebody waits for it, and sends what comes of it."""

    def __init__(self, service: Service, episode: Episode, reply: ChatReply, asked: ChatRequest) -> None:
        self._service, self._episode, self._reply, self._asked = service, episode, reply, asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_until_gone(receive))
        work = asyncio.create_task(self._send(scope, receive, send))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._service.metrics.disconnects.inc()
        finally:
            self._episode.abandon()  # if it has not ended by itself
            for task in (gone, work):
                task.cancel()
            await asyncio.wait({gone, work})
        if not work.cancelled() and (error := work.exception()) is not None:
            log_failure(error)  # the answer is left incomplete, and the connection ends in the middle of it

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not self._asked.stream:
                await self._episode.finished()
                whole = self._reply.whole(self._episode.result(), self._episode.searches)
                return await _json(whole)(scope, receive, send)
            chunks = self._chunks()
            first = await anext(chunks)  # what fails before it has a status of its own
        except ApiError as error:
            return await _error(error)(scope, receive, send)
        except Exception as error:
            log_failure(error)
            return await _error(_internal())(scope, receive, send)
        headers = [(name.encode(), value.encode()) for name, value in _STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send_body(send, first)
        while True:
            try:
                chunk = await anext(chunks, None)
            except ApiError as error:
                chunk = event(error.body()) + DONE
            except Exception as error:
                log_failure(error)
                chunk = event(_internal().body()) + DONE
            if chunk is None:
                break
            await _send_body(send, chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        number, begun = 0, False
        while True:
            try:
                step = await self._episode.next(timeout_s=self._service.settings.keep_alive_s)
            except TimeoutError:
                yield KEEP_ALIVE
                continue
            last = self._episode.result() if step is None else None
            if not begun:
                begun = True
                yield _joined(self._reply.begin())
            if last is not None:
                yield _joined(self._reply.end(last))
                return
            if step is not None:
                number += 1
                yield _joined(self._reply.step(number, step, self._episode.searches[number - 1]))


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_body(send: Send, body: bytes) -> None:
    if body:
        async with asyncio.timeout(_SEND_S):
            await send({"type": "http.response.body", "body": body, "more_body": True})


def _joined(chunks: Iterable[bytes]) -> bytes:
    return b"".join(chunks)


def _json(data: Any, status: int = 200) -> Response:
    """ASCII, so that whatever a model wrote can be sent."""
    from starlette.responses import Response

    return Response(json.dumps(data), status, media_type="application/json")


def _error(error: ApiError) -> Response:
    from starlette.responses import Response

    headers = dict(error.headers())
    return Response(json.dumps(error.body()), error.status, media_type="application/json", headers=headers)


def _internal() -> ApiError:
    return ApiError(500, "the server failed; its log says where", code="internal_error")


async def _read_json(request: Request, limit_bytes: int, limit_s: float) -> Any:
    """Raises `ApiError`: 415, 413, 408 or 400."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps web pages out, which may send other types without asking
        raise ApiError(415, "the Content-Type must be application/json", code="unsupported_media_type")
    too_large = ApiError(413, f"the request is larger than {limit_bytes} bytes", code="request_too_large")
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > limit_bytes:
            raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limit_s):
            async for piece in request.stream():
                body += piece
                if len(body) > limit_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the request was not there within {limit_s:g} s", code="request_timeout") from None
    try:
        return json.loads(bytes(body))
    except RecursionError:
        raise invalid("the request's JSON is nested too deeply", code="invalid_json") from None
    except ValueError:
        raise invalid("the request is no valid JSON", code="invalid_json") from None
