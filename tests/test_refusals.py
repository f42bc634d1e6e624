"""A number that makes no sense is refused in one line that names it, its value and what would be right, before anything
starts. What else is refused, and how, is tested beside what refuses it."""

from __future__ import annotations

import pytest

from envs.pool import EnvSpec
from launch.config import CollectConfig
from launch.config_reading import load_config
from learner.config import ConfigError

VLLM = ["teacher=vllm", "teacher.model=base_student"]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["rollout.workers=0"], "config rollout: workers=0 must be at least 1"),
        (["rollout.workers=-2"], "config rollout: workers=-2 must be at least 1"),
        (["rollout.concurrency=0"], "config rollout: concurrency=0 must be at least 1"),
        (["rollout.samples=0"], "config rollout: samples=0 must be at least 1"),
        (["rollout.queue_capacity=0"], "config rollout: queue_capacity=0 must be at least 1"),
        (["rollout.env_hosts=-1"], "config rollout: env_hosts=-1 must be at least 0"),
        (["rollout.env_timeout_s=0"], "config rollout: env_timeout_s=0.0 must be above 0"),
        (["rollout.env_timeout_s=nan"], "config rollout: env_timeout_s=nan must be above 0"),
        (["rollout.retry.engine=0"], "config rollout.retry: engine: 0 attempts; the first one counts too"),
        (["episode.max_steps=0"], "config episode: max_steps=0 must be at least 1"),
        (["episode.max_tokens=0"], "config episode: max_tokens=0 must be at least 1"),
        (["episode.candidates=0"], "config episode: candidates=0 must be at least 1"),
        (["episode.temperature=-1"], "config episode: temperature=-1.0 must be at least 0"),
        (["episode.top_p=0"], "config episode: top_p=0.0 must be above 0"),
        (["episode.top_p=2"], "config episode: top_p=2.0 must be within 0 and 1"),
        (["episode.deadline_s=0"], "config episode: deadline_s=0.0 must be above 0"),
        (["env.max_steps=0"], "config env: max_steps=0 must be at least 1"),
        (["env.search_results=0"], "config env: search_results=0 must be at least 1"),
        (["env.limits.tool_s=-1"], "config env.limits: tool_s=-1.0 must be positive"),
        (["env.mcp_servers=[{}]"], "an MCP server has either a command or a url"),
        (["tasks.arithmetic_share=2"], "config tasks: arithmetic_share=2.0 must be within 0 and 1"),
        (["retrieval.timeout_s=-1"], "config retrieval: timeout_s=-1.0 must be above 0"),
        (["cluster.gpus_per_worker=-1"], "config cluster: gpus_per_worker=-1.0 must be at least 0"),
        (["teachers=[{teacher: {kind: expert}, workers: 0}]"], "workers=0 must be at least 1"),
        (["teachers=[{teacher: {kind: expert}, concurrency: 0}]"], "concurrency=0 must be at least 1"),
        ([*VLLM, "teacher.max_num_seqs=0"], "config teacher: max_num_seqs=0 must be at least 1"),
        ([*VLLM, "teacher.data_parallel_size=0"], "config teacher: data_parallel_size=0 must be at least 1"),
        ([*VLLM, "teacher.gpu_memory_utilization=2"], "gpu_memory_utilization=2.0 must be within 0 and 1"),
        (["spend.tokens=-1"], "a spend cap of tokens=-1 allows nothing; give more than 0, or None"),
        (["split=dev"], "config split: Input should be 'train' or 'test' .it is 'dev'."),
        (["share=some"], "config share: Input should be 'split' or 'all' .it is 'some'."),
    ],
)  # fmt: skip
def test_a_number_out_of_bounds_is_named_with_what_would_be_right(overrides, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config(overrides, CollectConfig)
    assert "\n" not in str(caught.value)


def test_an_unknown_format_of_search_results_is_named():
    with pytest.raises(ValueError, match="'nope'.*numbered"):
        EnvSpec(search_format="nope")
