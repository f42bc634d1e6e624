"""Where on a Ray cluster an engine with several GPUs lives: `place_engine` reserves what it needs, or says what is
missing, before anything is loaded.

GPUs that share layers (tensor parallel) are taken on one node, as one bundle. An engine whose layers are spread over
groups of GPUs (pipeline parallel) gets one bundle a GPU, packed as tightly as the cluster can, and runs vLLM's
Ray executor inside that reservation. An engine on CPUs reserves nothing.

Example::

    demand = engine_demand(tensor_parallel_size=4, pipeline_parallel_size=2, gpus_per_rank=1.0)
    options = place_engine(demand)              # options of the Ray actor that holds the engine
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PLACE_S = 60.0
"""How long a reservation is waited for."""


class PlacementError(RuntimeError):
    """The cluster does not have, or does not free, what an engine needs; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDemand:
    """What one engine takes."""

    gpus: float = 0.0
    """On one node."""
    bundles: tuple[dict[str, float], ...] = ()
    """Several reservations that belong together, when it spans nodes."""

    @property
    def executor(self) -> str | None:
        """vLLM's `distributed_executor_backend`; None leaves the choice to vLLM."""
        return "ray" if self.bundles else None


def engine_demand(
    *, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1, gpus_per_rank: float = 0.0
) -> EngineDemand:
    """`gpus_per_rank` 0: the engine runs on CPUs, where the parallel sizes must be 1. Raises `ValueError`."""
    if tensor_parallel_size < 1 or pipeline_parallel_size < 1:
        raise ValueError(
            f"parallel sizes must be at least 1, not tensor_parallel_size={tensor_parallel_size}, "
            f"pipeline_parallel_size={pipeline_parallel_size}"
        )
    ranks = tensor_parallel_size * pipeline_parallel_size
    if ranks > 1 and gpus_per_rank != 1.0:
        raise ValueError(
            f"an engine of {ranks} ranks needs a whole GPU for each: set gpus_per_worker to 1, not {gpus_per_rank:g}"
        )
    if pipeline_parallel_size == 1:
        return EngineDemand(gpus=gpus_per_rank * ranks)
    return EngineDemand(bundles=({"GPU": 1.0, "CPU": 1.0},) * ranks)


def place_engine(demand: EngineDemand, *, timeout_s: float = PLACE_S) -> dict[str, Any]:
    """Options for the actor that will hold the engine. Raises `PlacementError` when the cluster cannot place it."""
    if not demand.bundles:
        _check_node(demand.gpus)
        return {"num_gpus": demand.gpus}
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    _check_total(demand)
    group = placement_group([dict(bundle) for bundle in demand.bundles], strategy="PACK")
    ready, _ = ray.wait([group.ready()], timeout=timeout_s)
    if not ready:
        remove_placement_group(group)
        raise PlacementError(
            f"{_words(demand)} were not free within {timeout_s:g} s; free now: {_words_of(ray.available_resources())}"
        )
    strategy = PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    return {"num_gpus": 0, "scheduling_strategy": strategy}


def release(actor_options: dict[str, Any]) -> None:
    """Give back what `place_engine` reserved; the actor must have ended."""
    strategy = actor_options.get("scheduling_strategy")
    if strategy is not None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(strategy.placement_group)


def _check_node(gpus: float) -> None:
    """Some node must have that many GPUs at all; that they are free is Ray's business."""
    import ray

    largest = max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if gpus > largest:
        raise PlacementError(
            f"an engine needs {gpus:g} GPUs on one node, and the largest node has {largest:g}: use a smaller "
            "tensor_parallel_size, pipeline_parallel_size for more nodes, or gpus_per_worker=0 to run on CPUs"
        )


def _check_total(demand: EngineDemand) -> None:
    import ray

    total = ray.cluster_resources()
    for name in demand.bundles[0]:
        wanted = sum(bundle.get(name, 0.0) for bundle in demand.bundles)
        if wanted > total.get(name, 0.0):
            raise PlacementError(f"an engine needs {_words(demand)}; the whole cluster has {_words_of(total)}")


def _words(demand: EngineDemand) -> str:
    return f"{len(demand.bundles)} bundles of {_words_of(demand.bundles[0])}"


def _words_of(resources: Any) -> str:
    found = [f"{resources[name]:g} {name}" for name in ("GPU", "CPU") if resources.get(name)]
    return " and ".join(found) or "neither GPUs nor CPUs"
