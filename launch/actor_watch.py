"""Sees which of a job's Ray actors die and come back, and which nodes are lost, and tells `launch.events`.

Ray starts actors again without a word, and whoever calls one that is away waits: from the outside nothing has happened.
This asks Ray's own table every `LOOK_S`, in a thread. It looks on; nothing here replaces anything. The table is the one
that `ray.util.state` shows, which itself needs a dashboard; `ray._private.state` is asked here alone.

Example::

    with ActorWatch(events):
        ...                  # events.tell("env host", "an env host is back on 10.0.0.7", away_s=2.9, returned=True)
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from launch.events import EventRecord
from launch.node_record import NodeRecord
from rollout.node_watch import LOOK_S, Cluster, NodeWatch

PARTS = {
    "RolloutActor": ("rollout worker", "a rollout worker"),
    "EnvHost": ("env host", "an env host"),
    "RetrievalActor": ("retrieval", "the retrieval actor"),
    "_BufferActor": ("queue", "the queue"),
    "FeedActor": ("feed", "what hands out the episodes"),
}
"""Class of an actor -> its part's name in events, and what people call it. Learner ranks are the learner's to tell."""


@dataclass(slots=True)
class _Seen:
    """One actor."""

    restarts: int
    away_since_s: float | None = None


class ActorWatch:
    """Watches the actors of this driver's job, and the nodes, from `__enter__` to `__exit__`."""

    def __init__(self, events: EventRecord) -> None:
        self._events, self._record = events, NodeRecord(events.folder)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="actor-watch", daemon=True)
        self._actors: dict[str, _Seen] = {}
        self._nodes = NodeWatch()
        self._node_lost_s: float | None = None

    def __enter__(self) -> ActorWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(2 * LOOK_S + 10)

    def _watch(self) -> None:
        import ray
        from ray._private import state

        job = ray.get_runtime_context().get_job_id()
        while not self._ended.wait(LOOK_S):
            try:
                actors: Any = state.actors()
            except Exception:  # Ray's head is away, or shut down: there is nobody to ask
                continue
            if (cluster := self._nodes.look()) is not None:
                self.look_at_nodes(cluster)
            self.look_at_actors([each for each in actors.values() if each["JobID"] == job])

    def look_at_actors(self, actors: list[dict[str, Any]]) -> None:
        """Against the last look; tells of those that have died since, and of those that are back."""
        now_s = time.monotonic()
        for actor in actors:
            part = PARTS.get(actor["ActorClassName"])
            if part is None:
                continue
            state, restarts = actor["State"], int(actor["NumRestarts"])
            seen = self._actors.setdefault(actor["ActorID"], _Seen(restarts))
            if state == "RESTARTING" and seen.away_since_s is None:  # at once: this job may die before it is back
                seen.away_since_s = now_s
                self._events.tell(part[0], f"{part[1]} died")
            if state == "ALIVE" and seen.away_since_s is not None:
                away_s, seen.restarts, seen.away_since_s = now_s - seen.away_since_s, restarts, None
                self._events.tell(part[0], f"{part[1]} is back on {_where(actor)}", away_s=away_s, returned=True)
            elif state == "ALIVE" and restarts > seen.restarts:
                seen.restarts = restarts
                self._events.tell(part[0], f"{part[1]} died and is back on {_where(actor)}", away_s=LOOK_S)

    def look_at_nodes(self, cluster: Cluster) -> None:
        """What its look found: tells of nodes that are lost, and of those that join; at first of those lost before."""
        now_s = time.monotonic()
        for name in self._record.look(cluster.nodes):
            self._events.tell("node", f"the node {name} was lost as an earlier job ended")
        for node in cluster.lost:
            self._node_lost_s = now_s
            self._events.tell("node", f"the node {cluster.name_of(node.key)} was lost")
        for node in cluster.joined:
            away_s = None if self._node_lost_s is None else now_s - self._node_lost_s
            self._node_lost_s = None
            self._events.tell("node", f"the node {cluster.name_of(node.key)} joined", away_s=away_s, returned=True)


def _where(actor: dict[str, Any]) -> str:
    return actor["Address"]["IPAddress"]
