"""Real trajectories of the built-in teacher, for tests: in code (real sandbox and search) and in words."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import lru_cache

from envs.base import Task
from envs.pool import EnvHost, EnvSpec
from envs.retrieval.bm25 import Bm25Retriever
from envs.retrieval.corpus import Corpus, Passage
from envs.starter import StarterWorld
from rollout.async_env import ThreadedEnv
from rollout.episode import EpisodeSettings, run_episode
from rollout.expert import ExpertPolicy
from rollout.trajectory import Trajectory

CODE_POLICY, COT_POLICY = "expert-code", "expert-cot"
"""Names of the two in `expert_trajectories`. In words, the expert knows no facts: it solves arithmetic alone."""


@lru_cache
def expert_trajectories(count: int, *, seed: int = 0) -> tuple[tuple[Trajectory, ...], tuple[Trajectory, ...]]:
    """`count` tasks of the starter world, solved in code and in words; made once a process."""
    world = StarterWorld(seed=1)
    tasks = world.train_tasks(count, seed=seed)
    pages = Corpus(Passage(id=i, title=title, text=text) for i, title, text in world.passages())
    retriever = Bm25Retriever.build(pages)
    coded = _run(tasks, EnvSpec(), "code", CODE_POLICY, retriever)
    return coded, _run(tasks, EnvSpec(name="answer"), "cot", COT_POLICY, retriever)


def _run(
    tasks: list[Task], spec: EnvSpec, dialect: str, policy: str, retriever: Bm25Retriever
) -> tuple[Trajectory, ...]:
    host = EnvHost(spec, lambda query, k: retriever.search([query], k)[0])
    settings = EpisodeSettings(dialect=dialect)

    async def run() -> list[Trajectory]:
        env = ThreadedEnv(host.make())
        try:
            return [await run_episode(task, policy=ExpertPolicy(), env=env, settings=settings) for task in tasks]
        finally:
            await env.close()

    try:
        trajectories = asyncio.run(run())
    finally:
        host.close()
    return tuple(
        replace(each, policy=policy, key=settings.key(each.task, policy, each.sample_index)) for each in trajectories
    )
