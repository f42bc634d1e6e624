"""Which policy a worker holds, as plain data: picklable, built in the worker's own process where its engine will
live."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.expert import ExpertPolicy
from rollout.policy import Policy

KINDS = ("expert", "vllm", "openai")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """A policy to be built. Fields that a kind does not use are ignored."""

    kind: str
    name: str = ""
    """Goes into every trajectory's key; empty takes the model's (see `policy_name`)."""
    model: str = ""
    """vllm: a Hugging Face id or folder; openai: the endpoint's model name."""
    base_url: str = ""
    api_key_env: str = "OPENAI_API_KEY"
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
    world_seed: int = 0
    """expert: the seed of the starter world that it knows by heart (chain of thought only)."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"policy kind {self.kind!r} is unknown; there are {', '.join(KINDS)}")
        if self.kind != "expert" and not self.model:
            raise ValueError(f"a policy of kind {self.kind!r} needs a model")

    @property
    def policy_name(self) -> str:
        """The name that the built policy will have."""
        if self.kind == "expert":
            return ExpertPolicy.name
        return self.name or self.model

    def environment(self) -> dict[str, str]:
        """Environment variables that must be set before the worker's process imports the engine."""
        if self.kind == "vllm":
            from rollout.vllm_policy import vllm_environment

            return vllm_environment()
        return {}

    def build(self) -> Policy:
        """Load it; heavy. Raises `PolicyError`."""
        if self.kind == "expert":
            from envs.starter import StarterWorld

            entities = StarterWorld(self.world_seed).encyclopedia.entities
            return ExpertPolicy({name: entity.facts for name, entity in entities.items()})
        if self.kind == "openai":
            from rollout.openai_policy import OpenAIPolicy

            return OpenAIPolicy(
                self.model, base_url=self.base_url or None, api_key_env=self.api_key_env, name=self.policy_name
            )
        from rollout.vllm_policy import VllmPolicy

        return VllmPolicy(
            self.model,
            name=self.policy_name,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            kv_cache_bytes=self.kv_cache_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            enforce_eager=self.enforce_eager,
        )
