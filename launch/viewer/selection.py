"""Which rows a person asked for, and in what order: the state of the list, as it stands in the address.

Example::

    Selection.from_query([("q", "lantern"), ("outcome", "wrong"), ("sort", "-steps")])
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlencode

OUTCOMES = {"success": "solved", "wrong": "not solved", "failed": "failed"}
"""Value in the address -> what it is called: graded as right; a result that is not; no result at all."""


class Sort(NamedTuple):
    """A way to order rows."""

    column: str
    title: str


SORTS = {
    "time": Sort("started_at_s", "time"),
    "score": Sort("reward", "score"),
    "steps": Sort("step_count", "steps"),
    "tools": Sort("tool_calls", "tool calls"),
    "tokens": Sort("completion_tokens", "tokens"),
    "seconds": Sort("duration_s", "duration"),
    "cost": Sort("cost_usd", "cost"),
    "task": Sort("task_id", "task"),
    "sample": Sort("sample_index", "sample"),
}
DEFAULT_SORT = "-time"


class SelectionError(ValueError):
    """An address with a value that cannot be meant; the message names it and what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """All of its fields must hold; within one field any value may."""

    q: str = ""
    """Words: see `launch.viewer.word_query`."""
    task: str = ""
    """A part of the task's id."""
    outcome: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    policy: tuple[str, ...] = ()
    ledger: tuple[str, ...] = ()
    """Numbers, in the order of the command line."""
    failure: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    steps_min: int | None = None
    steps_max: int | None = None
    score_min: float | None = None
    score_max: float | None = None
    sort: str = DEFAULT_SORT
    """A key of `SORTS`, with "-" in front for the largest first."""

    @property
    def order(self) -> Sort:
        return SORTS[self.sort.lstrip("-")]

    @property
    def descending(self) -> bool:
        return self.sort.startswith("-")

    @property
    def filtered(self) -> bool:
        """Anything is left out."""
        return replace(self, sort=DEFAULT_SORT) != Selection()

    @classmethod
    def from_query(cls, pairs: Iterable[tuple[str, str]]) -> Selection:
        """Names that it does not know are left alone. Raises `SelectionError`."""
        values: dict[str, Any] = {}
        for name, value in pairs:
            value = value.strip()
            if not value:
                continue
            if name in FACETS:
                values[name] = (*values.get(name, ()), unquoted(value))
            elif name in _NUMBERS:
                values[name] = _number(name, value)
            elif name in ("q", "task", "sort"):
                values[name] = value
        sort = values.get("sort", DEFAULT_SORT)
        if sort.removeprefix("-") not in SORTS:
            raise SelectionError(f"sort={sort!r}: use one of {', '.join(SORTS)}, with - in front for the largest first")
        for each in values.get("outcome", ()):
            if each not in OUTCOMES:
                raise SelectionError(f"outcome={each!r}: use one of {', '.join(OUTCOMES)}")
        for each in values.get("ledger", ()):
            if not (each.isascii() and each.isdigit()):
                raise SelectionError(f"ledger={each!r}: use the number of a ledger, from 0 on")
        return cls(**values)

    def pairs(self, **changed: Any) -> list[tuple[str, str]]:
        """As it stands in an address, defaults left out."""
        mine = replace(self, **changed) if changed else self
        found: list[tuple[str, str]] = []
        for each in fields(Selection):
            value = getattr(mine, each.name)
            if isinstance(value, tuple):
                found += [(each.name, quoted(item)) for item in value]
            elif value != each.default:
                found.append((each.name, f"{value:g}" if isinstance(value, float) else str(value)))
        return found

    def query(self, **changed: Any) -> str:
        """`?...`, or "" when there is nothing to say."""
        encoded = urlencode(self.pairs(**changed))
        return f"?{encoded}" if encoded else ""


def quoted(value: str) -> str:
    """A facet's value as it may stand in a form: one with signs that a browser would change is spelled out."""
    plain = value.isprintable() and value == value.strip() and not value.startswith("~")
    return value if plain else f"~{quote(value, safe='')}"


def unquoted(value: str) -> str:
    """What `quoted` was given."""
    return unquote(value[1:]) if value.startswith("~") else value


FACETS = ("outcome", "kind", "policy", "ledger", "failure", "stop")
_NUMBERS = {"steps_min": int, "steps_max": int, "score_min": float, "score_max": float}


def _number(name: str, value: str) -> int | float:
    try:
        found = _NUMBERS[name](value)
        if not math.isfinite(found) or abs(found) > 2**31 - 1:
            raise ValueError
        return found
    except ValueError:
        what = "a whole number" if _NUMBERS[name] is int else "a number"
        raise SelectionError(f"{name}={value!r}: use {what}") from None
