"""Serves the pages: binds its socket, says where it is, runs until it is interrupted.

Example::

    serve(ledgers, Options(host="127.0.0.1", port=0), say=print)
"""

from __future__ import annotations

import os
import signal
import socket
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.viewer.access import Access, is_loopback, new_token
from rollout.ledger import Ledger


class ViewError(ValueError):
    """A viewer that cannot be started as it was asked for; one line that says what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to serve."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any that is free."""
    token: str = ""
    """"": none on loopback, a new one elsewhere."""
    names: tuple[str, ...] = ()
    """More names that it is called by, behind a proxy or a tunnel."""
    cache: Path | None = None
    """Where indices are kept; None: nowhere."""
    tokenizer: str | None = None
    open_browser: bool = False


def default_cache() -> Path:
    """In the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "apprentice" / "viewer"


def serve(ledgers: Sequence[Ledger], options: Options, *, say: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM, both of which raise `KeyboardInterrupt` when all is closed.

    Raises `ViewError` before anything is read, `LedgerError` for a ledger.
    """
    import uvicorn

    from launch.viewer.catalog import Catalog
    from launch.viewer.pages import make_app
    from launch.viewer.token_view import TokenViews

    outside = not is_loopback(options.host)
    token = options.token or (new_token() if outside else "")
    access = Access(token=token, names=_names(options, outside), digits=outside)
    listening = _bind(options.host, options.port)
    with listening, Catalog(ledgers, cache=options.cache) as catalog:
        app = make_app(catalog, TokenViews(tokenizer=options.tokenizer), access)
        address = _address(options.host, listening.getsockname()[1], token)
        for note in catalog.notes:
            say(note)
        say(f"viewing {', '.join(index.uri for index in catalog.indices)}")
        say(address)
        if token and not options.token:
            say("the token in this address is asked for; it is good until the viewer ends")
        if options.open_browser:
            webbrowser.open(address)
        config = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=64 * 1024,
        )
        # uvicorn raises the signal that ended it once more; by default SIGTERM would end us before the index is closed.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), port))
        listening.listen(128)  # now, so that whoever follows the printed address is not refused
    except (OSError, OverflowError) as error:
        listening.close()
        raise ViewError(f"cannot listen on {host} port {port}: {error}; name another --host or --port") from None
    return listening


def _names(options: Options, outside: bool) -> tuple[str, ...]:
    own = (options.host, socket.gethostname(), socket.getfqdn()) if outside else ()
    return tuple(name for name in (*own, *options.names) if name)


def _address(host: str, port: int, token: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    name = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")
