"""Where on a Ray cluster the roles of a job live: what each takes, reserved all or nothing and with a deadline.

`RoleResources` is what a configuration says of a role; `engine_groups` and `actor_group` make groups of bundles of it;
`reserve` takes them all as placement groups, those of one call together, or raises `PlacementError`, which names what
is missing, what the cluster has and what is free where. Nothing waits silently: what no node can hold is refused at
once, and what others hold is waited for `timeout_s` at most, with a line to `say`.

GPUs that share layers (tensor parallel) are taken on one node, as one bundle. An engine whose layers are spread over
groups of GPUs (pipeline parallel) has one bundle a GPU, in a placement group of its own as vLLM's Ray executor wants,
and each tensor-parallel group of it on one node. What asks for nothing reserves nothing.

Example::

    [group] = engine_groups(who="the teacher", engines=2, tensor_parallel_size=4, resources=RoleResources(num_gpus=1))
    [reservation] = reserve([group])
    actor = ray.remote(Engine).options(**reservation.options(0)).remote()     # the first of the two engines
    reservation.release()
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from envs.bounds import check_bounds
from rollout.placement_fit import (
    Group,
    Node,
    PlacementError,
    Strategy,
    assign,
    check,
    check_selector,
    is_internal,
    nodes_in_words,
)

__all__ = ["Group", "Node", "PlacementError", "Reservation", "RoleResources", "Wish", "engine_groups", "reserve"]

PLACE_S = 45.0
"""How long a reservation is waited for."""
TELL_AFTER_S = 2.0
"""A wait that is longer is told of."""
TELL_EVERY_S = 15.0
NODE_ID = "ray.io/node-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleResources:
    """What one actor of a role takes, and where it may be."""

    num_cpus: float | None = None
    """Logical CPUs; None: as many as the role has by default."""
    num_gpus: float | None = None
    """GPUs; of an engine or a learner: for each of its ranks. None: the role's default."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of Ray's (`ray start --resources='{"env_node": 1}'`), such as {env_node: 0.01}: the actors go
    where there are some."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Node labels (`ray start --labels=pool=cpu`) that a node must have: {pool: cpu}, or "!cpu", "in(a, b)",
    "!in(a, b)". Ray calls its `label_selector` experimental; custom resources are the older way."""
    strategy: Strategy | None = None
    """Over nodes: PACK (few), SPREAD (many), STRICT_PACK (one), STRICT_SPREAD (one each). None: the role's default."""

    def __post_init__(self) -> None:
        check_bounds(self, at_least_0=("num_cpus", "num_gpus"))
        for name, amount in self.resources.items():
            if name in ("CPU", "GPU"):
                raise ValueError(f"resources: {name} is no custom resource; use num_{name.lower()}s")
            if not amount > 0:
                raise ValueError(f"resources: {name}={amount} must be above 0")
        for name, wanted in self.labels.items():
            check_selector(name, wanted)

    def bundle(self, *, num_cpus: float, num_gpus: float = 0.0) -> dict[str, float]:
        """Of one actor, with the role's defaults; without what is 0."""
        cpus = num_cpus if self.num_cpus is None else self.num_cpus
        gpus = num_gpus if self.num_gpus is None else self.num_gpus
        return {name: amount for name, amount in {"GPU": gpus, "CPU": cpus, **self.resources}.items() if amount}


def actor_group(
    *,
    who: str,
    what: str,
    count: int,
    resources: RoleResources,
    num_cpus: float = 0.0,
    num_gpus: float = 0.0,
    strategy: Strategy = "PACK",
    less: str = "",
    separate: bool = False,
) -> Group:
    """`count` actors alike; the numbers and the strategy are the role's defaults. `separate`: where no strategy is
    configured."""
    return Group(
        who=who,
        what=what,
        bundles=(resources.bundle(num_cpus=num_cpus, num_gpus=num_gpus),) * count,
        strategy=resources.strategy or strategy,
        separate=separate and resources.strategy is None,
        labels=resources.labels,
        less=less,
    )


def engine_groups(
    *,
    who: str,
    engines: int,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    resources: RoleResources,
    key: str = "",
) -> list[Group]:
    """Of `engines` alike. Without GPUs they run on CPUs, where the parallel sizes must be 1. `key`: what the sizes are
    called in the configuration. Raises `ValueError`.

    One group for all of them, with a bundle each; of engines that are pipelines, a group each, in which `strategy` is
    that of the ranks.
    """
    gpus = resources.num_gpus or 0.0
    ranks = tensor_parallel_size * pipeline_parallel_size
    if tensor_parallel_size < 1 or pipeline_parallel_size < 1:
        raise ValueError(
            f"parallel sizes must be at least 1, not tensor_parallel_size={tensor_parallel_size}, "
            f"pipeline_parallel_size={pipeline_parallel_size}"
        )
    if ranks > 1 and gpus != 1.0:
        raise ValueError(
            f"an engine of {ranks} ranks needs a whole GPU for each: set gpus_per_worker to 1, not {gpus:g}"
        )
    key = f"{key}." if key else ""
    if pipeline_parallel_size == 1:
        bundle = resources.bundle(num_cpus=0.0, num_gpus=0.0)
        if gpus:
            bundle["GPU"] = gpus * ranks
        remedy = ""
        if ranks > 1:
            remedy = f"lower {key}tensor_parallel_size to what a node has; {key}pipeline_parallel_size spans nodes"
        elif gpus:
            remedy = "cluster.gpus_per_worker=0 runs engines on CPUs"
        sizes = f"{key}tensor_parallel_size or " if ranks > 1 else ""
        return [
            Group(
                who=who,
                what="engines",
                bundles=(bundle,) * engines,
                strategy=resources.strategy or "PACK",
                separate=resources.strategy is None,
                labels=resources.labels,
                remedy=remedy,
                less=f"{sizes}the number of engines ({key}data_parallel_size, rollout.workers)"
                if engines > 1
                else sizes[:-4],
            )
        ]
    rank = resources.bundle(num_cpus=1.0, num_gpus=1.0)
    return [
        Group(
            who=who if engines == 1 else f"{who}, engine {i + 1} of {engines},",
            what="ranks",
            bundles=(rank,) * ranks,
            strategy=resources.strategy or "PACK",
            together=tensor_parallel_size,
            whole=True,
            labels=resources.labels,
            less=f"{key}tensor_parallel_size or {key}pipeline_parallel_size",
        )
        for i in range(engines)
    ]


class Reservation:
    """A group that has its place. The actors in it must have ended before it is released."""

    def __init__(self, group: Group, handles: Sequence[Any]) -> None:
        """`handles`: Ray's placement groups, one, or one for each bundle; none where the group asks for nothing."""
        self.group = group
        self._handles = dict(enumerate(handles))
        self._users = 0

    @property
    def handle(self) -> Any:
        """Ray's placement group of all of it; None where the group asks for nothing."""
        return self._handles.get(0)

    def options(self, index: int = 0) -> dict[str, Any]:
        """Of the Ray actor in that bundle; of an engine over several bundles, of the actor that starts its ranks."""
        bundle = self.group.bundles[index]
        if not self._handles:
            options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0}
            if self.group.strategy == "SPREAD":
                options["scheduling_strategy"] = "SPREAD"
            if self.group.labels:
                options["label_selector"] = dict(self.group.labels)
            return options
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            self._handles[index if self.group.separate else 0],
            placement_group_bundle_index=0 if self.group.separate else index,
            placement_group_capture_child_tasks=self.group.whole,
        )
        if self.group.whole:
            return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}
        return {
            "num_cpus": bundle.get("CPU", 0.0),
            "num_gpus": bundle.get("GPU", 0.0),
            "resources": {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")},
            "scheduling_strategy": strategy,
        }

    def use(self) -> None:
        """One more actor lives here."""
        self._users += 1

    def leave(self, index: int = 0) -> None:
        """One less, that of this bundle; with the last one all is released."""
        self._users -= 1
        if self._users <= 0:
            self.release()
        elif self.group.separate and index in self._handles:
            _remove(self._handles.pop(index))

    def release(self) -> None:
        """Give it back; may be called twice."""
        for handle in self._handles.values():
            _remove(handle)
        self._handles = {}


def _remove(handle: Any) -> None:
    from ray.util.placement_group import remove_placement_group

    with contextlib.suppress(Exception):  # the cluster may be gone
        remove_placement_group(handle)


def places(reservations: Sequence[Reservation]) -> Iterator[tuple[Reservation, int]]:
    """Where each actor of them lives: a reservation, and the number of its bundle."""
    for reservation in reservations:
        yield from ((reservation, i) for i in range(1 if reservation.group.whole else len(reservation.group.bundles)))


def reserve(
    groups: Sequence[Group],
    *,
    timeout_s: float = PLACE_S,
    say: Callable[[str], None] = lambda line: None,
    grows: bool = False,
) -> list[Reservation]:
    """All of `groups`, or none: one `Reservation` each. `grows`: an autoscaler may add nodes, so nothing is refused
    because there is no node for it yet. Raises `PlacementError`.
    """
    if not grows:
        check([group for group in groups if group.asks or group.labels], cluster_nodes())
    parts = [(i, part) for i, group in enumerate(groups) if group.asks for part in _parts(group)]
    handles = _take([part for _, part in parts], timeout_s, say, grows) if parts else []
    found: dict[int, list[Any]] = {}
    for (i, _), handle in zip(parts, handles, strict=True):
        found.setdefault(i, []).append(handle)
    return [Reservation(group, found.get(i, [])) for i, group in enumerate(groups)]


def _parts(group: Group) -> list[Group]:
    """What has a placement group of its own."""
    return [replace(group, bundles=(bundle,)) for bundle in group.bundles] if group.separate else [group]


class Wish:
    """Groups that are asked for and not waited for: an autoscaler sees them, and they are ready when there is room."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = list(groups)
        self._handles: list[Any] = [_placement_group(group) if group.asks else None for group in groups]
        self._waiting = {handle.ready(): i for i, handle in enumerate(self._handles) if handle is not None}
        self._since_s = time.monotonic()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._since_s

    def take(self) -> list[Reservation] | None:
        """A reservation for each group; None while some have no place. Raises `PlacementError` where ranks that share
        layers find no node together."""
        import ray

        if self._waiting:
            ready, _ = ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=0)
            for reference in ready:
                i = self._waiting.pop(reference)
                if _torn(self._groups[i], self._handles[i]):
                    self._handles[i] = _pinned(self._groups[i], self._handles[i])
                    self._waiting[self._handles[i].ready()] = i
        if self._waiting:
            return None
        found = [
            Reservation(group, [] if handle is None else [handle])
            for group, handle in zip(self._groups, self._handles, strict=True)
        ]
        self._handles = []
        return found

    def cancel(self) -> None:
        """Ask no longer; does nothing to what was taken."""
        for handle in self._handles:
            if handle is not None:
                _remove(handle)
        self._handles, self._waiting = [], {}


def _take(groups: Sequence[Group], timeout_s: float, say: Callable[[str], None], grows: bool) -> list[Any]:
    import ray

    begun_s = time.monotonic()
    deadline_s = begun_s + timeout_s
    told_s = begun_s + TELL_AFTER_S - TELL_EVERY_S
    # The largest first: what is left is then for those that fit anywhere.
    order = sorted(
        range(len(groups)), key=lambda i: max(unit.get("GPU", 0.0) for unit in groups[i].units), reverse=True
    )
    handles: dict[int, Any] = {}
    try:
        for i in order:
            handles[i] = _placement_group(groups[i])
        waiting = {handle.ready(): i for i, handle in handles.items()}
        while waiting:
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise PlacementError(_not_free([groups[i] for i in waiting.values()], timeout_s, grows))
            if now_s - told_s >= TELL_EVERY_S:
                told_s = now_s
                say(_waits([groups[i] for i in waiting.values()], deadline_s - now_s, grows))
            wake_s = min(deadline_s, told_s + TELL_EVERY_S) - now_s
            ready, _ = ray.wait(list(waiting), timeout=max(0.05, wake_s))
            for reference in ready:
                i = waiting.pop(reference)
                if _torn(groups[i], handles[i]):
                    handles[i] = _pinned(groups[i], handles[i])
                    waiting[handles[i].ready()] = i
        return [handles[i] for i in range(len(groups))]
    except BaseException:
        for handle in handles.values():
            _remove(handle)
        raise


def _placement_group(group: Group, nodes: Sequence[str] = ()) -> Any:
    """`nodes`: Ray's ids of where each bundle has to be."""
    from ray.util.placement_group import placement_group

    selectors = [dict(group.labels) for _ in group.bundles]
    for selector, node in zip(selectors, nodes, strict=False):
        selector[NODE_ID] = node
    return placement_group(
        [dict(bundle) for bundle in group.bundles],
        strategy=group.strategy,
        bundle_label_selector=selectors if any(selectors) else None,  # type: ignore[arg-type]
    )


def _torn(group: Group, handle: Any) -> bool:
    """Whether Ray put ranks apart that share layers. vLLM numbers ranks node by node, so the count on each decides."""
    if group.together == 1:
        return False
    from ray.util.placement_group import placement_group_table

    places = Counter(placement_group_table(handle)["bundles_to_node_id"].values())
    return any(count % group.together for count in places.values())


def _pinned(group: Group, torn: Any) -> Any:
    """Again, on nodes chosen here. Raises `PlacementError` when none are free."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(torn)
    deadline_s = time.monotonic() + 5.0
    while (places := assign([group], nodes := cluster_nodes(), free=True)) is None:  # its room comes back by and by
        if time.monotonic() > deadline_s:
            raise PlacementError(
                f"{group.wants()}, and that many are not free together on any node: "
                f"{nodes_in_words(nodes, free=True)}; lower {group.less}"
            )
        time.sleep(0.2)
    return _placement_group(group, [nodes[place].key for place in places[0]])


def _wants(groups: Sequence[Group]) -> str:
    told = Counter(group.wants() for group in groups)
    return "; ".join(f"{count} times: {wants}" if count > 1 else wants for wants, count in told.items())


def _not_free(groups: Sequence[Group], timeout_s: float, grows: bool) -> str:
    nodes = cluster_nodes()
    wants = _wants(groups)
    came = "neither free nor added by the autoscaler" if grows else "not free"
    return (
        f"{wants}; that was {came} within {timeout_s:g} s; now there is: {nodes_in_words(nodes, free=True)}; end "
        "other jobs, ask for less, or wait longer with cluster.place_s" + (" and cluster.autoscale_s" if grows else "")
    )


def _waits(groups: Sequence[Group], left_s: float, grows: bool) -> str:
    wants = _wants(groups)
    who = "the autoscaler, or until others end" if grows else "others to end"
    return f"waiting for {who}, {left_s:.0f} s at most: {wants}"


def cluster_nodes() -> list[Node]:
    """Those that live, with what is free on each."""
    import ray
    from ray._private.state import available_resources_per_node  # public under `ray.state` until 2.5

    free = available_resources_per_node()
    return [
        Node(
            name=node["NodeManagerAddress"],
            key=node["NodeID"],
            total=_external(node["Resources"]),
            free=_external(free.get(node["NodeID"], {})),
            labels=dict(node.get("Labels") or {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def can_grow() -> bool:
    """Whether an autoscaler looks after the cluster, as far as Ray tells."""
    from ray._private.state import state
    from ray.experimental.internal_kv import _internal_kv_get

    with contextlib.suppress(Exception):  # none of it is an interface of Ray's
        if state.get_max_resources_from_cluster_config():
            return True
        report = json.loads(_internal_kv_get(b"__autoscaling_status") or b"{}").get("autoscaler_report") or {}
        # A cluster without one has a monitor all the same, which calls each node's type "node_<id>".
        return any(not name.startswith("node_") for name in report.get("active_nodes") or {})
    return False


def _external(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if not is_internal(name)}
