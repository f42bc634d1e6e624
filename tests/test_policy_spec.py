"""`rollout.policy_spec`: what YAML may say of a policy, and what is refused before anything is built."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
from typing import Any

import pytest
from fault_server import FaultServer
from pydantic import TypeAdapter

from rollout.openai_policy import OpenAIPolicy
from rollout.policy import Sampling
from rollout.policy_spec import PolicySpec
from rollout.rate_limits import RateLimits, Retries
from rollout.spend import Prices
from rollout.spend_meters import LocalMeter
from rollout.trajectory import Message

ENDPOINT: dict[str, Any] = {
    "kind": "openai",
    "model": "gpt-x",
    "base_url": "https://api.example.com/v1",
    "api_key_env": "TEACHER_KEY",
    "timeout_s": 30,
    "concurrency": 8,
    "retries": {"per_call": 2, "share": 0.1},
    "rate_limits": {"requests_per_minute": 500, "tokens_per_minute": 200000},
    "prices": {"prompt_usd_per_million": 0.5, "completion_usd_per_million": 2, "cached_prompt_usd_per_million": 0.05},
    "cache_path": "cache/teacher.sqlite",
    "prefill": "message",
    "stream": True,
    "extra_body": {"reasoning_effort": "low"},
}


def test_yaml_becomes_a_spec_of_typed_parts() -> None:
    spec = TypeAdapter(PolicySpec).validate_python(ENDPOINT)
    assert spec.prices == Prices(
        prompt_usd_per_million=0.5, completion_usd_per_million=2.0, cached_prompt_usd_per_million=0.05
    )
    assert spec.rate_limits == RateLimits(requests_per_minute=500, tokens_per_minute=200_000)
    assert spec.retries == Retries(per_call=2, share=0.1)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_the_schema_of_jobs_knows_every_field(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.config_reading import load_config

    overrides = ["recipe=starter", "teacher=openai", "teacher.model=gpt-x", "teacher.base_url=http://teacher:8000/v1"]
    config = load_config(
        [*overrides, "teacher.prices={prompt_usd_per_million: 1, completion_usd_per_million: 2}"]
        + ["teacher.rate_limits.requests_per_minute=60", "teacher.retries.per_call=1"]
    )
    assert config.teacher.prices == Prices(prompt_usd_per_million=1.0, completion_usd_per_million=2.0)
    assert (config.teacher.rate_limits.requests_per_minute, config.teacher.retries.per_call) == (60, 1)
    with pytest.raises(ValueError, match="teacher.rate_limits.requests_per_minuet: unknown key; did you mean"):
        load_config([*overrides, "teacher.rate_limits.requests_per_minuet=60"])


def test_a_spec_builds_what_it_says() -> None:
    with FaultServer(share=0) as server:
        spec = PolicySpec(
            kind="openai",
            model="m",
            base_url=server.base_url,
            extra_body={"reasoning_effort": "low"},
            prices=Prices(prompt_usd_per_million=1.0, completion_usd_per_million=1.0),
        )
        meter = LocalMeter()
        policy = spec.build(meter=meter)
        assert isinstance(policy, OpenAIPolicy)

        async def scenario() -> None:
            try:
                await policy.complete([Message(role="user", content="Hello.")], Sampling())
            finally:
                await policy.close()

        asyncio.run(scenario())
        assert server.bodies[0]["reasoning_effort"] == "low"
    spent = asyncio.run(meter.snapshot())
    assert (spent.requests, spent.spent_usd > 0) == (1, True)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": "vllm", "model": "x", "base_url": "http://t:1/v1"}, "base_url='http://t:1/v1' is for a policy of kind"),
    ({"kind": "vllm", "model": "x", "cache_path": "c"}, "cache_path='c' is for a policy of kind 'openai' or"),
    (
        {"kind": "expert", "prices": Prices(prompt_usd_per_million=1.0, completion_usd_per_million=1.0)},
        "is for a policy of kind 'openai' or 'vllm_server', not 'expert'",
    ),
    ({"kind": "vllm", "model": "x", "retries": Retries(per_call=0)}, "not 'vllm'"),
    ({"kind": "openai", "model": "x", "tokenizer": "t"}, "tokenizer='t' is for a policy of kind 'vllm_server'"),
    ({"kind": "vllm_server", "model": "x", "base_url": "http://t:1/v1", "prefill": "none"}, "prefill='none' is for"),
    ({"kind": "vllm_server", "model": "x"}, "kind 'vllm_server' needs a base_url, such as http://teacher:8000/v1"),
    ({"kind": "openai"}, "a policy of kind 'openai' needs a model"),
    ({"kind": "openai", "model": "x", "base_url": "teacher:8000"}, "base_url 'teacher:8000' is no address"),
    ({"kind": "openai", "model": "x", "base_url": "http://me:secret@t/v1"}, "keys come from the environment"),
    ({"kind": "openai", "model": "x", "concurrency": 0}, "concurrency of at least 1"),
    ({"kind": "openai", "model": "x", "timeout_s": 0}, "timeout_s above 0"),
    ({"kind": "anthropic", "model": "x"}, "'anthropic' is unknown; there are expert, vllm, openai, vllm_server"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_impossible_is_refused_by_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        PolicySpec(**fields)
    assert "secret" not in str(caught.value)


def test_the_fields_of_before_still_do() -> None:
    assert PolicySpec(kind="expert").policy_name
    assert PolicySpec(kind="openai", model="m", base_url="http://t:1/v1", api_key_env="K", name="n").policy_name == "n"
    spec = PolicySpec(kind="vllm", model="m", tensor_parallel_size=2, dtype="bfloat16")
    assert dataclasses.replace(spec, name="other").policy_name == "other"
