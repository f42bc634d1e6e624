"""Which nodes a Ray cluster has, and what became of them since the last look: joined, lost, or to be taken away soon.

A node that is to go (a spot instance on notice, one that an autoscaler takes back) is drained in Ray: `ray drain-node`,
which autoscalers call, and a raylet that gets SIGTERM for itself. Ray begins nothing there any more; what runs there
runs until the node is gone. Nothing here acts on it.

Example::

    watch = NodeWatch(say=print)
    if (cluster := watch.look()) is not None:        # None: it was looked at a moment ago
        for node in cluster.joined: ...
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rollout.placement import cluster_nodes
from rollout.placement_fit import Node, words

LOOK_S = 1.0
"""Between two looks."""
NO_DEADLINE_S = 600.0
"""What a node that is drained without a deadline is taken to have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The nodes that live, and what is new."""

    nodes: tuple[Node, ...]
    draining: Mapping[str, float]
    """Key of a node that is to go -> seconds that it has left."""
    joined: tuple[Node, ...] = ()
    """Since the last look; at the first one none."""
    lost: tuple[Node, ...] = ()
    notices: tuple[Node, ...] = ()
    """Those that are to go since the last look."""

    @property
    def staying(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.key not in self.draining)

    def name_of(self, key: str) -> str:
        """For people; several nodes may have one address."""
        names = Counter(node.name for node in (*self.nodes, *self.lost))
        for node in (*self.nodes, *self.lost):
            if node.key == key:
                return node.name if names[node.name] == 1 else f"{node.name} ({key[:6]})"
        return key[:6]


def changed(before: Cluster | None, nodes: Sequence[Node], draining: Mapping[str, float]) -> Cluster:
    """The cluster now, against what it was."""
    now = Cluster(nodes=tuple(nodes), draining={node.key: draining[node.key] for node in nodes if node.key in draining})
    if before is None:
        return replace(now, notices=tuple(node for node in nodes if node.key in draining))
    had, has = {node.key for node in before.nodes}, {node.key for node in nodes}
    return replace(
        now,
        joined=tuple(node for node in nodes if node.key not in had),
        lost=tuple(node for node in before.nodes if node.key not in has),
        notices=tuple(node for node in nodes if node.key in now.draining and node.key not in before.draining),
    )


class NodeWatch:
    """`say` is told of each change."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self._say = say
        self._looked_s = float("-inf")
        self.cluster: Cluster | None = None
        """As it was last seen."""

    def look(self) -> Cluster | None:
        """None within `LOOK_S` of the last look, or where Ray does not tell just now."""
        if time.monotonic() - self._looked_s < LOOK_S:
            return None
        self._looked_s = time.monotonic()
        try:
            self.cluster = changed(self.cluster, cluster_nodes(), draining_nodes())
        except Exception:  # of several kinds: the head is busy or just starting again
            return None
        self._tell(self.cluster)
        return self.cluster

    def _tell(self, cluster: Cluster) -> None:
        for node in cluster.joined:
            self._say(f"node {cluster.name_of(node.key)} joined, with {words(node.total)}")
        for node in cluster.lost:
            self._say(f"node {cluster.name_of(node.key)} is lost")
        for node in cluster.notices:
            self._say(f"node {cluster.name_of(node.key)} is to go in {cluster.draining[node.key]:.0f} s")


def draining_nodes() -> dict[str, float]:
    """Key of each node that is being drained -> seconds that it has left."""
    from ray._private.state import state  # as `ray.train` asks

    now_s = time.time()
    return {
        key: max(0.0, deadline_ms / 1000 - now_s) if deadline_ms else NO_DEADLINE_S
        for key, deadline_ms in state.get_draining_nodes().items()
    }


def node_of(actor: object) -> str:
    """Ray's id of the node that an actor is on; "" while it is on none."""
    from ray._private.state import actors

    try:
        told = actors(actor._actor_id.hex())  # type: ignore[attr-defined]
    except Exception:  # of several kinds: the head is busy or just starting again
        return ""
    return told.get("Address", {}).get("NodeID", "") if told.get("State") == "ALIVE" else ""
