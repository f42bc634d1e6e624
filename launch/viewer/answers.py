"""What a catalog answers with: rows, pages of them, how far the index is. Plain data; it asks nothing.

Example::

    found.rows[0].question, found.total, found.facets["outcome"]     # "How many crates ...", 12, [("wrong", 12)]
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the list shows of a trajectory."""

    number: int
    identity: str
    """16 hexadecimal digits, the same as long as the ledger lies where it does."""
    ledger: int
    key: str
    task_id: str
    kind: str
    policy: str
    weights_version: str
    sample_index: int
    reward: float
    success: bool
    failed: bool
    stop_reason: str
    failure_class: str | None
    started_at_s: float
    duration_s: float
    trainable: bool
    step_count: int
    tool_calls: int
    completion_tokens: int
    cost_usd: float
    question: str
    """Its beginning, as are those below."""
    answer: str
    prediction: str | None
    failure: str | None

    @property
    def outcome(self) -> str:
        return "failed" if self.failed else "success" if self.success else "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A page of rows, and what there is of the whole."""

    rows: list[Row]
    total: int
    """Rows of the selection."""
    all_rows: int
    facets: dict[str, list[tuple[str, int]]]
    """Facet -> (value, rows it has when the facet itself filters nothing), the most frequent first."""
    after: str | None
    """Where the next page begins; None: this is the last."""
    before: str | None
    solved: int = 0
    """Of `total`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the index is."""

    rows: int
    words: int
    """Rows whose text is in the index."""
    unread_shards: int
    version: int
    """Goes up whenever rows come or go."""
    problems: tuple[str, ...] = ()
    reading: bool = False


class NotThere(LookupError):
    """No such trajectory in these ledgers."""
