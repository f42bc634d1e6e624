"""A program of its own: a Ray cluster of several nodes on this machine, with GPUs that only Ray believes in, and what
`rollout.placement` makes of it. Prints JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.placement_group import placement_group_table

    from rollout.placement import (
        PlacementError,
        RoleResources,
        actor_group,
        cluster_nodes,
        engine_groups,
        reserve,
    )

    cluster = Cluster()
    found: dict[str, object] = {}
    try:
        cluster.add_node(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20)
        for pool in ("a", "b"):
            cluster.add_node(
                num_cpus=8,
                num_gpus=3,
                resources={f"env_{pool}": 1},
                labels={"pool": pool},
                object_store_memory=80 << 20,
            )
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        names = {node.key: node.labels.get("pool", "head") for node in cluster_nodes()}

        def where(reservation) -> list[str]:
            places = placement_group_table(reservation.handle)["bundles_to_node_id"]
            return [names[places[i]] for i in range(len(places))]

        gpu = RoleResources(num_gpus=1.0)
        pipeline = engine_groups(who="t", engines=1, tensor_parallel_size=2, pipeline_parallel_size=2, resources=gpu)
        [reservation] = reserve(pipeline)
        found["pipeline"] = dict(Counter(where(reservation)))
        reservation.release()
        envs = actor_group(who="e", what="hosts", count=4, resources=RoleResources(num_cpus=1), strategy="SPREAD")
        labelled = actor_group(
            who="e", what="hosts", count=2, resources=RoleResources(num_cpus=1, labels={"pool": "b"})
        )
        custom = actor_group(
            who="e", what="hosts", count=2, resources=RoleResources(num_cpus=1, resources={"env_a": 0.01})
        )
        reservations = reserve([envs, labelled, custom])
        found["spread"], found["labelled"], found["custom"] = map(where, reservations)
        for each in reservations:
            each.release()
        wide = engine_groups(who="the teacher", engines=1, tensor_parallel_size=4, resources=gpu)
        try:
            reserve(wide)
        except PlacementError as error:
            found["refused"] = str(error)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
