"""Where engines go: what they demand, and what a cluster that cannot hold them says."""

import pytest

from rollout.placement import EngineDemand, PlacementError, engine_demand, place_engine, release


def test_tensor_parallel_ranks_share_a_node_and_pipeline_stages_may_span_nodes():
    assert engine_demand() == EngineDemand()
    assert engine_demand(gpus_per_rank=0.5).gpus == 0.5
    one_node = engine_demand(tensor_parallel_size=4, gpus_per_rank=1.0)
    assert (one_node.gpus, one_node.bundles, one_node.executor) == (4.0, (), None)
    spanning = engine_demand(tensor_parallel_size=4, pipeline_parallel_size=2, gpus_per_rank=1.0)
    assert (len(spanning.bundles), spanning.bundles[0], spanning.executor) == (8, {"GPU": 1.0, "CPU": 1.0}, "ray")


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "gpus_per_rank": 0.5}])
def test_ranks_without_a_gpu_each_are_refused(sizes):
    with pytest.raises(ValueError, match="needs a whole GPU for each"):
        engine_demand(**sizes)


def test_a_cluster_without_the_gpus_says_what_is_missing(ray_cluster):
    with pytest.raises(PlacementError, match=r"needs 2 GPUs on one node, and the largest node has 0"):
        place_engine(engine_demand(tensor_parallel_size=2, gpus_per_rank=1.0))
    with pytest.raises(PlacementError, match=r"needs 4 bundles of 1 GPU and 1 CPU; the whole cluster has 4 CPU"):
        place_engine(engine_demand(tensor_parallel_size=2, pipeline_parallel_size=2, gpus_per_rank=1.0))


def test_an_engine_lives_in_its_reservation_and_gives_it_back(ray_cluster):
    @ray_cluster.remote(num_cpus=0)
    class Engine:
        def place(self):
            import ray

            group = ray.util.get_current_placement_group()
            return None if group is None else group.bundle_count

    before = ray_cluster.available_resources()["CPU"]
    options = place_engine(EngineDemand(bundles=({"CPU": 1.0}, {"CPU": 1.0})))
    engine = Engine.options(**options).remote()  # type: ignore[attr-defined]
    try:
        assert ray_cluster.get(engine.place.remote(), timeout=60) == 2
        with pytest.raises(PlacementError, match="were not free within 1 s"):
            place_engine(EngineDemand(bundles=({"CPU": before - 1},)), timeout_s=1)
    finally:
        ray_cluster.kill(engine)
        release(options)
