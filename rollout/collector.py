"""Collection on Ray: which episodes are missing, and the workers that run them, which may come and go.

`missing_requests` compares the tasks with the ledger, so that a collection that is run again does only what is missing.
`Collection` is one of them, seen from the driver: start it, poll it. A worker that dies gives back what it held, and
begins again when Ray has started it anew; `add` brings in another one, `drain` lets one go. What hands out the episodes
(`rollout.feed_actor`) is made again from the ledger when it is lost.

Example::

    actors = start_rollout_actors(spec, count=1)
    requests, found = missing_requests(tasks, policy=spec.policy_name, settings=settings, ledger=Ledger(folder))
    collection = Collection(actors, hosts, requests, found=found, settings=settings, ledger=folder, queue=queue)
    while not collection.poll(timeout_s=0.5):
        print(collection.progress())
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.base import Task
from envs.local_envs import LocalEnvs
from rollout.episode import EpisodeSettings
from rollout.feed_actor import ANSWER_S, is_dead
from rollout.feed_link import FeedLink, error_words
from rollout.ledger import Ledger
from rollout.policy import PolicyError
from rollout.rollout_actor import (
    EnvSlots,
    RolloutActor,
    policy_groups,
    start_rollout_actors,
    stop_rollout_actors,
)
from rollout.task_feed import CollectionError, CollectProgress, EpisodeRequest
from rollout.weight_loading import Weights

__all__ = [
    "Collection", "CollectionError", "EnvSlots", "RolloutActor", "Weights", "missing_requests", "policy_groups",
    "start_rollout_actors", "stop_rollout_actors",
]  # fmt: skip

BARREN_STARTS = 3
"""So many times in a row may a worker die without having recorded anything; more often it will not work at all."""
RESTART_S = 300.0
"""How long too few workers are waited for: Ray may take its time to start one again, a cluster to bring a node."""
TELL_S = 30.0
"""A worker that stays away for longer is told of."""
SHORT_S = 10.0
"""When there are too few for longer, that is told."""
FINAL_S = 10.0
"""Workers that have not begun when all is recorded are waited for so long."""
RECORDING_S = 3.0
"""A worker that was recording when it was lost is given so long, should it live."""
_AGAIN_S = 0.3


def missing_requests(
    tasks: Sequence[Task], *, policy: str, settings: EpisodeSettings, ledger: Ledger, samples: int = 1
) -> tuple[list[EpisodeRequest], int]:
    """The episodes of `tasks` x `samples` that the ledger does not hold yet, and how many it does hold."""
    recorded = ledger.keys()
    requests = [
        EpisodeRequest(key=settings.key(task, policy, sample), task=task, sample_index=sample)
        for sample in range(samples)
        for task in tasks
    ]
    missing = [request for request in requests if request.key not in recorded]
    return missing, len(requests) - len(missing)


@dataclass(slots=True)
class _Worker:
    """One worker of a collection: it runs, has ended (both None), or is away."""

    number: int
    actor: Any
    envs: EnvSlots | LocalEnvs
    leave: Callable[[bool], None] | None = None
    """What else ends with it; told whether it could not work. None: one that was there from the start."""
    name: str = ""
    """Of its present run."""
    run: Any = None
    """The call that runs it."""
    back: Any = None
    """A call that it answers once it is there again."""
    away_s: float | None = None
    """Since when it has been away."""
    ask_again_s: float = 0.0
    told: bool = False
    barren: int = 0
    proven: bool = False
    """It has recorded something."""
    drained_by_s: float | None = None
    returns: bool = False
    """What it was drained for ends with its node: it comes back on another one."""


class Collection:
    """One running collection; a plain object of the driver.

    `hosts`: env host actors that all workers share (`envs.pool`), or envs that each worker has in its own process.
    `concurrency`: episodes at a time of each worker, at most; `adaptive` lets an engine that is full have fewer.
    `feed_options`: of the Ray actor that hands out the episodes. `least`: with fewer workers it waits for `RESTART_S`,
    then ends. `say` is told who comes and goes.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        hosts: Sequence[Any] | LocalEnvs,
        requests: Sequence[EpisodeRequest],
        *,
        found: int = 0,
        settings: EpisodeSettings,
        ledger: Path | str,
        queue: Any = None,
        weights: Weights | None = None,
        concurrency: int = 32,
        adaptive: bool = True,
        can_preview: bool = True,
        env_timeout_s: float = 60.0,
        feed_options: Mapping[str, Any] | None = None,
        least: int = 1,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._settings = settings
        self._hosts = hosts if isinstance(hosts, LocalEnvs) else tuple(hosts)
        self._ledger, self._queue, self._weights, self._adaptive = ledger, queue, weights, adaptive
        self._can_preview, self._env_timeout_s, self._concurrency = can_preview, env_timeout_s, concurrency
        self._least, self.say = least, say
        self.awaits_more = False
        """Somebody adds workers in place of those that are gone for good (`launch.fleet`)."""
        self._workers: list[_Worker] = []
        self._link = FeedLink(
            requests, found=found, ledger=ledger, options=feed_options, say=lambda line: self.say(line),
            running=lambda: [each.name for each in self._workers if each.run is not None],
        )  # fmt: skip
        self._numbers, self._slots = itertools.count(), itertools.count()
        self._short_s: float | None = None
        """Since when there are fewer than `least`."""
        self._short_told = False
        self._all_recorded_s: float | None = None
        for actor in actors:
            self._enter(actor, None, None)

    # -- who works

    @property
    def actors(self) -> list[Any]:
        """Those that work here, or will again: not what is drained or gone for good."""
        return [each.actor for each in self._workers if each.drained_by_s is None or each.returns]

    def add(self, actor: Any, hosts: Sequence[Any] = (), leave: Callable[[bool], None] = lambda broken: None) -> int:
        """One more, which is given work at once; returns its number. `hosts`: env hosts of its own. When it leaves, the
        actor is ended, its reservation is given back, and `leave` called: with True when it could not work."""
        return self._enter(actor, hosts or None, leave)

    def drain(self, actor: Any, seconds: float, *, returns: bool = False) -> int:
        """It begins nothing more, what it has not begun goes to others at once, what runs has `seconds` to end and be
        recorded; the rest is begun again by others. Then it leaves; with `returns` Ray starts it again elsewhere, and
        it goes on there. Returns how many episodes it has under way or not begun."""
        worker = next(each for each in self._workers if each.actor == actor)
        held = self._link.seen.leased.get(worker.name, 0)
        worker.drained_by_s, worker.returns = time.monotonic() + seconds, returns
        if worker.run is None and worker.away_s is None:
            self._drained(worker)
        elif worker.run is not None:
            to_record_s = min(5.0, seconds / 4)
            worker.actor.drain.remote(worker.name, seconds - to_record_s)
        elif not returns:
            self._remove(worker, "is away and not waited for")
        return held

    def leaves(self, actor: Any) -> bool:
        """Whether it is being drained, or away."""
        return all(each.actor != actor for each in self._present())

    def drop(self, actor: Any) -> None:
        """It is gone with its node, and does not come back: what it held goes to others."""
        worker = next(each for each in self._workers if each.actor == actor)
        back = self._released(worker)[1] if worker.run is not None else 0
        worker.run = worker.back = None
        self._remove(worker, f"is gone{', ' + _episodes(back) + ' given to others' if back else ''}")

    # -- its life

    def poll(self, timeout_s: float = 0.0) -> bool:
        """True when every episode is recorded, or the feed was stopped (`progress().stopped` says why).

        Raises `CollectionError` when too few workers are left for too long, one fails in a way that would only repeat,
        or the one that there is dies again and again.
        """
        import ray

        self._call_back()
        waiting = [call for each in self._workers for call in (each.run, each.back) if call is not None]
        waiting += [self._link.beat] if self._link.beat is not None else []
        if waiting:
            ready = set(ray.wait(waiting, num_returns=1, timeout=timeout_s)[0])
        else:
            ready = set()
            time.sleep(min(timeout_s, _AGAIN_S))
        for worker in list(self._workers):
            if worker.run in ready:
                self._ended(worker)
            elif worker.back in ready:
                self._came_back(worker)
        self._link.listen(answered=self._link.beat in ready)
        self._end_late_drains()
        self._check_number()
        return self._over()

    def progress(self, timeout_s: float = ANSWER_S) -> CollectProgress:
        """Waits for a feed that is started again. Raises `TimeoutError`."""
        try:
            return self._link.progress(timeout_s)
        except CollectionError as error:
            raise TimeoutError(str(error)) from error

    @property
    def waiting(self) -> int:
        """Episodes that nobody has begun, as last heard."""
        return self._link.seen.waiting

    def stop(self, reason: str) -> None:
        """Start nothing more. What is under way comes to its end, and `poll` then says so."""
        self._link.stop(reason)

    def close(self) -> None:
        """Frees the feed; the actors stay for the next collection."""
        self._link.close()

    # -- workers

    def _enter(self, actor: Any, hosts: Sequence[Any] | None, leave: Callable[[bool], None] | None) -> int:
        worker = _Worker(next(self._numbers), actor, self._env_slots(hosts), leave)
        self._workers.append(worker)
        self._start(worker)
        return worker.number

    def _start(self, worker: _Worker) -> None:
        worker.name = f"w{worker.number}-{uuid.uuid4().hex[:8]}"
        worker.back = worker.away_s = worker.drained_by_s = None
        worker.told = worker.returns = False
        worker.run = worker.actor.run.remote(
            worker.name, worker.envs, self._settings, self._link.handle, str(self._ledger), self._queue, self._weights,
            self._adaptive,
        )  # fmt: skip

    def _env_slots(self, hosts: Sequence[Any] | None) -> EnvSlots | LocalEnvs:
        if isinstance(self._hosts, LocalEnvs):
            return dataclasses.replace(self._hosts, count=self._concurrency)
        among = tuple(hosts) if hosts is not None else self._hosts
        slots = tuple((n % len(among), n) for n in itertools.islice(self._slots, self._concurrency))
        return EnvSlots(among, slots, self._can_preview, self._env_timeout_s)

    def _ended(self, worker: _Worker) -> None:
        """Its run has."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        call, worker.run = worker.run, None
        try:
            ray.get(call)
        except RayTaskError as error:
            if not self._may_work_again(worker, error.cause):
                if worker.leave is None or not self._others(worker):
                    raise CollectionError(f"rollout worker {worker.number}: {error_words(error.cause)}") from error
                self._released(worker)
                self._remove(worker, f"cannot work: {error_words(error.cause)}", broken=True)
                return
            ray.kill(worker.actor, no_restart=False)  # what an engine leaves behind ends with its process
            self._died(worker, error.cause)
        except RayError as error:  # its process died, its node is lost, or it finds no place
            self._died(worker, error)
        else:
            self._link.ask("release", worker.name)
            if worker.drained_by_s is not None:
                self._drained(worker)

    def _may_work_again(self, worker: _Worker, error: BaseException) -> bool:
        """Its engine died; or could not be loaded again, though it had worked before: then it is not its settings."""
        return isinstance(error, PolicyError) and (error.ends_collection or worker.proven)

    def _released(self, worker: _Worker) -> tuple[int, int]:
        """(episodes that it recorded, episodes that went back); what it had recorded but not reported is not run
        again. It may live on where nobody sees it: from now on it records nothing."""
        if self._link.ask("retire", worker.name):
            time.sleep(RECORDING_S)
        return self._link.ask("release", worker.name, list(Ledger(self._ledger).keys()))

    def _died(self, worker: _Worker, error: Exception) -> None:
        recorded, back = self._released(worker)
        worker.proven = worker.proven or bool(recorded)
        worker.barren = 0 if recorded else worker.barren + 1
        if worker.barren > BARREN_STARTS:
            why = f"died {worker.barren} times in a row without recording anything; the last time: {error_words(error)}"
            if not self._others(worker):
                raise CollectionError(f"rollout worker {worker.number} {why}") from error
            self._remove(worker, why, broken=True)
            return
        given = f": {_episodes(back)} given to others" if back else ""
        self.say(f"rollout worker {worker.number} died{given}")
        if worker.drained_by_s is not None:
            self._drained(worker)
        else:
            self._away(worker)

    def _drained(self, worker: _Worker) -> None:
        import ray

        if worker.returns:
            ray.kill(worker.actor, no_restart=False)
            self._away(worker)
        else:
            self._remove(worker, "is drained")

    def _away(self, worker: _Worker) -> None:
        worker.away_s = worker.away_s or time.monotonic()
        worker.drained_by_s, worker.ask_again_s = None, time.monotonic()

    def _remove(self, worker: _Worker, why: str, *, broken: bool = False) -> None:
        """For good."""
        self._workers.remove(worker)
        stop_rollout_actors([worker.actor])
        if worker.leave is not None:
            worker.leave(broken)
        self.say(f"rollout worker {worker.number} {why}: {len(self._workers)} left")

    def _call_back(self) -> None:
        for worker in self._workers:
            if worker.away_s is not None and worker.back is None and time.monotonic() >= worker.ask_again_s:
                worker.back = worker.actor.pid.remote()

    def _came_back(self, worker: _Worker) -> None:
        import ray
        from ray.exceptions import ActorUnavailableError, RayError

        call, worker.back = worker.back, None
        try:
            ray.get(call)
        except RayError as error:
            # Its process is not there yet, or the call still met the one that was ended.
            if isinstance(error, ActorUnavailableError) or not is_dead(worker.actor):
                worker.ask_again_s = time.monotonic() + _AGAIN_S
                return
            if not self._others(worker) and not self.awaits_more:
                raise CollectionError(
                    f"rollout worker {worker.number} cannot be started again: {error_words(error)}"
                ) from error
            self._remove(worker, "is gone for good")
        else:
            if worker.told:
                self.say(f"rollout worker {worker.number} is back")
            self._start(worker)

    def _others(self, worker: _Worker) -> bool:
        """Whether enough work without it."""
        return len([each for each in self._present() if each is not worker]) >= self._least

    def _present(self) -> list[_Worker]:
        return [each for each in self._workers if each.away_s is None and each.drained_by_s is None]

    def _end_late_drains(self) -> None:
        import ray

        for worker in self._workers:
            late = worker.drained_by_s is not None and time.monotonic() > worker.drained_by_s + _AGAIN_S
            if late and worker.run is not None:  # the call fails, and it is taken for dead
                ray.kill(worker.actor, no_restart=not worker.returns)
                worker.drained_by_s = float("inf")

    def _check_number(self) -> None:
        """Raises `CollectionError` when there have been too few for too long."""
        now_s = time.monotonic()
        away = [each for each in self._workers if each.away_s is not None]
        present = len(self._present())
        if present >= self._least or self._link.nothing_left:
            self._short_s = None
            for each in away:
                if not each.told and now_s - (each.away_s or now_s) > TELL_S:
                    each.told = True
                    self.say(f"rollout worker {each.number} stays away: {present} go on without it")
            return
        if self._short_s is None:
            self._short_s, self._short_told = now_s, False
        if not self._short_told and now_s - self._short_s > SHORT_S:
            self._short_told = True
            self.say(f"{present} rollout workers are left: waiting {RESTART_S - SHORT_S:.0f} s at most for one to come")
        if now_s - self._short_s > RESTART_S:
            who = ", ".join(str(each.number) for each in away)
            if present == 0 and len(away) == 1:
                raise CollectionError(f"rollout worker {who} died and did not come back within {RESTART_S:g} s")
            raise CollectionError(
                f"{present} rollout workers are left, at least {self._least} are wanted (rollout.min_workers), and "
                f"none came within {RESTART_S:g} s" + (f"; away: {who}" if who else "")
            )

    def _over(self) -> bool:
        running = [each for each in self._workers if each.run is not None]
        if running:
            return self._only_latecomers(running)
        if self._link.progress().stopped or self._link.nothing_left:
            return True
        for worker in self._present():  # something came back when they had ended
            self._start(worker)
        return False

    def _only_latecomers(self, running: Sequence[_Worker]) -> bool:
        """Whether all is recorded, and those that run have not even begun: their process or engine is not there."""
        if not self._link.nothing_left or any(each.name in self._link.seen.workers for each in running):
            self._all_recorded_s = None
            return False
        self._all_recorded_s = self._all_recorded_s or time.monotonic()
        return time.monotonic() - self._all_recorded_s > FINAL_S


def _episodes(count: int) -> str:
    return f"{count} episode{'s' if count != 1 else ''}"
