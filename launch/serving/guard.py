"""Who may ask: the Host header, the key, and what is counted of every request; ASGI middleware.

A page in a browser can be made to call a server on loopback by a name of its own (DNS rebinding): only known names are
answered. The key is compared in constant time. `/health` needs no key, so that whoever balances load can ask.

Example::

    app = Guard(app, settings=ServiceSettings(model="m", key="secret", hosts=LOOPBACK), metrics=ServiceMetrics())
"""

from __future__ import annotations

import hmac
import json
from typing import TYPE_CHECKING

from launch.serving.api_errors import ApiError
from launch.serving.service_metrics import ServiceMetrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from launch.serving.service import ServiceSettings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = ("/health",)
_KNOWN = ("/health", "/metrics", "/v1/models", "/v1/chat/completions")


class Guard:
    """`app` behind the checks of `settings`."""

    def __init__(self, app: ASGIApp, *, settings: ServiceSettings, metrics: ServiceMetrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._wanted = f"Bearer {settings.key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in _KNOWN else "other"  # no label that a client may choose

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        headers: dict[bytes, bytes] = dict(scope["headers"])
        error = self._wrong_host(headers.get(b"host", b"")) or self._wrong_key(scope, headers)
        if error is None:
            return await self._app(scope, receive, counted)
        told = [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
        told.append((b"content-type", b"application/json"))
        await counted({"type": "http.response.start", "status": error.status, "headers": told})
        await counted({"type": "http.response.body", "body": json.dumps(error.body()).encode()})

    def _wrong_host(self, header: bytes) -> ApiError | None:
        hosts = self._settings.hosts
        if not hosts or host_name(header.decode("latin-1")) in hosts:
            return None
        message = f"this host name is not served; there are {', '.join(hosts)} (--allowed-host adds one)"
        return ApiError(421, message, code="unknown_host")

    def _wrong_key(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if not self._settings.key or scope["path"] in _OPEN:
            return None
        given = headers.get(b"authorization", b"")
        if hmac.compare_digest(given, self._wanted):
            return None
        if not given:
            return ApiError(401, "no API key was given; send 'Authorization: Bearer <key>'", code="missing_api_key")
        return ApiError(401, "the API key is not the right one", code="invalid_api_key")


def host_name(header: str) -> str:
    """A Host header without its port, in lower case; an IPv6 address without brackets."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header
