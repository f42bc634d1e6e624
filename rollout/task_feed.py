"""`TaskFeed`: hands out what is still to be rolled out, as workers ask for it, and knows who holds what.

Workers pull, so nobody waits for a straggler. What a worker holds is a lease: it ends when the worker reports the
episode as recorded, and goes back to the front of the line when the worker dies or gives it back. When nothing works
any more (a budget is used up, an engine fails for everybody) the feed is stopped: what was not started stays for a
later run.

A feed that is made again, since the first one was lost, waits until the workers that live have told what they hold
(`join`), so that nobody begins what another has under way. A plain class; `rollout.feed_actor` makes it an actor.

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


class CollectionError(RuntimeError):
    """A collection that cannot go on; the message names what is missing."""


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
    waiting: int = 0
    """Leased to nobody, and not recorded."""
    leased: dict[str, int] = field(default_factory=dict)
    """Worker -> how many."""
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
JOIN_S = 20.0
"""So long a feed that was made again waits for the workers of the first one."""


class NotJoinedError(RuntimeError):
    """The feed was made again, and does not know what this worker holds: it has to `join` first."""


class TaskFeed:
    """`requests` in the order in which they should be started.

    One that is made again: `recorded` by the workers of the first, `awaited` are those of them that may still live.
    """

    def __init__(
        self,
        requests: Iterable[EpisodeRequest],
        *,
        found: int = 0,
        recorded: Iterable[EpisodeSummary] = (),
        awaited: Iterable[str] = (),
        join_s: float = JOIN_S,
    ) -> None:
        self._waiting = deque(requests)
        self._leases: dict[str, dict[str, EpisodeRequest]] = {}
        self._seen: set[str] = set()
        self._released: set[str] = set()
        self._recording: set[str] = set()
        self._absent = set(awaited)
        self._join_by_s = time.monotonic() + join_s
        self._progress = CollectProgress(total=found + len(self._waiting), found=found)
        self._kinds: Counter[str] = Counter()
        self._kind_successes: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._recorded_by: Counter[str] = Counter()
        self._engine_failures = 0
        self._started = time.monotonic()
        earlier = list(recorded)
        self._progress.total += len(earlier)
        self.done("", earlier)
        self._engine_failures, self._progress.stopped = 0, ""

    def next(self, worker: str, count: int) -> list[EpisodeRequest] | None:
        """Up to `count` requests, now leased to `worker`; None when there is nothing left for anybody to start or
        finish, or the feed was stopped.

        An empty list means: nothing now, but another worker may still give something back. Raises `NotJoinedError`.
        """
        self._check_joined(worker)
        if self._progress.stopped or worker in self._released:
            return None
        if self._absent and time.monotonic() < self._join_by_s:
            return []
        leases = self._leases.setdefault(worker, {})
        given = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        leases.update((request.key, request) for request in given)
        if given or any(held for name, held in self._leases.items() if name != worker):
            return given
        return None

    def done(self, worker: str, summaries: Sequence[EpisodeSummary]) -> None:
        """`worker` has recorded these; a repeated report counts once. Raises `NotJoinedError`."""
        self._check_joined(worker)
        self._recording.discard(worker)
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
        """What `worker` says of itself. Raises `NotJoinedError`."""
        self._check_joined(worker)
        if worker not in self._released:
            self._progress.workers[worker] = state

    def join(self, worker: str, keys: Iterable[str]) -> list[str]:
        """`worker` holds exactly these, and takes them along. Returns those that it may not have: others have them, or
        have recorded them."""
        wanted = set(keys)
        self._absent.discard(worker)
        if worker in self._released:
            return sorted(wanted)
        held = self._leases.pop(worker, {})
        self._waiting.extendleft(reversed([each for key, each in held.items() if key not in wanted]))
        mine = {key: each for key, each in held.items() if key in wanted}
        if wanted - mine.keys():
            mine |= {each.key: each for each in self._waiting if each.key in wanted}
            self._waiting = deque(each for each in self._waiting if each.key not in mine)
        self._leases[worker] = mine
        return sorted(wanted - mine.keys())

    def may_record(self, worker: str, keys: Iterable[str]) -> list[str]:
        """`worker` is about to record these; returns those that it must not, since it does not hold them: it was taken
        for dead, and others have them. Until `done` it counts as recording. Raises `NotJoinedError`."""
        self._check_joined(worker)
        held = {} if worker in self._released else self._leases.get(worker, {})
        refused = [key for key in keys if key not in held]
        self._recording.add(worker)
        return refused

    def retire(self, worker: str) -> bool:
        """`worker` is dead, or taken for it: it gets nothing more and may record nothing more. Returns whether it was
        recording something, which may be in the ledger a moment later."""
        self._released.add(worker)
        return worker in self._recording

    def give_back(self, worker: str, keys: Iterable[str]) -> None:
        """`worker` will not run these: they go to the front of the line. Raises `NotJoinedError`."""
        self._check_joined(worker)
        held = self._leases.get(worker, {})
        self._waiting.extendleft(reversed([held.pop(key) for key in keys if key in held]))

    def held(self, worker: str) -> int:
        """How many episodes are leased to it."""
        return len(self._leases.get(worker, {}))

    def stop(self, reason: str) -> None:
        """Hand out nothing more; the first reason is kept."""
        self._progress.stopped = self._progress.stopped or reason

    def release(self, worker: str, recorded_keys: Iterable[str] = ()) -> int:
        """`worker` is dead or gives up: what it held and had not recorded goes back to the front. Returns how many
        episodes it had recorded."""
        recorded = set(recorded_keys)
        self._released.add(worker)
        self._absent.discard(worker)
        self._recording.discard(worker)
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
        progress.leased = {worker: len(held) for worker, held in self._leases.items() if held}
        progress.running, progress.waiting = sum(progress.leased.values()), len(self._waiting)
        progress.elapsed_s = time.monotonic() - self._started
        progress.failures = dict(self._failures)
        progress.by_kind = {kind: (count, self._kind_successes[kind]) for kind, count in sorted(self._kinds.items())}
        return progress

    def _check_joined(self, worker: str) -> None:
        if worker in self._absent:
            raise NotJoinedError(f"{worker} has to tell what it holds")

    def _watch_engine(self, summary: EpisodeSummary) -> None:
        failed = summary.failure_class is FailureClass.ENGINE
        self._engine_failures = self._engine_failures + 1 if failed else 0
        if self._engine_failures >= ENGINE_FAILURES_IN_A_ROW:
            self.stop(f"{self._engine_failures} episodes in a row got no answer, the last: {summary.failure_message}")
