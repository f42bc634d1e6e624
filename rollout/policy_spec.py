"""Which policy a worker holds, as plain data: picklable, built in the worker's own process where its engine will
live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal
from urllib.parse import urlsplit

from envs.bounds import check_bounds
from rollout.expert import ExpertPolicy
from rollout.policy import Policy
from rollout.rate_limits import RateLimits, Retries
from rollout.spend import Meter, Prices

KINDS = ("expert", "vllm", "openai", "vllm_server")
_ENDPOINTS = ("openai", "vllm_server")
_KINDS_OF_FIELD = {
    **dict.fromkeys(("base_url", "retries", "rate_limits", "prices", "cache_path"), _ENDPOINTS),
    **dict.fromkeys(("prefill", "stream", "extra_body"), ("openai",)),
    "tokenizer": ("vllm_server",),
    "adapter": ("vllm",),
}
"""To set one of these for another kind is a mistake, and may be a costly one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """A policy to be built.

    The engine's fields (dtype and below) are ignored by other kinds than "vllm"; those of an endpoint, set for another
    kind, are refused. Raises `ValueError` for impossible values.
    """

    kind: str
    name: str = ""
    """Goes into every trajectory's key; empty takes the model's (see `policy_name`)."""
    model: str = ""
    """vllm: a Hugging Face id or folder; openai and vllm_server: the endpoint's model name."""
    base_url: str = ""
    """Such as http://teacher:8000/v1; empty is OpenAI's own (kind "openai" only)."""
    api_key_env: str = "OPENAI_API_KEY"
    """Variable that holds the key; it may be unset for endpoints on this machine or its private network."""
    timeout_s: float = 60.0
    """Of one attempt of a request; with `stream`, of the wait for each piece."""
    concurrency: int = 32
    """Requests of one worker that are out at once."""
    retries: Retries = field(default_factory=Retries)
    rate_limits: RateLimits = field(default_factory=RateLimits)
    """Of one worker."""
    prices: Prices | None = None
    """What the endpoint charges; a spend cap in money needs them."""
    cache_path: str = ""
    """File of answers that are not asked, nor paid, again; of one machine. Empty: none."""
    prefill: Literal["auto", "continue", "message", "none"] = "auto"
    """openai: how a turn's given beginning reaches the endpoint; see `rollout.openai_policy`."""
    stream: bool = False
    """openai: take answers piece by piece, for gateways that end a silent connection."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """openai: further fields of each request, such as {reasoning_effort: low}; give the policy a `name` of its own
    where they change what is sampled."""
    tokenizer: str = ""
    """vllm_server: the folder or Hugging Face id of the served model's tokenizer; empty takes `model`."""
    adapter: str = ""
    """vllm: a PEFT folder whose adapter is merged into `model` when it is loaded; see `rollout.adapter_merge`."""
    dtype: str = "auto"
    max_model_len: int = 4096
    max_num_seqs: int = 64
    tensor_parallel_size: int = 1
    """GPUs that share each layer."""
    pipeline_parallel_size: int = 1
    """Groups of such GPUs that share the layers between them, over nodes if need be."""
    data_parallel_size: int = 1
    """Engines, each with all the weights on GPUs of its own; each is a worker."""
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    enforce_eager: bool = False
    engine: Literal["auto", "in_process", "own_process"] = "auto"
    """vllm on a CPU: where the engine runs; see `rollout.vllm_policy`."""
    world_seed: int = 0
    """expert: the seed of the starter world that it knows by heart (chain of thought only)."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"policy kind {self.kind!r} is unknown; there are {', '.join(KINDS)}")
        if self.kind != "expert" and not self.model:
            raise ValueError(f"a policy of kind {self.kind!r} needs a model")
        engines = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        check_bounds(
            self,
            at_least_1=("max_model_len", "max_num_seqs", "kv_cache_bytes", *engines),
            above_0=("gpu_memory_utilization",),
            shares=("gpu_memory_utilization",),
        )
        for spec in fields(self):
            kinds = _KINDS_OF_FIELD.get(spec.name, KINDS)
            value = getattr(self, spec.name)
            if self.kind not in kinds and value != _default(spec):
                wanted = " or ".join(repr(kind) for kind in kinds)
                raise ValueError(f"{spec.name}={value!r} is for a policy of kind {wanted}, not {self.kind!r}")
        self._check_endpoint()

    def _check_endpoint(self) -> None:
        if self.kind not in _ENDPOINTS:
            return
        if self.kind == "vllm_server" and not self.base_url:
            raise ValueError("a policy of kind 'vllm_server' needs a base_url, such as http://teacher:8000/v1")
        address = urlsplit(self.base_url)
        if self.base_url and not (address.scheme in ("http", "https") and address.hostname):
            raise ValueError(f"base_url {self.base_url!r} is no address; give one such as http://teacher:8000/v1")
        if address.username or address.password:
            raise ValueError("base_url holds a user name or a password; keys come from the environment: api_key_env")
        if self.concurrency < 1 or not self.timeout_s > 0:
            raise ValueError(
                f"an endpoint needs concurrency of at least 1 and timeout_s above 0, "
                f"not {self.concurrency} and {self.timeout_s:g}"
            )

    @property
    def policy_name(self) -> str:
        """The name that the built policy will have."""
        if self.kind == "expert":
            return ExpertPolicy.name
        return self.name or self.adapter or self.model

    def environment(self) -> dict[str, str]:
        """Environment variables that must be set before the worker's process imports the engine."""
        if self.kind == "vllm":
            from rollout.vllm_policy import vllm_environment

            return vllm_environment()
        return {}

    def build(self, meter: Meter | None = None) -> Policy:
        """Load it; heavy. What an endpoint's calls cost goes to `meter`. Raises `PolicyError`."""
        if self.kind == "expert":
            from envs.starter import StarterWorld

            entities = StarterWorld(self.world_seed).encyclopedia.entities
            return ExpertPolicy({name: entity.facts for name, entity in entities.items()})
        if self.kind == "openai":
            from rollout.openai_policy import OpenAIPolicy

            return OpenAIPolicy(
                self.model,
                base_url=self.base_url or None,
                **self._endpoint(),
                prefill=self.prefill,
                stream=self.stream,
                extra_body=self.extra_body,
                meter=meter,
            )
        if self.kind == "vllm_server":
            from rollout.vllm_server_policy import VllmServerPolicy

            return VllmServerPolicy(
                self.model,
                base_url=self.base_url,
                tokenizer=self.tokenizer,
                **self._endpoint(),
                meter=meter,
            )
        if self.adapter:
            from rollout.adapter_merge import merged_model

            with merged_model(self.model, self.adapter) as folder:  # which the engine has read when it is built
                return self._engine(str(folder))
        return self._engine(self.model)

    def _engine(self, model: str) -> Policy:
        from rollout.vllm_policy import VllmPolicy

        return VllmPolicy(
            model,
            name=self.policy_name,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            kv_cache_bytes=self.kv_cache_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            distributed_executor=self._executor(),
            enforce_eager=self.enforce_eager,
            engine=self.engine,
        )

    def _executor(self) -> str | None:
        """Over nodes only Ray can start the ranks, in the bundles that `rollout.placement` reserved. On one node it
        must not, though vLLM would choose so where it finds itself in a placement group."""
        if self.pipeline_parallel_size > 1:
            return "ray"
        return "mp" if self.tensor_parallel_size > 1 else None

    def _endpoint(self) -> dict[str, Any]:
        """What all clients of endpoints are built with."""
        return {
            "name": self.policy_name,
            "api_key_env": self.api_key_env,
            "timeout_s": self.timeout_s,
            "concurrency": self.concurrency,
            "retries": self.retries,
            "rate_limits": self.rate_limits,
            "prices": self.prices,
            "cache_path": self.cache_path,
        }


def _default(spec: Field[Any]) -> Any:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()
