"""Search-R1's retrieval protocol over HTTP, in front of a `RetrievalService`: its clients work unchanged.

    POST /retrieve  {"queries": ["q", ...], "topk": 3, "return_scores": true}      ("query": "q" for one)
                    -> {"result": [[{"document": {"id": "7", "contents": "Title and text"}, "score": 0.6}, ...], ...]}
                    with "return_scores" false or left out: {"result": [[{"id": ..., "contents": ...}, ...], ...]}
    GET  /health    -> {"status": "ok", "fingerprint": ..., "stats": {...}}

Answers 503 while too many queries wait (clients of that protocol repeat a 503, not a 429), 504 past the time limit, 422
for a request that is not as above, 500 when the retriever fails. It is bare ASGI: a web framework costs more than a
BM25 search. It has no authentication: bind it to a network that you trust.

Example::

    serve(retriever, port=8000)                                # until SIGINT or SIGTERM
    with RetrievalServer(retriever) as server:                 # in a thread, on a free port
        HttpRetriever(server.url).search(["capital of France"], 3)

Protocol: https://github.com/PeterGriffinJin/Search-R1, search_r1/search/retrieval_server.py.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from envs.base import EnvError
from envs.retrieval.corpus import Passage
from envs.retrieval.retriever import Hit, Retriever
from envs.retrieval.service import RetrievalOverloaded, RetrievalService, RetrievalTimeout, ServiceSettings

MAX_BODY_BYTES = 8 << 20
MAX_QUERIES = 1024
MAX_TOPK = 1000
_KEEP_ALIVE_S = 75
_STOP_TIMEOUT_S = 10.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Refused(Exception):
    """A request that gets another status than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RetrievalApp:
    """An ASGI application (`lifespan` included); see the module's docstring."""

    def __init__(self, retriever: Retriever, settings: ServiceSettings | None = None, *, default_topk: int = 3) -> None:
        if not 1 <= default_topk <= MAX_TOPK:
            raise ValueError(f"default_topk must be between 1 and {MAX_TOPK}, got {default_topk}")
        self._retriever, self._settings, self._default_topk = retriever, settings, default_topk
        self._service: RetrievalService | None = None
        self._document = lru_cache(maxsize=65_536)(_document_json)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification, https://asgi.readthedocs.io."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            status, body = 200, await self._answer(scope, receive)
        except _Refused as refused:
            status, body = refused.status, _detail(str(refused))
        except RetrievalOverloaded as error:
            status, body = 503, _detail(str(error))
        except RetrievalTimeout as error:
            status, body = 504, _detail(str(error))
        except EnvError as error:
            status, body = 500, _detail(str(error))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._service = RetrievalService(self._retriever, self._settings)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._service.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        path, method = scope["path"], scope["method"]
        if self._service is None:
            raise _Refused(503, "the service has not started (the server must speak ASGI's lifespan)")
        if path == "/retrieve":
            _only(method, "POST")
            queries, topk, with_scores = _request(await _body(receive), self._default_topk)
            found = await self._service.search_many(queries, topk)
            return b'{"result":[' + b",".join(self._hits(hits, with_scores) for hits in found) + b"]}"
        if path == "/health":
            _only(method, "GET")
            health = {
                "status": "ok",
                "fingerprint": self._retriever.fingerprint,
                "stats": asdict(self._service.stats()),
            }
            return json.dumps(health).encode()
        raise _Refused(404, f"there is no {path}; there are POST /retrieve and GET /health")

    def _hits(self, hits: list[Hit], with_scores: bool) -> bytes:
        if not with_scores:
            return b"[" + b",".join(self._document(hit.passage) for hit in hits) + b"]"
        entries = [
            b'{"document":%b,"score":%b}' % (self._document(hit.passage), json.dumps(float(hit.score)).encode())
            for hit in hits
        ]
        return b"[" + b",".join(entries) + b"]"


def serve(
    retriever: Retriever,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServiceSettings | None = None,
    default_topk: int = 3,
) -> None:
    """Answer requests in this thread, the main one, until SIGINT or SIGTERM."""
    server = _uvicorn(RetrievalApp(retriever, settings, default_topk=default_topk), host, port, quiet=False)
    server.run()


class RetrievalServer:
    """The server in a thread of this process, for as long as the `with` block lasts; `port` 0 takes a free one.

    Raises `EnvError` when it cannot start (the port is taken, say).
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        settings: ServiceSettings | None = None,
        default_topk: int = 3,
    ) -> None:
        self._host = host
        self._server = _uvicorn(RetrievalApp(retriever, settings, default_topk=default_topk), host, port, quiet=True)
        self._thread = threading.Thread(target=self._run, name="retrieval-http", daemon=True)
        self.url = ""

    def __enter__(self) -> RetrievalServer:
        self._thread.start()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise EnvError(f"the retrieval server could not start on {self._host}; is the port taken?")
            time.sleep(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://{self._host}:{port}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.should_exit = True
        self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._server.run()
        except SystemExit:  # uvicorn's way to say that it could not bind; `__enter__` sees the thread end
            pass


def _uvicorn(app: RetrievalApp, host: str, port: int, *, quiet: bool) -> Any:
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            lifespan="on",
            access_log=False,
            log_level="critical" if quiet else "info",
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(_STOP_TIMEOUT_S / 2),
        )
    )


def _only(method: str, allowed: str) -> None:
    if method != allowed:
        raise _Refused(405, f"{allowed} is needed, got {method}")


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Refused(400, "the client left before its request was whole")
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _Refused(413, f"a request may have {MAX_BODY_BYTES} bytes")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def _request(body: bytes, default_topk: int) -> tuple[list[str], int, bool]:
    """Queries, topk and whether scores are wanted."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refused(422, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _Refused(422, f"the body must be an object, got {type(fields).__name__}")
    if ("queries" in fields) == ("query" in fields):
        raise _Refused(422, 'exactly one of "queries" (a list of strings) and "query" (a string) is needed')
    queries = fields["queries"] if "queries" in fields else [fields["query"]]
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise _Refused(422, f"queries must be a list of strings and query a string, got {str(queries)[:80]!r}")
    if len(queries) > MAX_QUERIES:
        raise _Refused(422, f"a request may have {MAX_QUERIES} queries, got {len(queries)}")
    topk = fields.get("topk")
    topk = default_topk if topk is None or topk == 0 else topk  # Search-R1 takes 0 for "your default"
    if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= MAX_TOPK:
        raise _Refused(422, f"topk must be a whole number from 1 to {MAX_TOPK}, got {topk!r}")
    with_scores = fields.get("return_scores", False)
    if not isinstance(with_scores, bool):
        raise _Refused(422, f"return_scores must be true or false, got {with_scores!r}")
    return queries, topk, with_scores


def _document_json(passage: Passage) -> bytes:
    return json.dumps({"id": passage.id, "contents": passage.contents}, ensure_ascii=False).encode()


def _detail(reason: str) -> bytes:
    return json.dumps({"detail": reason}).encode()
