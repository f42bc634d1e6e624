"""What every retriever keeps: `Retriever.search(queries, k)` gives for each query at most k `Hit`s, best first.

Orders are deterministic: equal scores are ordered by passage id, and a query's hits do not depend on the queries that
share its batch. A query without a letter or digit finds nothing and is no error, since agents do send such queries.

Example::

    hits = retriever.search(["capital of France"], 3)[0]
    hits[0].passage.title, hits[0].score
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from envs.retrieval.corpus import Passage

MAX_QUERY_CHARS = 4096  # what is longer is a paste, not a query; encoders read some 1,000 characters anyway
_WORD_CHARACTER = re.compile(r"[^\W_]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A passage that was found."""

    passage: Passage
    score: float
    """Larger is better; comparable only within one retriever."""


@runtime_checkable
class Retriever(Protocol):
    """Something that searches; it may be called from several threads at the same moment."""

    fingerprint: str
    """Hex digest of everything that decides the results: corpus, model, settings. Part of every cache key."""

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """At most `k` hits for each query, best first. Raises `ValueError` for k < 1, nothing for odd queries."""
        ...


def clean_query(query: str) -> str:
    """`query` as it is searched: valid Unicode, single spaces, cut at `MAX_QUERY_CHARS`; "" without letter or digit."""
    query = " ".join(query[:MAX_QUERY_CHARS].encode("utf-8", "replace").decode("utf-8").split())
    return query if _WORD_CHARACTER.search(query) else ""


def check_k(k: int) -> None:
    """Raise `ValueError` unless `k` is a whole number of at least 1."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is how many passages to find and must be a whole number of at least 1, got {k!r}")


def digest(facts: dict[str, Any]) -> str:
    """Hex sha256 of JSON-able facts: how fingerprints are made."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
