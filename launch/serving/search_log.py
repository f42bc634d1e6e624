"""Which passages a step was shown: the searches of all episodes, remembered for as long as a step may take.

A search knows nothing of the episode that it is for: the tools of all envs share one function. So a search belongs to
the steps that were under way when it was made and whose observation holds its result, word for word. One whose result
was not printed, or was cut, belongs to none.

Example::

    log = SearchLog(search, formatter="numbered")
    log("Paris", 2)                                        # what search("Paris", 2) gives
    log.shown("[1] Paris: ...", since_s=began)             # [{"query": "Paris", "hits": [{"id", "title", "score"}]}]
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from envs.retrieval.formatting import get_formatter

_MOST = 1024


class SearchLog:
    """Calls `search(query, k)`, from any thread, and remembers the last results."""

    def __init__(self, search: Callable[[str, int], list[Any]], *, formatter: str) -> None:
        self._search, self._as_text = search, get_formatter(formatter)
        self._made: deque[tuple[float, str, list[Any], str]] = deque(maxlen=_MOST)
        """When (monotonic), the query, its hits, and how they are shown; oldest first."""
        self._lock = threading.Lock()

    def __call__(self, query: str, k: int) -> list[Any]:
        hits = self._search(query, k)
        with self._lock:
            self._made.append((time.monotonic(), query, hits, self._as_text(hits)))
        return hits

    def shown(self, observation: str, *, since_s: float) -> list[dict[str, Any]]:
        """Those that ended after `since_s` (monotonic) and are in `observation`, in the order of time, each query
        once."""
        with self._lock:
            made = [entry for entry in self._made if entry[0] >= since_s]
        found: dict[str, list[Any]] = {}
        for _, query, hits, text in made:
            if hits and text in observation:
                found.setdefault(query, hits)
        return [
            {
                "query": query,
                "hits": [
                    {"id": hit.passage.id, "title": hit.passage.title, "score": round(float(hit.score), 6)}
                    for hit in hits
                ],
            }
            for query, hits in found.items()
        ]
