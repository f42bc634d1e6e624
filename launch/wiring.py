"""Starts a run's actors from its configuration: retrieval, env hosts, rollout workers. Everything dies with the job."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.base import EnvError, Task
from envs.pool import start_env_hosts
from envs.retrieval.ray_service import NamedSearch, RayRetrieverClient, start_retrieval_actor
from envs.retrieval.spec import RetrieverSpec
from launch.config import DistillConfig
from rollout.collector import Collection, Weights, missing_requests, start_rollout_actors
from rollout.episode import EpisodeSettings
from rollout.ledger import Ledger
from rollout.policy_spec import PolicySpec

START_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Environments:
    """The running env hosts, and the retrieval behind them."""

    hosts: list[Any]
    retrieval: RayRetrieverClient | None

    @classmethod
    def start(cls, config: DistillConfig, retriever: RetrieverSpec | None) -> Environments:
        """Starts everything and returns at once; `wait_ready` before the first episode."""
        client = search = None
        if retriever is not None:
            offline = os.environ.get("HF_HUB_OFFLINE", "1" if retriever.encoder == "minilm" else "0")
            name = f"retrieval-{uuid.uuid4().hex[:12]}"
            actor = start_retrieval_actor(retriever, name=name, env_vars={"HF_HUB_OFFLINE": offline})
            client = RayRetrieverClient(actor, timeout_s=config.retrieval.timeout_s)
            search = NamedSearch(name, config.retrieval.timeout_s)
        slots = max(config.rollout.concurrency * config.rollout.workers, config.evaluate.concurrency)
        hosts = start_env_hosts(
            config.env,
            count=config.rollout.env_hosts,
            slots_per_host=-(-slots // config.rollout.env_hosts),
            search=search,
        )
        return cls(hosts, client)

    def wait_ready(self) -> bool:
        """Waits until the index is loaded and every host answers; returns whether they can preview.

        Raises `EnvError`.
        """
        import ray

        if self.retrieval is not None:
            self.retrieval.wait_ready(START_TIMEOUT_S)
        try:
            return all(ray.get([host.can_preview.remote() for host in self.hosts], timeout=START_TIMEOUT_S))
        except (ray.exceptions.RayError, TimeoutError) as error:  # type: ignore[attr-defined]
            raise EnvError(f"the env hosts could not start: {str(error).strip().splitlines()[-1]}") from error


def start_workers(config: DistillConfig, spec: PolicySpec, *, count: int) -> list[Any]:
    """Rollout actors for `spec`; an engine gets its GPUs, an API client or the expert needs none."""
    gpus = config.cluster.gpus_per_worker * spec.tensor_parallel_size if spec.kind == "vllm" else 0.0
    return start_rollout_actors(spec, count=count, num_gpus=gpus)


def start_collection(
    config: DistillConfig,
    environments: Environments,
    workers: list[Any],
    tasks: list[Task],
    *,
    policy: str,
    settings: EpisodeSettings,
    ledger: Path,
    samples: int = 1,
    queue: Any = None,
    weights: Weights | None = None,
    concurrency: int,
) -> Collection:
    """What of `tasks` x `samples` is not in the ledger yet, on `workers`. Waits for the environments first."""
    can_preview = environments.wait_ready()
    requests, found = missing_requests(tasks, policy=policy, settings=settings, ledger=Ledger(ledger), samples=samples)
    return Collection(
        workers,
        environments.hosts,
        requests,
        found=found,
        settings=settings,
        ledger=ledger,
        queue=queue,
        weights=weights,
        concurrency=concurrency,
        can_preview=can_preview,
        env_timeout_s=config.rollout.env_timeout_s,
    )
