"""`TaskFeed`: hands out what is still to be rolled out, as workers ask for it, and knows who holds what.

Workers pull, so nobody waits for a straggler. What a worker holds is a lease: it ends when the worker reports the
episode as recorded, and goes back to the front of the line when the worker dies or gives it back. When nothing works
any more (a budget is used up, an engine fails for everybody) the feed is stopped: what was not started stays for a
later run. A plain class; `rollout.collector` makes it an actor.

Example::

    feed = TaskFeed(requests, found=120)
    leased = feed.next("w0", 16)            # at most 16; [] means: nothing now; None: the end
    feed.done("w0", [summary])
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from envs.base import Task
from rollout.trajectory import FailureClass


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
    failure_class: FailureClass | None = None
    failure_message: str = ""
    prompt_tokens: int = 0
    cost_usd: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """What a worker says of itself, now and then."""

    running: int = 0
    """Episodes."""
    limit: int = 0
    """Episodes that it lets run at a time: see `rollout.concurrency`."""
    kv_usage: float | None = None
    """Share of the engine's KV cache in use; None where there is none."""
    note: str = ""
    """What it waits for, when that is worth a word ("the ledger's disk is full")."""


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
    """Of those recorded: without a result, kept in the ledger's sidecar."""
    failures: dict[str, int] = field(default_factory=dict)
    """failure class -> how many."""
    last_failure: str = ""
    running: int = 0
    """Leased to workers."""
    steps: int = 0
    completion_tokens: int = 0
    prompt_tokens: int = 0
    tool_calls: int = 0
    cost_usd: float = 0.0
    elapsed_s: float = 0.0
    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)
    """kind -> (recorded, succeeded)."""
    workers: dict[str, WorkerState] = field(default_factory=dict)
    stopped: str = ""
    """Why nothing more is started, when that is not because all is done."""

    @property
    def finished(self) -> int:
        return self.found + self.recorded


ENGINE_FAILURES_IN_A_ROW = 40
"""So many episodes, one after another, without an answer of the engine: it is down, and asking on helps nobody."""


class TaskFeed:
    """`requests` in the order in which they should be started."""

    def __init__(self, requests: Iterable[EpisodeRequest], *, found: int = 0) -> None:
        self._waiting = deque(requests)
        self._leases: dict[str, dict[str, EpisodeRequest]] = {}
        self._seen: set[str] = set()
        self._progress = CollectProgress(total=found + len(self._waiting), found=found)
        self._kinds: Counter[str] = Counter()
        self._kind_successes: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._recorded_by: Counter[str] = Counter()
        self._engine_failures = 0
        self._started = time.monotonic()

    def next(self, worker: str, count: int) -> list[EpisodeRequest] | None:
        """Up to `count` requests, now leased to `worker`; None when there is nothing left for anybody to start or
        finish, or the feed was stopped.

        An empty list means: nothing now, but another worker may still give something back.
        """
        if self._progress.stopped:
            return None
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
            self._recorded_by[worker] += 1
            progress.recorded += 1
            progress.succeeded += summary.success
            progress.failed += summary.failed
            progress.steps += summary.steps
            progress.completion_tokens += summary.completion_tokens
            progress.prompt_tokens += summary.prompt_tokens
            progress.tool_calls += summary.tool_calls
            progress.cost_usd += summary.cost_usd
            self._kinds[summary.kind] += 1
            self._kind_successes[summary.kind] += summary.success
            if summary.failure_class is not None:
                self._failures[summary.failure_class.value] += 1
                progress.last_failure = summary.failure_message
            self._watch_engine(summary)

    def report(self, worker: str, state: WorkerState) -> None:
        """What `worker` says of itself."""
        self._progress.workers[worker] = state

    def stop(self, reason: str) -> None:
        """Hand out nothing more; the first reason is kept."""
        self._progress.stopped = self._progress.stopped or reason

    def release(self, worker: str, recorded_keys: Iterable[str] = ()) -> int:
        """`worker` is dead or gives up: what it held and had not recorded goes back to the front. Returns how many
        episodes it had recorded."""
        recorded = set(recorded_keys)
        held = self._leases.pop(worker, {})
        self._progress.workers.pop(worker, None)
        for key in held.keys() & recorded - self._seen:  # it died between recording and reporting
            self._seen.add(key)
            self._recorded_by[worker] += 1
            self._progress.recorded += 1
        self._waiting.extendleft(reversed([request for request in held.values() if request.key not in recorded]))
        return self._recorded_by[worker]

    def progress(self) -> CollectProgress:
        progress = self._progress
        progress.running = sum(len(held) for held in self._leases.values())
        progress.elapsed_s = time.monotonic() - self._started
        progress.failures = dict(self._failures)
        progress.by_kind = {kind: (count, self._kind_successes[kind]) for kind, count in sorted(self._kinds.items())}
        return progress

    def _watch_engine(self, summary: EpisodeSummary) -> None:
        failed = summary.failure_class is FailureClass.ENGINE
        self._engine_failures = self._engine_failures + 1 if failed else 0
        if self._engine_failures >= ENGINE_FAILURES_IN_A_ROW:
            self.stop(f"{self._engine_failures} episodes in a row got no answer, the last: {summary.failure_message}")
