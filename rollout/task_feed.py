"""`TaskFeed`: hands out what is still to be rolled out, as workers ask for it, and knows who holds what.

Workers pull, so nobody waits for a straggler. What a worker holds is a lease: it ends when the worker reports the
episode as recorded, and goes back to the front of the line when the worker dies. A plain class; `rollout.collector`
makes it an actor. """

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from envs.base import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRequest:
    """One episode to run."""

    key: str
    task: Task
    sample_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSummary:
    """What a worker reports of a recorded episode."""

    key: str
    kind: str
    success: bool
    stop_reason: str
    failed: bool
    steps: int
    completion_tokens: int
    tool_calls: int


@dataclass(slots=True, kw_only=True)
class CollectProgress:
    """A snapshot for people to look at."""

    total: int = 0
    """Episodes of this collection, those found in the ledger included."""
    found: int = 0
    """Already recorded by an earlier run."""
    recorded: int = 0
    """Recorded by this run."""
    succeeded: int = 0
    failed: int = 0
    """Our own failures (environment, engine), kept in the ledger's sidecar."""
    running: int = 0
    steps: int = 0
    completion_tokens: int = 0
    tool_calls: int = 0
    elapsed_s: float = 0.0
    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)
    """kind -> (recorded, succeeded)."""

    @property
    def finished(self) -> int:
        return self.found + self.recorded


class TaskFeed:
    """`requests` in the order in which they should be started."""

    def __init__(self, requests: Iterable[EpisodeRequest], *, found: int = 0) -> None:
        self._waiting = deque(requests)
        self._leases: dict[str, dict[str, EpisodeRequest]] = {}
        self._seen: set[str] = set()
        self._progress = CollectProgress(total=found + len(self._waiting), found=found)
        self._kinds: Counter[str] = Counter()
        self._kind_successes: Counter[str] = Counter()
        self._started = time.monotonic()

    def next(self, worker: str, count: int) -> list[EpisodeRequest] | None:
        """Up to `count` requests, now leased to `worker`; None when there is nothing left for anybody to start or
        finish.

        An empty list means: nothing now, but another worker may still give something back.
        """
        leases = self._leases.setdefault(worker, {})
        given = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        leases.update((request.key, request) for request in given)
        if given or any(held for name, held in self._leases.items() if name != worker):
            return given
        return None

    def done(self, worker: str, summaries: Sequence[EpisodeSummary]) -> None:
        """`worker` has recorded these; a repeated report counts once."""
        progress = self._progress
        for summary in summaries:
            self._leases.get(worker, {}).pop(summary.key, None)
            if summary.key in self._seen:
                continue
            self._seen.add(summary.key)
            progress.recorded += 1
            progress.succeeded += summary.success
            progress.failed += summary.failed
            progress.steps += summary.steps
            progress.completion_tokens += summary.completion_tokens
            progress.tool_calls += summary.tool_calls
            self._kinds[summary.kind] += 1
            self._kind_successes[summary.kind] += summary.success

    def release(self, worker: str, recorded_keys: Iterable[str] = ()) -> int:
        """`worker` is dead: what it held and had not recorded goes back to the front. Returns how many."""
        recorded = set(recorded_keys)
        held = self._leases.pop(worker, {})
        lost = [request for request in held.values() if request.key not in recorded]
        self._waiting.extendleft(reversed(lost))
        return len(lost)

    def progress(self) -> CollectProgress:
        progress = self._progress
        progress.running = sum(len(held) for held in self._leases.values())
        progress.elapsed_s = time.monotonic() - self._started
        progress.by_kind = {kind: (count, self._kind_successes[kind]) for kind, count in sorted(self._kinds.items())}
        return progress
