"""The workers of a job while nodes come and go: `Fleet` of one collection, `Fleets` of all that a job runs.

A job begins with `rollout.workers`. From then on, looked at about once a second from its polling loop:

- **a node joins** and has room for another worker: it is started there, up to `rollout.max_workers`. Where nodes are
  added when they are asked for, what is wanted stays asked for as pending placement groups: autoscalers see those;
- **a node is to go** (a spot instance on notice): its workers begin nothing more, end what they can in the time that is
  left, and give the rest to others;
- **a node is lost**: those that were there from the start come back where Ray finds room for them; those that joined
  later are given up with their node, and others are asked for.

Nothing here waits. What a worker needs beside its own place, such as env hosts, is in the groups too.

Example::

    fleets = Fleets([Fleet(collection, groups=groups, most=4, grow=start_one, grows=False)], say=view.say)
    while not collection.poll(0.5):
        fleets.look()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.collector import Collection
from rollout.node_watch import Cluster, NodeWatch, node_of
from rollout.placement import PlacementError, Reservation, Wish
from rollout.placement_fit import Group, assign, matches

STALE_S = 20.0
"""Room that was there and is not given for so long has gone to somebody else; it is asked for again when it is seen."""
BARREN = 3
"""So many in a row may join and be unable to work; more would be too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomer:
    """A worker that was started for a fleet."""

    actor: Any
    hosts: Sequence[Any] = ()
    """Env hosts of its own."""
    leave: Callable[[], None] = lambda: None
    """What ends with it."""


Grow = Callable[[Sequence[Reservation], str], Newcomer]
"""Starts a worker in these places; where it takes nothing that could be reserved, on the node with that key."""


class Fleet:
    """The workers of `collection`.

    `groups`: what one more worker is placed by, itself first; `most`: that many workers in all, at most; `grow` starts
    one; `grows`: nodes are added when they are asked for; `kept`: room that others of this job will want; `hosts`: env
    hosts that all workers share.
    """

    def __init__(
        self,
        collection: Collection,
        *,
        groups: Sequence[Group] = (),
        most: int = 0,
        grow: Grow | None = None,
        grows: bool = False,
        kept: Callable[[], Sequence[Group]] = lambda: (),
        hosts: Sequence[Any] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._hosts = list(hosts)
        self.collection, self._groups, self._most, self._grow = collection, list(groups), most, grow
        self._grows, self._kept, self._say = grows, kept, say
        self._joined: dict[Any, str] = {}
        """Worker that came later -> key of its node; "" until it is known."""
        self._barren = 0
        self._wishes: list[tuple[Wish, str]] = []
        """What is asked for, and the key of the node that it is meant for, if any."""
        collection.awaits_more = grow is not None and most > 0

    def follow(self, cluster: Cluster) -> None:
        """Act on what became of the nodes. Raises what the collection raises."""
        self._drain(cluster)
        self._drop_lost(cluster)
        if self.collection.waiting:
            self._take(cluster)
            self._wish(cluster)
        else:  # one more would find nothing to do
            self.close()

    def close(self) -> None:
        """Ask for nothing more."""
        for wish, _ in self._wishes:
            wish.cancel()
        self._wishes.clear()

    def _drain(self, cluster: Cluster) -> None:
        if not cluster.draining:
            return
        for actor in self.collection.actors:
            seconds = cluster.draining.get(node_of(actor))
            if seconds is None or self.collection.leaves(actor):
                continue
            held = self.collection.drain(actor, seconds, returns=actor not in self._joined)
            where = cluster.name_of(node_of(actor))
            self._say(f"a worker on node {where} drains, {seconds:.0f} s at most: {held} episodes under way or waiting")
        leaving = [host for host in self._hosts if node_of(host) in cluster.draining]
        if len(leaving) < len(self._hosts):
            for host in leaving:
                host.leave.remote()

    def _drop_lost(self, cluster: Cluster) -> None:
        alive = {node.key for node in cluster.nodes}
        for actor, key in list(self._joined.items()):
            if actor not in self.collection.actors:
                continue
            if not key:
                self._joined[actor] = node_of(actor)
            elif key not in alive:
                self.collection.drop(actor)

    def _take(self, cluster: Cluster) -> None:
        """Start those that have a place now."""
        for each in list(self._wishes):
            wish, key = each
            try:
                places = wish.take()
            except PlacementError:
                places = None
                wish.cancel()
                self._wishes.remove(each)
            if places is not None:
                self._wishes.remove(each)
                self._start(places, key, cluster)
            elif not self._grows and wish.age_s > STALE_S and each in self._wishes:
                wish.cancel()
                self._wishes.remove(each)

    def _start(self, places: Sequence[Reservation], key: str, cluster: Cluster) -> None:
        assert self._grow is not None
        new = self._grow(places, key)

        def leave(broken: bool) -> None:
            new.leave()
            self._joined.pop(new.actor, None)
            self._barren = self._barren + 1 if broken else 0
            if self._barren == BARREN:
                self._say(f"{BARREN} workers in a row joined and could not work: no more are started")

        self._joined[new.actor] = key
        self.collection.add(new.actor, new.hosts, leave)
        where = f" on node {cluster.name_of(key)}" if key else ""
        self._say(f"1 worker more{where}: {len(self.collection.actors)} in all")

    def _wish(self, cluster: Cluster) -> None:
        """Ask for what is missing, where there is room for it or nodes are added for it."""
        if self._grow is None or self._barren >= BARREN:
            return
        while len(self.collection.actors) + len(self._wishes) < self._most:
            key = ""
            if not self._groups[0].asks:
                key = self._free_node(cluster)
                if not key:
                    return
            elif not self._grows and (self._wishes or not self._fits(cluster)):
                return  # one at a time: how much room is left after it Ray tells a little later
            self._wishes.append((Wish(self._groups), key))

    def _fits(self, cluster: Cluster) -> bool:
        return assign([*self._kept(), *self._groups], cluster.staying, free=True) is not None

    def _free_node(self, cluster: Cluster) -> str:
        """Of workers that take nothing there is one on a node; "" when each has one, or it is not known yet."""
        there = {actor: node_of(actor) for actor in self.collection.actors}
        begin = [actor for actor in there if actor not in self._joined and not self.collection.leaves(actor)]
        if not all(there[actor] for actor in begin):
            return ""
        taken = {*there.values(), *self._joined.values(), *(key for _, key in self._wishes)}
        for node in cluster.staying:
            if node.key not in taken and node.total.get("CPU") and matches(node.labels, self._groups[0].labels):
                return node.key
        return ""


class Fleets:
    """All of a job."""

    def __init__(self, fleets: Sequence[Fleet], *, say: Callable[[str], None] = lambda line: None) -> None:
        self._fleets, self._watch = list(fleets), NodeWatch(say)

    def look(self) -> None:
        """From the polling loop, as often as it likes. Raises what collections raise."""
        cluster = self._watch.look()
        if cluster is not None:
            for fleet in self._fleets:
                fleet.follow(cluster)

    def end(self, collection: Collection) -> None:
        """It is over: nobody joins it any more."""
        for fleet in [each for each in self._fleets if each.collection is collection]:
            fleet.close()
            self._fleets.remove(fleet)

    def draining(self) -> Mapping[str, float]:
        """Key of each node that is to go -> seconds that it had left at the last look."""
        return self._watch.cluster.draining if self._watch.cluster is not None else {}

    def close(self) -> None:
        for fleet in self._fleets:
            fleet.close()
