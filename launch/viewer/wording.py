"""Numbers, times and names as the pages show them.

Example::

    span(75.2), count(12345), small(-0.0312)                    # "1 min 15 s", "12,345", "-0.031"
    labels(["/data/a/ledger", "/data/b/ledger"])                # ["a/ledger", "b/ledger"]
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime


def labels(uris: list[str]) -> list[str]:
    """The shortest ends of paths that tell ledgers apart."""
    parts = [uri.rstrip("/").split("/") for uri in uris]
    for length in range(1, max(map(len, parts), default=0) + 1):
        found = ["/".join(each[-length:]) for each in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{uri} ({i})" for i, uri in enumerate(uris)]


def enumerate_text(values: list[str]) -> Iterator[tuple[str, str]]:
    """("0", first), ("1", second), ..."""
    return ((str(i), each) for i, each in enumerate(values))


def moment(unix_s: float) -> str:
    """In UTC; empty for none, and for what is no time."""
    try:
        return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S") if unix_s else ""
    except (OverflowError, ValueError, OSError):
        return ""


def span(seconds: float) -> str:
    """A duration, as short as tells enough."""
    if seconds < 0.0095:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int) -> str:
    return f"{number:,}"


def small(number: float) -> str:
    """A log-probability: two digits that mean something."""
    return "0" if abs(number) < 1e-6 else f"{number:.2g}" if abs(number) < 1 else f"{number:.2f}"


def short(number: float) -> str:
    return f"{number:.4g}"
