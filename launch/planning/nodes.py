"""The machines of a plan: written down in a line, or those of a running cluster, which is only looked at.

    8xH100 + 2xCPU64              one node with eight H100, two nodes with 64 CPUs and no GPU
    2*8xH100:cpu=192              two nodes of eight H100 and 192 CPUs each
    4xL4 + 16*CPU32:env_node=1    a number is a custom resource; anything else a label, as :pool=spot
    2*1xGPU:gib=40                a GPU that the table does not know, by its memory

Example::

    nodes = nodes_of("8xH100 + 2xCPU64")        # three of `PlanNode`
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rollout.placement_fit import Node

GPU_GIB = {
    "B200": 179.0, "H200": 140.4, "H100": 79.6, "H800": 79.6, "A100": 79.2, "A100-80G": 79.2, "A800": 79.2,
    "A100-40G": 39.4, "GH200": 94.5, "H20": 95.6, "L40S": 45.0, "L40": 45.0, "A40": 45.0, "A6000": 47.5, "A10G": 22.5,
    "A10": 22.5, "L4": 22.5, "A30": 24.0, "V100": 15.8, "V100-32G": 31.7, "T4": 15.0, "RTX5090": 31.8,
    "RTX4090": 24.0, "RTX3090": 24.0, "MI300X": 191.7, "MI250X": 63.9,
}  # fmt: skip
"""Name -> GiB that its driver tells (an "80 GB" H100 has 81,559 MiB); of the makers' data sheets."""
CPUS_PER_GPU = 16
"""Of a node whose CPUs are not said."""
_TERM = re.compile(
    r"(?:(?P<count>\d+)\s*\*\s*)?(?:(?P<n>\d+)\s*[xX]\s*)?(?P<kind>[A-Za-z][\w-]*)(?P<more>(?::[^:\s+]+)*)"
)
_MOST_NODES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanNode:
    """A machine, and the GPUs that it has."""

    node: Node
    gpu: str = ""
    """What they are; "" for none, or not known."""
    gpu_gib: float | None = None


def nodes_of(text: str) -> list[PlanNode]:
    """Raises `ValueError` for a line that cannot be read."""
    found: list[PlanNode] = []
    for term in text.split("+"):
        found += _term(term.strip(), text, len(found))
    return found


def _term(term: str, text: str, before: int) -> list[PlanNode]:
    match = _TERM.fullmatch(term)
    if match is None:
        raise ValueError(f"--nodes: {term!r} in {text!r} is no node; write 8xH100, 2xCPU64 or 2*8xH100:cpu=192")
    kind, n, count = match["kind"].upper(), match["n"], int(match["count"] or 1)
    total, labels, gib = _details(match["more"], term)
    cpus = re.fullmatch(r"CPU(\d+)", kind)
    if cpus:
        count *= int(n or 1)
        total = {"CPU": float(cpus[1]), **total}
        gpu, gib = "", None
    else:
        gpu = kind
        if gib is None and kind in GPU_GIB:
            gib = GPU_GIB[kind]
        if kind == "CPU" or (gib is None and kind != "GPU"):
            raise ValueError(
                f"--nodes: {kind!r} in {text!r} is unknown; there are CPU<number>, GPU (say :gib=24) and "
                + ", ".join(GPU_GIB)
            )
        gpus = float(n or 1)
        total = {"GPU": gpus, "CPU": CPUS_PER_GPU * gpus, **total}
    if not 1 <= count <= _MOST_NODES:
        raise ValueError(f"--nodes: {term!r} is {count} nodes; give 1 to {_MOST_NODES:,}")
    return [
        PlanNode(node=Node(name=f"node {before + i + 1}", total=total, labels=labels), gpu=gpu, gpu_gib=gib)
        for i in range(count)
    ]


def _details(more: str, term: str) -> tuple[dict[str, float], dict[str, str], float | None]:
    total: dict[str, float] = {}
    labels: dict[str, str] = {}
    gib = None
    for detail in filter(None, more.split(":")):
        name, is_there, value = detail.partition("=")
        if not (is_there and name and value):
            raise ValueError(f"--nodes: {detail!r} in {term!r} must be NAME=VALUE")
        number = float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None
        if name == "gib" and number:
            gib = number
        elif number is not None:
            total["CPU" if name.lower() in ("cpu", "cpus") else name] = number
        else:
            labels[name] = value
    return total, labels, gib


def nodes_of_cluster(address: str) -> list[PlanNode]:
    """Of the Ray cluster there, with what is free now; nothing is started on it. Raises `ClusterError`."""
    import logging
    import os

    from launch.cluster import QUIET, ClusterError, check_reachable

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    from rollout.placement import cluster_nodes

    check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"cannot look at Ray at {address!r}: {str(error).splitlines()[0]}") from None
    try:
        return [_seen(node, types.get(node.key, "")) for types in [_gpu_types()] for node in cluster_nodes()]
    finally:
        ray.shutdown()


def _seen(node: Node, gpu: str) -> PlanNode:
    return PlanNode(node=node, gpu=gpu, gpu_gib=GPU_GIB.get(gpu) if gpu else None)


def _gpu_types() -> dict[str, str]:
    """Ray's id of a node -> what Ray calls its GPUs."""
    import ray

    prefix = "accelerator_type:"
    return {
        node["NodeID"]: name.removeprefix(prefix).upper()
        for node in ray.nodes()
        if node["Alive"]
        for name in node["Resources"]
        if name.startswith(prefix)
    }
