"""Who may look: checked before any page is made, and the headers that keep a page from doing anything but being read.

- A `Host` header that is not this server's own name is refused: else a web page that somebody visits could point its
  name at this machine and read the ledgers (DNS rebinding). An address in digits cannot be rebound.
- Where a token is asked for, it comes once in the address (`?token=`), is kept in a cookie that scripts cannot read,
  and is compared in constant time.
- The Content-Security-Policy allows this server's own files and nothing else: no inline script, no inline style, no
  frame, no connection elsewhere.

Example::

    Guard(app, Access(token=new_token(), names=("gpu-7",)))
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "ledger_viewer"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types pages",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What is asked of a request."""

    token: str = ""
    """"" asks for none."""
    names: tuple[str, ...] = ()
    """Host names that are this server's, beside localhost."""
    digits: bool = False
    """Any address in digits may stand in `Host`, not only those of loopback."""


def new_token() -> str:
    """Hard to guess."""
    return secrets.token_urlsafe(24)


def is_loopback(host: str) -> bool:
    """Only this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not self._is_ours(headers.get(b"host", "")):
            await _say(send, 421, "This server does not answer to that name. Use the address that it printed.")
            return
        if scope["method"] not in ("GET", "HEAD"):
            await _say(send, 405, "There is nothing to change here: use GET.")
            return
        fresh = ""
        if self._access.token:
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            given = next((value for name, value in query if name == "token"), None)
            if given is not None and self._is_token(given):
                left = urlencode([each for each in query if each[0] != "token"])
                path = "/" + scope["path"].lstrip("/")  # never //host, which is another server
                fresh = f"{COOKIE}={self._access.token}; Path=/; HttpOnly; SameSite=Strict"
                await _say(send, 303, "", (("location", f"{path}?{left}" if left else path), ("set-cookie", fresh)))
                return
            bearer = headers.get(b"authorization", "").removeprefix("Bearer ")
            if not (self._is_token(_cookie(headers.get(b"cookie", ""))) or self._is_token(bearer)):
                await _say(send, 401, "This viewer asks for its token: open the address that it printed at its start.")
                return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                added = [(n.encode(), v.encode()) for n, v in _HEADERS.items() if n.encode() not in own]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, send_guarded)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._access.token.encode())

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        name = name.strip().lower().rstrip(".")
        if name == "localhost" or name in {each.lower() for each in self._access.names}:
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return self._access.digits or address.is_loopback


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


async def _say(send: Send, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
    told = {**_HEADERS, "content-type": "text/plain; charset=utf-8", "cache-control": "no-store"}
    raw = [(name.encode(), value.encode()) for name, value in (*told.items(), *headers)]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": text.encode()})
