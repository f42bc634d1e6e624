"""`HttpRetriever`: any server of Search-R1's `/retrieve` protocol as a `Retriever`, and as the search behind a tool.

It repeats what may be well a moment later: statuses 500, 502, 503 and 504, failed connections and timeouts, within one
deadline for the whole call. Anything else is told at once. Every failure is an `EnvError`: ours, never the model's.

Example::

    retriever = HttpRetriever("http://search.internal:8000", timeout_s=30)
    hits = retriever.search(["capital of France"], 3)[0]
    tool = web_search_tool(retriever.search_one, k=3, formatter="paper")

Protocol: see `http_server`.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from envs.base import EnvError
from envs.retrieval.corpus import CorpusError, Passage, passage_from_fields
from envs.retrieval.retriever import Hit, check_k, clean_query, digest

RETRIED_STATUSES = frozenset({500, 502, 503, 504})
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


class HttpRetriever:
    """A `Retriever` that asks `url`, with or without its /retrieve; picklable, and safe for many threads.

    `timeout_s` limits a call with all its repetitions, `attempt_timeout_s` one attempt.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 60.0, attempt_timeout_s: float = 30.0, connections: int = 64
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        if not timeout_s > 0 or not attempt_timeout_s > 0 or connections < 1:
            raise ValueError(
                "timeout_s, attempt_timeout_s and connections must be more than 0, "
                f"got {timeout_s}, {attempt_timeout_s}, {connections}"
            )
        self.url = url.rstrip("/").removesuffix("/retrieve").rstrip("/")
        self.timeout_s, self.attempt_timeout_s, self._connections = timeout_s, attempt_timeout_s, connections
        self.fingerprint = digest({"kind": "http", "url": self.url})
        """Of the address alone: what the server has behind it, its /health says."""
        self._client: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_client", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _client=None, _lock=threading.Lock())

    def __enter__(self) -> HttpRetriever:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`. Raises `EnvError` when the server fails, refuses, or answers something else."""
        check_k(k)
        texts = [clean_query(query) for query in queries]
        asked = [at for at, text in enumerate(texts) if text]
        found: list[list[Hit]] = [[] for _ in texts]
        if asked:
            body = {"queries": [texts[at] for at in asked], "topk": k, "return_scores": True}
            for at, hits in zip(asked, self._hits(self._ask("POST", "/retrieve", body), len(asked), k), strict=True):
                found[at] = hits
        return found

    def search_one(self, query: str, k: int) -> list[Hit]:
        """`search` of one query: what `web_search_tool` takes."""
        if not isinstance(query, str):
            raise TypeError(f"query must be a string, got {type(query).__name__} {query!r}")
        return self.search([query], k)[0]

    def health(self) -> dict[str, Any]:
        """What the server says of itself; not every server of this protocol has a /health. Raises `EnvError`."""
        answer = self._ask("GET", "/health", None)
        if not isinstance(answer, dict):
            raise EnvError(f"{self.url}/health answered {str(answer)[:80]!r}, an object is needed")
        return answer

    def close(self) -> None:
        """Close the connections; a later search opens new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _ask(self, method: str, path: str, body: Any) -> Any:
        import httpx

        deadline = time.monotonic() + self.timeout_s
        attempt, failure = 0, "no attempt"
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise EnvError(f"{self.url}{path}: {failure}; gave up after {attempt} attempts in {self.timeout_s} s")
            attempt += 1
            try:
                limit_s = min(self.attempt_timeout_s, left_s)
                response = self._connected().request(method, self.url + path, json=body, timeout=limit_s)
            except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: another thread has closed the client
                failure = f"{type(error).__name__}: {error}"
            else:
                if response.status_code < 300:
                    try:
                        return response.json()
                    except ValueError as error:
                        raise EnvError(f"{self.url}{path} answered no JSON: {error}") from error
                failure = f"status {response.status_code}: {response.text[:200]}"
                if response.status_code not in RETRIED_STATUSES:
                    raise EnvError(f"{self.url}{path}: {failure}")
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.0)
            time.sleep(max(0.0, min(pause_s, deadline - time.monotonic())))

    def _connected(self) -> Any:
        import httpx

        with self._lock:
            if self._client is None:
                limits = httpx.Limits(
                    max_connections=self._connections, max_keepalive_connections=self._connections, keepalive_expiry=30
                )
                # Reading the certificates takes longer than many searches, and plain http needs none.
                self._client = httpx.Client(limits=limits, verify=self.url.startswith("https://"))
            return self._client

    def _hits(self, answer: Any, queries: int, k: int) -> list[list[Hit]]:
        result = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(result, list) or len(result) != queries or not all(isinstance(of, list) for of in result):
            raise EnvError(f'{self.url}/retrieve: "result" must list {queries} lists, got {str(answer)[:200]!r}')
        return [self._of_query(entries[:k]) for entries in result]

    def _of_query(self, entries: Sequence[Any]) -> list[Hit]:
        hits = []
        for entry in entries:
            try:
                hits.append(Hit(passage=_passage(entry["document"]), score=float(entry["score"])))
            except (KeyError, TypeError, ValueError) as error:  # CorpusError is a ValueError
                raise EnvError(
                    f"{self.url}/retrieve: a document with contents and a score are needed, got {str(entry)[:200]!r} "
                    f"({error})"
                ) from error
        return hits


def _passage(document: Any) -> Passage:
    if not isinstance(document, dict):
        raise CorpusError(f"a document must be an object, got {type(document).__name__}")
    if "id" not in document:  # servers over BM25 dumps leave it out
        text = str(document.get("contents", document.get("text", "")))
        document = {**document, "id": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return passage_from_fields(document)
