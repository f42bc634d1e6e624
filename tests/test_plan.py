"""A plan's numbers beside what they are numbers of: parameters, a learner's tensors, vLLM's cache; and what it says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch import plan
from launch.config_reading import load_config
from launch.planning.cost import Counts, Known, Pace, count_tasks, estimate_job, pace_of_run
from launch.planning.making import make_plan
from launch.planning.memory import engine_memory, learner_memory
from launch.planning.nodes import nodes_of
from launch.planning.shapes import QWEN2_5, UnknownShapeError, shape_of, shape_of_config
from learner.base_student import BASE_STUDENT_FOLDER
from learner.config import LoraConfig
from rollout.policy_spec import PolicySpec

ROOT = Path(__file__).parents[1]
PUBLISHED = {
    "0.5B": 494_032_768, "1.5B": 1_543_714_304, "3B": 3_085_938_688, "7B": 7_615_616_512, "14B": 14_770_033_664,
    "32B": 32_763_876_352, "72B": 72_706_203_648,
}  # fmt: skip
"""Parameters of Qwen/Qwen2.5-*, as the hub tells of their safetensors files."""
PAPER = ["recipe=paper", "tasks.train_count=3000"]
SPEC = PolicySpec(kind="vllm", model="Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16", max_model_len=8192)


def learner_config(*overrides: str, **changes):
    return replace(load_config(list(overrides)).learner, **changes)


# -- shapes


def test_the_starter_students_parameters_are_counted_exactly():
    from safetensors import safe_open

    with safe_open(Path(BASE_STUDENT_FOLDER) / "model.safetensors", "np") as stored:
        there = sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
    assert shape_of("base_student").parameters == there


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_table_has_as_many_parameters_as_the_models(size):
    assert shape_of(f"Qwen/Qwen2.5-{size}-Instruct").parameters == QWEN2_5[size].parameters == PUBLISHED[size]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("mistral", {"head_dim": 24, "tie_word_embeddings": False}),
        ("gpt_neox", {"tie_word_embeddings": False}),
    ],
)
def test_every_architecture_is_counted_as_transformers_builds_it(kind, more):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {
        "hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 512, **more,
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **plain))
    shape = shape_of_config({"model_type": kind, **plain}, "made up")
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_an_unknown_model_is_said_to_be_unknown(tmp_path):
    with pytest.raises(UnknownShapeError, match="the shape of 'a/b' is unknown"):
        shape_of("a/b")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 8}')
    with pytest.raises(UnknownShapeError, match="says too little of the model: KeyError"):
        shape_of(str(tmp_path))
    made = make_plan(load_config(["teacher=vllm", "teacher.model=a/b"]), [])
    assert any("the teacher's memory is not known" in warning.text for warning in made.warnings) and made.fits


# -- memory


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon"},
        {"optimizer": "adamw", "lora": LoraConfig(rank=8, target="all-linear")},
        {"optimizer": "muon", "lora": LoraConfig(rank=4, target="q_proj,down_proj")},
    ],
    ids=lambda changes: "-".join(str(value) if isinstance(value, str) else "lora" for value in changes.values()),
)
def test_weights_gradients_and_optimizer_state_are_the_learners_bytes(changes, tmp_path):
    from backend_samples import batches_of, config_of, loss_of, take_step

    from learner.deepspeed_backend import DeepSpeedBackend

    config = config_of(Path(BASE_STUDENT_FOLDER), tmp_path, **changes)
    backend = DeepSpeedBackend(config, rank=0, world_size=1)
    try:
        take_step(backend, 0)
        backend.backward(loss_of(backend, batches_of(1)[0]), last=True)
        tensors = {id(parameter): parameter for parameter in backend.student.parameters()}.values()
        state = [value for each in backend.engine.optimizer.state.values() for value in each.values()]
        there = {
            "weights": sum(tensor.nbytes for tensor in tensors),
            "gradients": sum(tensor.grad.nbytes for tensor in tensors if tensor.grad is not None),
            "optimizer state": sum(value.nbytes for value in state if getattr(value, "ndim", 0) > 0),
        }
    finally:
        backend.close()
    memory = learner_memory(config, shape_of("base_student"), gpu=False)
    said = {name: memory.part(name) for name in there}
    said["weights"] += memory.part("adapters")
    assert said == there


def test_what_zero_shares_out_is_divided_by_the_ranks():
    shape, config = shape_of("Qwen/Qwen2.5-7B-Instruct"), learner_config("recipe=paper", "learner=full")
    whole = learner_memory(replace(config, ranks=1), shape, gpu=True)
    eighth = learner_memory(replace(config, ranks=8), shape, gpu=True)
    n = shape.parameters
    for name, each in (("weights", 2), ("fp32 masters", 4), ("optimizer state", 8), ("gradients", 4)):
        assert whole.part(name) == n * each and eighth.part(name) == n * each / 8
    offloaded = learner_memory(replace(config, ranks=8, offload="optimizer"), shape, gpu=True)
    assert offloaded.host == n * 16 / 8 and offloaded.total < eighth.total - n * 1.9
    assert learner_memory(replace(config, zero_stage=2, ranks=8), shape, gpu=True).part("weights") == n * 2


def test_logits_and_activations_grow_with_the_micro_batch():
    shape, config = shape_of("Qwen/Qwen2.5-0.5B"), learner_config("recipe=paper")
    small = learner_memory(config, shape, gpu=True)
    large = learner_memory(replace(config, micro_batch_tokens=2 * config.micro_batch_tokens), shape, gpu=True)
    for name in ("logits", "activations"):
        assert large.part(name) == 2 * small.part(name) > 0
    assert learner_memory(config, shape, gpu=True, trained_share=0.25).part("logits") == small.part("logits") / 4
    kept = learner_memory(replace(config, gradient_checkpointing=False), shape, gpu=True)
    assert kept.part("activations") > 5 * small.part("activations")


def test_an_engine_has_what_its_weights_leave():
    shape, gib = shape_of(SPEC.model), 2**30
    engine = engine_memory(SPEC, shape, gpu_bytes=80 * gib, gpu=True)
    assert engine.memory.part("weights") == 2 * PUBLISHED["7B"]
    assert engine.memory.total == pytest.approx(0.9 * 80 * gib)
    assert engine.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2
    assert engine.kv_tokens == pytest.approx(engine.memory.part("KV cache") / engine.kv_bytes_per_token, abs=16)
    parallel = engine_memory(replace(SPEC, tensor_parallel_size=4), shape, gpu_bytes=80 * gib, gpu=True)
    assert parallel.memory.part("weights") == engine.memory.part("weights") / 4
    assert (parallel.kv_tokens or 0) > 4 * (engine.kv_tokens or 0)
    wider = engine_memory(replace(SPEC, tensor_parallel_size=8), shape, gpu_bytes=80 * gib, gpu=True)
    assert wider.kv_bytes_per_token == parallel.kv_bytes_per_token  # 4 heads: each on two GPUs
    assert engine_memory(SPEC, shape, gpu_bytes=None, gpu=True).kv_tokens is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_cache_holds_as_many_tokens_as_vllm_says(dtype):
    program = (
        "import sys; from rollout.vllm_policy import VllmPolicy\n"
        f"p = VllmPolicy({str(BASE_STUDENT_FOLDER)!r}, dtype={dtype!r}, max_model_len=2048, max_num_seqs=8, "
        "kv_cache_bytes=64 << 20)\n"
        "c = p._engine._engine.vllm_config.cache_config; print('blocks', c.num_gpu_blocks * c.block_size)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    there = int(ran.stdout.split("blocks")[1].split()[0])
    spec = PolicySpec(
        kind="vllm",
        model=str(BASE_STUDENT_FOLDER),
        dtype=dtype,
        max_model_len=2048,
        max_num_seqs=8,
        kv_cache_bytes=64 << 20,
    )
    said = engine_memory(spec, shape_of("base_student"), gpu_bytes=None, gpu=False)
    assert said.kv_tokens == there


# -- nodes


def test_machines_are_read_as_they_are_written():
    nodes = nodes_of("8xH100 + 2xCPU64 + 3*4xA100-40G:cpu=96:env_node=1:pool=spot+1xGPU:gib=12")
    assert [(n.node.total, n.gpu, n.gpu_gib) for n in nodes] == [
        ({"GPU": 8, "CPU": 128}, "H100", 79.6),
        *[({"CPU": 64}, "", None)] * 2,
        *[({"GPU": 4, "CPU": 96, "env_node": 1}, "A100-40G", 39.4)] * 3,
        ({"GPU": 1, "CPU": 16}, "GPU", 12),
    ]
    assert nodes[4].node.labels == {"pool": "spot"} and len({n.node.name for n in nodes}) == 7


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("8xH101", "'H101' in '8xH101' is unknown; there are CPU<number>"),
        ("H100 x 8", "'H100 x 8' in 'H100 x 8' is no node; write 8xH100"),
        ("8xH100:cpu", "'cpu' in '8xH100:cpu' must be NAME=VALUE"),
        ("0*8xH100", "is 0 nodes"),
        ("99999*CPU8", "is 99999 nodes"),
        ("", "'' in '' is no node"),
    ],
)
def test_a_machine_that_cannot_be_read_is_named(text, complaint):
    with pytest.raises(ValueError, match=complaint.replace("*", r"\*").replace("<", ".")):
        nodes_of(text)


# -- what a plan says


def test_the_paper_fits_where_it_should_and_says_who_is_where():
    config = load_config([*PAPER, "cluster=labelled"])
    made = make_plan(config, nodes_of("8xH100 + 2xCPU64:env_node=1"))
    assert made.fits
    learning, evaluation = made.stages
    assert learning.places is not None and evaluation.places is not None
    assert learning.places["node 1"] == {
        "teacher Qwen/Qwen2.5-32B-Instruct: engine of 4 GPU": 1, "learner: rank of 1 GPU and 1 CPU": 1,
    }  # fmt: skip
    envs = "envs: host of 4 CPU and 0.01 env_node"
    assert [learning.places[node].get(envs) for node in ("node 2", "node 3")] == [4, 4]
    assert "student: engine of 1 GPU" in evaluation.places["node 1"]


@pytest.mark.parametrize(
    ("overrides", "nodes", "says"),
    [
        ([], "4xH100", "want 5 GPU while the teacher acts and the student learns"),
        ([], "2*4xH100", None),
        (["teacher.tensor_parallel_size=1"], "2xA100-40G", "61.0 GiB of weights leave room for 0 tokens"),
        (["teacher.tensor_parallel_size=8"], "8*2xH100", "one node has to have 8 GPU, and the largest has 2"),
        (["teacher.tensor_parallel_size=3"], "8xH100", "does not divide Qwen/Qwen2.5-32B-Instruct's 40 heads"),
        (["teacher.max_model_len=65536"], "8xH100", "more than the 32,768 tokens"),
        (["learner=full"], "8xL4", "micro_batch_tokens=10240"),
        (["cluster.roles.envs.resources={env_node: 0.01}"], "8xH100", "no node has any env_node"),
    ],
)
def test_what_does_not_fit_is_told_with_what_to_change(overrides, nodes, says):
    made = make_plan(load_config([*PAPER, *overrides]), nodes_of(nodes))
    fatal = [warning.text for warning in made.warnings if warning.fatal]
    if says is None:
        assert not fatal
    else:
        assert any(says in text for text in fatal), fatal


def test_without_a_cluster_only_what_is_wanted_is_said():
    made = make_plan(load_config(PAPER), [])
    assert all(stage.places is None and not stage.missing for stage in made.stages)
    assert [each.available for each in made.memory] == [None] * 3 and made.fits


# -- time and cost


def test_time_and_cost_are_the_products_they_say():
    prices = "teacher.prices={prompt_usd_per_million: 2, completion_usd_per_million: 10}"
    openai = ["teacher=openai", "teacher.model=m", "teacher.base_url=http://127.0.0.1:1/v1", prices]
    config = load_config([*openai, "rollout.samples=2", "spend.usd=1"])
    pace = Pace(
        steps=Known(value=3, source=""), prompt_tokens=Known(value=1000, source=""),
        completion_tokens=Known(value=100, source=""), row_tokens=Known(value=500, source=""),
        teacher_tokens_per_s=Known(value=300, source=""), student_tokens_per_s=Known(value=400, source=""),
        train_tokens_per_s=Known(value=1000, source=""),
    )  # fmt: skip
    counts = Counts(train_tasks=50, test_tasks=10, sources=("a", "b"))
    said = estimate_job(config, counts, pace, gpus=4, gpu_hour_usd=3.0)
    assert said.value("episodes") == 100 and said.value("steps") == 300
    assert said.value("API") == pytest.approx((300 * 1000 * 2 + 300 * 100 * 10) / 1e6)
    assert said.value("collecting") == 100 and said.value("learning") == 100 * 500 * 2 / 1000
    assert said.value("scoring") == 10 * 3 * 100 * 10 / 400  # untrained, greedy, eight candidates
    assert said.value("all") == 100 + 75
    assert said.value("cost") == pytest.approx(0.9 + 4 * 175 / 3600 * 3)
    assert not said.warnings
    dearer = estimate_job(config, replace(counts, train_tasks=500), pace)
    assert "spend.usd stops at 1" in dearer.warnings[0]


def test_what_nobody_measured_is_unknown_and_says_what_would_tell():
    said = estimate_job(load_config(), Counts(train_tasks=5, test_tasks=5, sources=("a", "b")), Pace())
    unknown = {line.what: line.how for line in said.lines if line.value is None}
    assert "--tokens-per-s" in unknown["collecting"] and "--train-tokens-per-s" in unknown["learning"]
    assert {"scoring", "all"} <= set(unknown)


def test_a_pace_is_read_off_an_earlier_run(tmp_path):
    from expert_samples import expert_trajectories

    from rollout.ledger import LedgerWriter

    coded, _ = expert_trajectories(4)
    LedgerWriter(tmp_path / "ledger", writer="w").append(list(coded))
    (tmp_path / "learner").mkdir()
    line = {"step": 3, "tokens": 4000, "rows": 10, "trained_tokens": 1000, "tokens_per_s": 123.0}
    (tmp_path / "learner/metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 4, "tok')
    pace = pace_of_run(str(tmp_path))
    assert pace.steps.value == pytest.approx(sum(len(each.steps) for each in coded) / len(coded))
    assert pace.row_tokens is not None and (pace.row_tokens.value, pace.row_tokens.source[:12]) == (400, "4,000 tokens")
    assert pace.train_tokens_per_s is not None and pace.train_tokens_per_s.value == 123
    assert pace.trained_share is not None and pace.trained_share.value == 0.25
    with pytest.raises(ValueError, match=r"--from .*none: .*ledger"):
        pace_of_run(str(tmp_path / "none"))


def test_files_that_are_not_here_count_as_the_configuration_says(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "1"}\n' * 3)
    train = f"tasks.train=[{{path: {tmp_path}/a.jsonl, kind: k}}]"
    test = "tasks.test=[{path: b.json, kind: k, count: 70}, {path: c.json, kind: k, count: 5}]"
    counts = count_tasks(load_config(["tasks=files", train, test, "retrieval.kind=none"]))
    assert (counts.train_tasks, counts.test_tasks) == (3, 75) and "2 files (b.json for one)" in counts.sources[1]


# -- the command


def test_the_command_tells_by_its_exit_code_and_as_json(capsys):
    assert plan.main([*PAPER, "--nodes", "2*8xH100", "--json", "--tokens-per-s", "2000"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and [each["role"] for each in told["memory"]] == ["teacher", "student", "learner"]
    assert plan.main(["--nodes", "CPU1", "learner.ranks=2"]) == 1
    shown = capsys.readouterr().out
    assert "all roles together want 2 CPU" in shown and "it does not fit: 1 thing" in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["learner.rank=2"], "config learner.rank: unknown key"),
        (["--nodes", "8xH101"], "'H101' in '8xH101' is unknown"),
        (["--from", "/no/such"], "--from /no/such: "),
        (["--address", "127.0.0.1:1"], "no Ray answers at 127.0.0.1:1 ('127.0.0.1:1'): Connection refused"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, complaint, capsys):
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_the_embedded_default_fits_this_machine(capsys):
    assert plan.main([]) == 0
    shown = capsys.readouterr().out
    assert "learner: rank of 1 CPU" in shown and "it fits" in shown


def test_nodes_alike_are_one_row(capsys):
    assert plan.main(["recipe=paper", "cluster=labelled", "--nodes", "3*8xH100 + 40*CPU64:env_node=1"]) == 0
    said = capsys.readouterr().out
    assert "8 nodes alike" in said and "node 5" in said and "node 7" not in said.split("the evaluation")[0]


def test_a_running_cluster_is_looked_at_and_left_as_it_was(ray_cluster):
    address = ray_cluster.get_runtime_context().gcs_address
    before = ray_cluster.available_resources()
    command = [sys.executable, "launch/plan.py", "--address", address, "--json", "cluster.roles.learner.num_cpus=9"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 1, ran.stderr
    told = json.loads(ran.stdout)
    assert told["nodes"][0]["total"] == {"CPU": 4} and "one node has to have 9 CPU" in told["warnings"][0]["text"]
    assert ray_cluster.available_resources() == before


@pytest.mark.slow
def test_several_nodes_hold_what_they_are_for():
    ran = subprocess.run(
        [sys.executable, "tests/several_nodes.py"], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["pipeline"] == {"a": 2, "b": 2}  # three GPUs a node: packed as they come, a group would be torn
    assert {"a", "b"} <= set(found["spread"])
    assert found["labelled"] == ["b", "b"] and found["custom"] == ["a", "a"]
    assert "one node has to have 4 GPU, and the largest has 3" in found["refused"]
