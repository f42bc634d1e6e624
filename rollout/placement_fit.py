"""Does it fit? Groups of bundles on the nodes of a cluster, in plain numbers; Ray is not asked here.

A `Group` is what is reserved together, all or nothing: the engines of one teacher, the ranks of a learner, env hosts.
`check` refuses what no cluster of those nodes can ever hold, and says what is missing; `assign` shows who would be
where. Ray's own scheduler decides in the end: `assign` is the same bin packing, done first with the largest.

Example::

    nodes = [Node(name="a", total={"CPU": 64, "GPU": 8}), Node(name="b", total={"CPU": 64})]
    learner = Group(who="the learner", what="ranks", bundles=({"GPU": 1, "CPU": 1},) * 4)
    check([learner], nodes)                       # raises PlacementError, which names what is missing
    assign([learner], nodes)[0]                   # (0, 0, 0, 0): all on "a"
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Resources = Mapping[str, float]
MOST_TRIES = 20_000
"""Steps of the search for a place for everything; a cluster on which it finds none in so many is not refused."""
SHOWN_NODES = 6
_TINY = 1e-6
_FIRST = ("GPU", "CPU")
_SELECTOR = re.compile(r"!?in\([\w.-]+(, ?[\w.-]+)*\)|!?[\w.-]+")
_INTERNAL = re.compile(r"memory|object_store_memory|node:.*|bundle.*|.*_group_.*|accelerator_type:.*")


class PlacementError(RuntimeError):
    """The cluster does not have, or does not free, what a role needs; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine of a cluster."""

    name: str
    """Its address, or what its shape is called."""
    total: Resources
    """Resource -> how much it has at all: {"CPU": 64, "GPU": 8, "env_node": 1}."""
    free: Resources | None = None
    """What of it nobody holds now; None: all."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's node labels."""
    key: str = ""
    """Ray's id of it."""

    @property
    def left(self) -> Resources:
        return self.total if self.free is None else self.free


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What is reserved together."""

    who: str
    """For people: "the learner", "the teacher Qwen/Qwen2.5-32B-Instruct"."""
    what: str
    """What one unit is called, in the plural: "ranks", "engines", "hosts"."""
    bundles: tuple[Resources, ...]
    """What each of them takes on one node; empty ones ask for nothing."""
    strategy: Strategy = "PACK"
    together: int = 1
    """So many bundles that follow one another must share a node: the ranks of a tensor-parallel group."""
    whole: bool = False
    """All bundles are of one actor, which starts the rest of itself: a pipeline engine."""
    separate: bool = False
    """Each bundle is reserved by itself: when its node is lost, it finds another one without the rest."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label -> what a node must have there, in Ray's words: "a", "!a", "in(a, b)", "!in(a, b)"."""
    remedy: str = ""
    """What to change where no node can hold a part of it."""
    less: str = ""
    """The settings that make it ask for less."""

    @property
    def asks(self) -> bool:
        """Whether it takes anything at all."""
        return any(any(bundle.values()) for bundle in self.bundles)

    @property
    def units(self) -> list[Resources]:
        """What has to be on one node, for each such part."""
        n = self.together
        return [added(self.bundles[at : at + n]) for at in range(0, len(self.bundles), n)]

    def wants(self) -> str:
        """In words: "the learner wants 4 ranks of 1 GPU and 1 CPU, packed"."""
        how = {"SPREAD": ", spread", "STRICT_PACK": ", all on one node", "STRICT_SPREAD": ", each on a node of its own"}
        asks = self.bundles[0] if self.bundles else {}
        each = f" of {words(asks)}" if any(asks.values()) else ""
        share = f", {self.together} of them on a node" if self.together > 1 else ""
        labels = f", on nodes with {_labels(self.labels)}" if self.labels else ""
        count, what = len(self.bundles), self.what
        many = f"{count} {what if count != 1 else singular(what)}{each}"
        return f"{self.who} wants {many}{share}{how.get(self.strategy, '') if count > 1 else ''}{labels}"


def added(parts: Sequence[Resources]) -> dict[str, float]:
    """Their sum."""
    total: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return dict(total)


def check(groups: Sequence[Group], nodes: Sequence[Node], *, when: str = "") -> None:
    """Raises `PlacementError` where `nodes` can never hold `groups` at the same time, whatever else they do now.

    `when`: in words, when they are all there together; for the message.
    """
    asking = [group for group in groups if group.asks or group.labels]
    for group in asking:
        if why := _never(group, nodes):
            raise PlacementError(_told(group, why, nodes))
    for name in _names(added([b for group in asking for b in group.bundles])):
        wanted = [(group.who, sum(b.get(name, 0.0) for b in group.bundles)) for group in asking]
        total = sum(node.total.get(name, 0.0) for node in nodes)
        summed = sum(amount for _, amount in wanted)
        if summed > total + _TINY:
            parts = ", ".join(f"{who} {amount:g}" for who, amount in wanted if amount)
            together = f" {when}" if when else ""
            raise PlacementError(
                f"all roles together want {summed:g} {name}{together} ({parts}), and the cluster has "
                f"{total:g} in all: {nodes_in_words(nodes)}{_lower(asking, name)}"
            )
    try:
        possible = _assign(asking, nodes, [dict(node.total) for node in nodes]) is not None
    except _NotFoundError:
        possible = True
    if not possible:
        wants = "; ".join(group.wants() for group in asking if group.asks)
        raise PlacementError(
            f"the roles cannot share these nodes{' ' + when if when else ''}, though their sum would fit: {wants}; the "
            f"cluster has {nodes_in_words(nodes)}; use smaller engines, fewer ranks, or nodes of another shape"
        )


def assign(groups: Sequence[Group], nodes: Sequence[Node], *, free: bool = False) -> list[tuple[int, ...]] | None:
    """For each group, the node (its place in `nodes`) of each bundle; None where they do not fit, or no way was found.

    With `free`, only what nobody holds now counts. Bundles that ask for nothing have a node too.
    """
    room = [dict(node.left if free else node.total) for node in nodes]
    try:
        return _assign(groups, nodes, room)
    except _NotFoundError:
        return None


def words(resources: Resources, *, zero: str = "nothing") -> str:
    """GPUs first: "4 GPU and 1 CPU"."""
    found = [f"{resources[name]:g} {name}" for name in _names(resources) if resources[name] > _TINY]
    if not found:
        return zero
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"


def nodes_in_words(nodes: Sequence[Node], *, free: bool = False) -> str:
    """How many of which shape; with `free`, what is free on which."""
    if not nodes:
        return "no node"
    shapes = Counter(_node_words(node, free=free) for node in nodes)
    names = defaultdict(list)
    for node in nodes:
        names[_node_words(node, free=free)].append(node.name)
    told = []
    for shape, count in list(shapes.items())[:SHOWN_NODES]:
        who = f" ({names[shape][0]})" if count == 1 and names[shape][0] else ""
        told.append(f"{count} {'node' if count == 1 else 'nodes'} with {shape}{who}")
    if len(shapes) > SHOWN_NODES:
        told.append(f"and {sum(list(shapes.values())[SHOWN_NODES:])} others")
    return "; ".join(told)


def matches(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node with `labels` is one that a selector of Ray's asks for."""
    return all(_matches(labels.get(name), value) for name, value in wanted.items())


def check_selector(name: str, wanted: str) -> None:
    """Raises `ValueError` for one that Ray would not take."""
    if not _SELECTOR.fullmatch(wanted):
        raise ValueError(f"labels: {name}={wanted!r} is no selector; give a, !a, in(a, b) or !in(a, b)")


def is_internal(name: str) -> bool:
    """A resource that Ray keeps for itself: memory, node ids, those of placement groups."""
    return _INTERNAL.fullmatch(name) is not None


def singular(what: str) -> str:
    return what.removesuffix("s")


def _matches(has: str | None, wanted: str) -> bool:
    negated = wanted.startswith("!")
    rest = wanted.removeprefix("!")
    inside = re.fullmatch(r"in\((.*)\)", rest)
    allowed = [each.strip() for each in inside[1].split(",")] if inside else [rest]
    return (has in allowed) != negated


def _never(group: Group, nodes: Sequence[Node]) -> str:
    """Why no node, or not enough of them, can hold its parts; "" when they can."""
    fitting = [node for node in nodes if matches(node.labels, group.labels)]
    if not fitting:
        own = {f"{name}={value}" for node in nodes for name, value in node.labels.items() if "ray.io" not in name}
        have = sorted(own)
        known = f"their labels are {', '.join(have)}" if have else "none has a label of its own"
        return f"no node has {_labels(group.labels)}: {known}"
    units = [added(group.units)] if group.strategy == "STRICT_PACK" else group.units
    for unit in units:
        for name in _names(unit):
            largest = max(node.total.get(name, 0.0) for node in fitting)
            if unit[name] > largest + _TINY:
                if largest == 0:
                    return f"no node has any {name}"
                return f"one node has to have {unit[name]:g} {name}, and the largest has {largest:g}"
        if not any(_holds(node.total, unit) for node in fitting):
            return f"no single node has {words(unit)}"
    if group.strategy == "STRICT_SPREAD" and group.asks:
        able = sum(_holds(node.total, group.units[0]) for node in fitting)
        if able < len(units):
            return f"{len(units)} nodes would be needed, and {able} can hold one"
    return ""


def _told(group: Group, why: str, nodes: Sequence[Node]) -> str:
    total = words(added([node.total for node in nodes]), zero="neither GPUs nor CPUs")
    remedy = f"; {group.remedy or group.less and 'lower ' + group.less}" if group.remedy or group.less else ""
    return f"{group.wants()}; {why}; the cluster has {total} in all: {nodes_in_words(nodes)}{remedy}"


def _lower(groups: Sequence[Group], name: str) -> str:
    found = list(dict.fromkeys(g.less for g in groups if g.less and any(b.get(name) for b in g.bundles)))
    return "; add nodes" + (f", or lower {', '.join(found)}" if found else "")


class _NotFoundError(Exception):
    """Not in `MOST_TRIES`; nobody knows whether there is a way."""


def _assign(
    groups: Sequence[Group], nodes: Sequence[Node], room: list[dict[str, float]]
) -> list[tuple[int, ...]] | None:
    """The places; None where there are none. Raises `_NotFoundError`."""
    order = sorted(range(len(groups)), key=lambda g: _difficulty(groups[g]), reverse=True)
    parts = [(g, unit) for g in order for unit in groups[g].units]
    fitting = [[n for n, node in enumerate(nodes) if matches(node.labels, group.labels)] for group in groups]
    used: list[Counter[int]] = [Counter() for _ in groups]
    chosen: list[int] = []
    tries: list[Iterator[int]] = []
    left = MOST_TRIES

    def candidates(at: int) -> Iterator[int]:
        group, unit = parts[at]
        return iter(_candidates(groups[group], unit, fitting[group], room, used[group], nodes))

    while len(chosen) < len(parts):
        if len(tries) == len(chosen):
            tries.append(candidates(len(chosen)))
        group, unit = parts[len(chosen)]
        node = next(tries[-1], None)
        left -= 1
        if left < 0:
            raise _NotFoundError
        if node is not None:
            _take(room[node], unit, 1)
            used[group][node] += 1
            chosen.append(node)
            continue
        tries.pop()
        if not chosen:
            return None
        node = chosen.pop()
        group, unit = parts[len(chosen)]
        _take(room[node], unit, -1)
        used[group][node] -= 1
    found: list[list[int]] = [[] for _ in groups]
    for (group, _), node in zip(parts, chosen, strict=True):
        found[group] += [node] * groups[group].together
    return [tuple(places) for places in found]


def _candidates(
    group: Group,
    unit: Resources,
    fitting: Sequence[int],
    room: Sequence[Resources],
    used: Counter[int],
    nodes: Sequence[Node],
) -> list[int]:
    """Nodes for the next part, the best first; of nodes that are alike, one."""
    able = [n for n in fitting if _holds(room[n], unit)]
    taken = {n for n in used if used[n]}
    if group.strategy == "STRICT_PACK" and taken:
        able = [n for n in able if n in taken]
    if group.strategy == "STRICT_SPREAD":
        able = [n for n in able if n not in taken]
    spread = group.strategy in ("SPREAD", "STRICT_SPREAD")

    def rank(n: int) -> tuple[float, ...]:
        waste = room[n].get("GPU", 0.0)  # who wants no GPU keeps off nodes that have some
        if spread:
            return (float(used[n]), waste if not unit.get("GPU") else 0.0, -room[n].get("CPU", 0.0))
        return (-float(used[n]), waste, room[n].get("CPU", 0.0))

    seen: dict[tuple[object, ...], int] = {}
    for n in sorted(able, key=rank):
        alike = (used[n], tuple(sorted(room[n].items())), tuple(sorted(nodes[n].labels.items())))
        seen.setdefault(alike, n)
    return list(seen.values())


def _difficulty(group: Group) -> tuple[float, ...]:
    unit = group.units[0] if group.bundles else {}
    return (unit.get("GPU", 0.0), group.strategy.startswith("STRICT"), bool(group.labels), unit.get("CPU", 0.0))


def _holds(room: Resources, unit: Resources) -> bool:
    return all(room.get(name, 0.0) + _TINY >= value for name, value in unit.items())


def _take(room: dict[str, float], unit: Resources, sign: int) -> None:
    for name, value in unit.items():
        room[name] = room.get(name, 0.0) - sign * value


def _node_words(node: Node, *, free: bool) -> str:
    if not free:
        return words(node.total, zero="neither GPUs nor CPUs")
    names = [name for name in _names(node.total) if node.total[name] > _TINY]
    told = [f"{node.left.get(name, 0.0):g} of {node.total[name]:g} {name} free" for name in names]
    return ", ".join(told) or "neither GPUs nor CPUs"


def _names(resources: Resources) -> list[str]:
    rest = sorted(name for name in resources if name not in _FIRST and not _INTERNAL.fullmatch(name))
    return [name for name in _FIRST if name in resources] + rest


def _labels(labels: Mapping[str, str]) -> str:
    return " and ".join(f"the label {name}={value}" for name, value in labels.items())
