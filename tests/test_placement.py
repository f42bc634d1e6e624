"""Where the roles of a job live: what they ask for, what fits, and what a cluster that cannot hold them says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.config import ClusterConfig
from launch.config_reading import load_config
from launch.placement import Placed, collection_groups, evaluation_groups, learning_groups
from rollout.placement import RoleResources, actor_group, engine_groups, places, reserve
from rollout.placement_fit import Group, Node, PlacementError, assign, check, matches, nodes_in_words

EIGHT = {"CPU": 64.0, "GPU": 8.0}
GPU = RoleResources(num_gpus=1.0)
VLLM = ["teacher=vllm", "teacher.model=m/n", "cluster=auto"]


def nodes(*totals: dict[str, float]) -> list[Node]:
    return [Node(name=f"n{i}", total=total) for i, total in enumerate(totals)]


def ranks(count: int, **changes) -> Group:
    group = Group(who="the learner", what="ranks", bundles=({"GPU": 1.0, "CPU": 1.0},) * count)
    return replace(group, **changes)


# -- what roles ask for


def test_tensor_parallel_ranks_share_a_node_and_pipeline_stages_may_span_nodes():
    [cpu] = engine_groups(who="t", engines=2, resources=RoleResources())
    assert not cpu.asks and len(cpu.bundles) == 2
    [shared] = engine_groups(who="t", engines=1, resources=RoleResources(num_gpus=0.5))
    assert shared.bundles == ({"GPU": 0.5},)
    [one_node] = engine_groups(who="t", engines=2, tensor_parallel_size=4, resources=GPU)
    assert one_node.bundles == ({"GPU": 4.0},) * 2 and not one_node.whole
    spanning = engine_groups(who="t", engines=2, tensor_parallel_size=4, pipeline_parallel_size=2, resources=GPU)
    assert [(len(g.bundles), g.bundles[0], g.together, g.whole) for g in spanning] == [
        (8, {"GPU": 1.0, "CPU": 1.0}, 4, True)
    ] * 2


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 2, "resources": RoleResources()},
        {"pipeline_parallel_size": 2, "resources": RoleResources(num_gpus=0.5)},
    ],
)
def test_ranks_without_a_gpu_each_are_refused(sizes):
    with pytest.raises(ValueError, match="needs a whole GPU for each"):
        engine_groups(who="t", engines=1, **sizes)


def test_the_embedded_default_asks_for_the_learners_cpu_alone():
    config = load_config()
    asking = [each.group for each in learning_groups(config, config.all_teachers) if each.group.asks]
    assert [(group.who, group.bundles) for group in asking] == [("the learner", ({"CPU": 1.0},))]
    assert not [each for each in evaluation_groups(config, config.all_teachers) if each.group.asks]


def test_a_role_has_what_the_configuration_says():
    config = load_config(
        [
            *VLLM,
            "teacher.tensor_parallel_size=4",
            "teacher.data_parallel_size=2",
            "rollout.env_hosts=6",
            "learner.ranks=4",
            "cluster.roles.envs={num_cpus: 2, resources: {env_node: 0.01}, strategy: STRICT_SPREAD}",
            "cluster.roles.retrieval={num_cpus: 16, labels: {pool: memory}}",
            "cluster.roles.learner={num_gpus: 0.5}",
        ]
    )
    groups = {each.role: each.group for each in learning_groups(config, config.all_teachers)}
    assert groups["teacher"].bundles == ({"GPU": 4.0},) * 2
    assert groups["envs"].bundles == ({"CPU": 2.0, "env_node": 0.01},) * 6
    assert groups["envs"].strategy == "STRICT_SPREAD"
    assert (groups["retrieval"].bundles, groups["retrieval"].labels) == (({"CPU": 16.0},), {"pool": "memory"})
    assert groups["learner"].bundles == ({"GPU": 0.5, "CPU": 1.0},) * 4


def test_each_teacher_has_workers_and_envs_of_its_own():
    teachers = "[{teacher: {kind: vllm, model: a/b}}, {teacher: {kind: vllm, model: c/d}, workers: 3}]"
    config = load_config([*VLLM, f"++teachers={teachers}", "rollout.env_hosts=2"])
    groups = collection_groups(config, config.all_teachers)
    assert [(each.role, each.name, len(each.group.bundles)) for each in groups] == [
        ("teacher", "a/b", 1), ("teacher", "c/d", 3), ("envs", "0", 2), ("envs", "1", 2), ("retrieval", "", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["cluster.roles.envs.num_cpus=-1"], "cluster.roles.envs: num_cpus=-1.0 must be at least 0"),
        (["cluster.roles.envs.resources={GPU: 1}"], "GPU is no custom resource; use num_gpus"),
        (["cluster.roles.envs.resources={env_node: 0}"], "env_node=0.0 must be above 0"),
        (["cluster.roles.envs.labels={pool: 'a b'}"], "pool='a b' is no selector"),
        (["cluster.roles.envs.strategy=pack"], "Input should be 'PACK', 'SPREAD', 'STRICT_PACK' or 'STRICT_SPREAD'"),
        (["cluster.roles.env.num_cpus=1"], "cluster.roles.env: unknown key; did you mean 'envs'"),
        (["cluster.place_s=0"], "place_s=0.0 must be above 0"),
    ],
)
def test_an_impossible_setting_is_named(overrides, complaint):
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")):
        load_config(overrides)


# -- what fits


def test_the_largest_is_placed_first_and_ranks_are_packed():
    [teacher] = engine_groups(who="t", engines=1, tensor_parallel_size=8, resources=GPU)
    learner, teacher_at = assign([ranks(4), teacher], nodes(EIGHT, EIGHT)) or []
    assert len(set(learner)) == 1 and set(teacher_at).isdisjoint(learner)


def test_envs_spread_over_nodes_without_gpus():
    envs = actor_group(who="e", what="hosts", count=4, resources=RoleResources(num_cpus=4), strategy="SPREAD")
    [at] = assign([envs], nodes(EIGHT, {"CPU": 64}, {"CPU": 64})) or []
    assert sorted(at) == [1, 1, 2, 2] or sorted(at) == [0, 1, 1, 2]
    assert {1, 2} <= set(at)


def test_a_tensor_parallel_group_is_never_torn():
    [pipeline] = engine_groups(who="t", engines=1, tensor_parallel_size=4, pipeline_parallel_size=2, resources=GPU)
    [at] = assign([pipeline], nodes({"CPU": 64, "GPU": 6}, {"CPU": 64, "GPU": 6})) or []
    assert len(set(at[:4])) == len(set(at[4:])) == 1
    assert assign([pipeline], nodes({"CPU": 64, "GPU": 7})) is None


def test_a_tight_fit_is_found_by_going_back():
    sizes = [Group(who=str(n), what="engines", bundles=({"GPU": n},)) for n in (4, 3, 3, 2, 2, 2)]
    assert assign(sizes, nodes({"GPU": 8}, {"GPU": 8})) is not None
    assert assign([*sizes, ranks(1)], nodes({"GPU": 8}, {"GPU": 8})) is None


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([ranks(24)], "all roles together want 24 GPU at night .the learner 24., and the cluster has 16 in all"),
        ([ranks(1, bundles=({"GPU": 9.0},))], "one node has to have 9 GPU, and the largest has 8"),
        ([ranks(9, strategy="STRICT_PACK")], "all on one node; one node has to have 9 GPU"),
        ([ranks(3, strategy="STRICT_SPREAD")], "3 nodes would be needed, and 2 can hold one"),
        ([ranks(1, bundles=({"env_node": 0.01},))], "1 rank of 0.01 env_node; no node has any env_node"),
        ([ranks(1, labels={"pool": "x"})], "no node has the label pool=x: none has a label of its own"),
        (
            [ranks(2, bundles=({"GPU": 5.0},) * 2), ranks(1, bundles=({"GPU": 4.0},))],
            "cannot share these nodes at night",
        ),
    ],
)
def test_what_can_never_fit_is_refused_with_what_is_missing(groups, says):
    with pytest.raises(PlacementError, match=says) as caught:
        check(groups, nodes(EIGHT, EIGHT), when="at night")
    assert "2 nodes with 8 GPU and 64 CPU" in str(caught.value) or "none has a label" in str(caught.value)


def test_what_fits_is_not_refused():
    check([ranks(16)], nodes(EIGHT, EIGHT))
    check([Group(who="e", what="hosts", bundles=({},) * 500, strategy="SPREAD")], nodes({"CPU": 1}))


def test_labels_mean_what_they_mean_to_ray():
    has = {"pool": "cpu", "zone": "a"}
    for wanted in ({"pool": "cpu"}, {"pool": "!gpu"}, {"zone": "in(a, b)"}, {"zone": "!in(c)"}, {"none": "!x"}):
        assert matches(has, wanted)
    for wanted in ({"pool": "gpu"}, {"pool": "!cpu"}, {"zone": "in(b)"}, {"none": "x"}, {"pool": "cpu", "zone": "b"}):
        assert not matches(has, wanted)


def test_nodes_alike_are_told_together():
    many = [Node(name=f"n{i}", total=EIGHT, free={"CPU": 64.0, "GPU": 8.0 * (i > 0)}) for i in range(3)]
    assert nodes_in_words(many) == "3 nodes with 8 GPU and 64 CPU"
    told = nodes_in_words(many, free=True)
    assert (
        told == "1 node with 0 of 8 GPU free, 64 of 64 CPU free (n0); 2 nodes with 8 of 8 GPU free, 64 of 64 CPU free"
    )


# -- on Ray


def test_a_cluster_without_the_gpus_says_what_is_missing_at_once(ray_cluster):
    engines = engine_groups(who="the teacher m", engines=1, tensor_parallel_size=2, resources=GPU, key="teacher")
    with pytest.raises(PlacementError, match=r"the teacher m wants 1 engine of 2 GPU; no node has any GPU; .*4 CPU"):
        reserve(engines)
    pipeline = engine_groups(who="t", engines=1, tensor_parallel_size=2, pipeline_parallel_size=2, resources=GPU)
    with pytest.raises(PlacementError, match="4 ranks of 1 GPU and 1 CPU, 2 of them on a node"):
        reserve(pipeline)


def test_a_job_that_cannot_fit_is_refused_before_anything_is_reserved(ray_cluster):
    config = load_config(["learner.ranks=3", "rollout.env_hosts=2", "cluster.roles.envs.num_cpus=1"])
    stages = [("while it learns", learning_groups(config, config.all_teachers))]
    with pytest.raises(
        PlacementError, match=r"want 5 CPU while it learns \(the envs 2, the learner 3\).* has 4 in all"
    ):
        Placed.start(config.cluster, stages, say=print)
    assert ray_cluster.available_resources()["CPU"] == 4


def test_what_others_hold_is_waited_for_and_then_named(ray_cluster):
    said: list[str] = []
    [holder] = reserve([actor_group(who="x", what="actors", count=1, resources=RoleResources(num_cpus=3))])
    both = [ranks(2, bundles=({"CPU": 1.0},) * 2), ranks(1, who="the envs", bundles=({"CPU": 1.0},))]
    try:
        with pytest.raises(PlacementError, match=r"not free within 3 s; now there is: 1 node with \d of 4 CPU free"):
            reserve(both, timeout_s=3.0, say=said.append)
        assert said and "waiting for others to end" in said[0]
    finally:
        holder.release()
    for reservation in reserve(both):  # nothing of the first try is left
        reservation.release()


def test_actors_live_in_what_was_reserved_and_the_last_gives_it_back(ray_cluster):
    @ray_cluster.remote
    class Engine:
        def place(self):
            import ray

            group = ray.util.get_current_placement_group()
            return (group.id.hex(), ray.get_runtime_context().get_assigned_resources().get("CPU")) if group else None

    config = ClusterConfig()
    placed = Placed(config)
    group = actor_group(who="e", what="hosts", count=2, resources=RoleResources(num_cpus=1))
    [reservation] = reserve([group], timeout_s=placed.timeout_s)
    actors = []
    try:
        for place, i in places([reservation]):
            actors.append(Engine.options(**place.options(i)).remote())  # type: ignore[attr-defined]
            place.use()
        seen = ray_cluster.get([actor.place.remote() for actor in actors], timeout=60)
        assert seen == [(reservation.handle.id.hex(), 1.0)] * 2
        ray_cluster.kill(actors.pop())
        reservation.leave()
        assert reservation.handle is not None
    finally:
        for actor in actors:
            ray_cluster.kill(actor)
            reservation.leave()
    assert reservation.handle is None


def test_a_pipeline_engine_starts_its_ranks_inside_its_reservation(ray_cluster):
    @ray_cluster.remote
    class Engine:
        def bundles(self):
            import ray

            return ray.util.get_current_placement_group().bundle_count

    group = Group(who="t", what="ranks", bundles=({"CPU": 1.0},) * 2, together=2, whole=True)
    [reservation] = reserve([group])
    engine = Engine.options(**reservation.options()).remote()  # type: ignore[attr-defined]
    try:
        assert ray_cluster.get(engine.bundles.remote(), timeout=60) == 2
        assert len(list(places([reservation]))) == 1
    finally:
        ray_cluster.kill(engine)
        reservation.release()


def test_what_asks_for_nothing_reserves_nothing(ray_cluster):
    envs = actor_group(who="e", what="hosts", count=3, resources=RoleResources(), strategy="SPREAD")
    [reservation] = reserve([envs])
    assert reservation.handle is None
    assert reservation.options(2) == {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": "SPREAD"}
