"""The typed schema of `launch/evaluate.py`: which policy, on which tasks, in which modes.

It holds what a person says; `EvaluationConfig.job` is what that comes to for one mode, with the mode's env, dialect and
sampling, in the form that actors are started from. `launch.evaluation.reading` makes it of `configs/` and overrides.

Example::

    config = load_evaluation(["policy=expert", "modes=[agent,cot]", "tasks.test_count=20"])
    config.job("cot").env.name        # "answer"
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from envs.bounds import check_bounds
from envs.pool import EnvSpec
from launch.config import (
    ClusterConfig,
    CurationConfig,
    EvaluateConfig,
    JobConfig,
    RetrievalConfig,
    RolloutConfig,
    TasksConfig,
)
from launch.evaluation.modes import Mode, mode_env, mode_settings, refuse, runs_of
from rollout.episode import EpisodeSettings
from rollout.policy_spec import PolicySpec
from rollout.spend import SpendCap

FactualGrader = Literal["judge", "exact", "f1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSet:
    """One set of questions of a benchmark."""

    kind: str
    """Its scores are reported under this name."""
    file: str
    """A name or a pattern; looked for in `BenchmarkConfig.folder` and in the folders below it."""
    answers: Literal["factual", "math"]
    domain: Literal["in", "out"]
    """Whether the paper's students were trained on questions of this kind."""
    count: int
    """The first so many questions of the file are taken; fewer are said to be fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """Several sets whose scores are averaged, each set counting the same. No name: none."""

    name: str = ""
    folder: str = ""
    factual: FactualGrader = "judge"
    """Who grades factual answers: an LLM judge (`env.judge`), or exact match or F1 where there is none."""
    count: int | None = None
    """Take fewer questions of each set."""
    sets: tuple[BenchmarkSet, ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self, at_least_1=("count",))
        if self.name and not self.sets:
            raise ValueError(f"benchmark {self.name!r} has no sets")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationJob(JobConfig):
    """One mode of an evaluation, as a job: its `teacher` is the policy that is evaluated."""

    evaluate: EvaluateConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """A call of `launch/evaluate.py`."""

    run: str = ""
    """The folder of a finished run whose world, settings and student these are; "" for none."""
    label: str
    """Name of the task set, for people and folders."""
    seed: int
    policy: PolicySpec
    prompt: Literal["student", "teacher"] = "student"
    """Which system prompt the policy is shown: the one line that our students are trained with, or a long one with the
    tools and worked examples, for models that were not trained on our formats."""
    modes: tuple[Mode, ...]
    samples: int = 1
    """Runs of each task, for pass@k and mean@k; more than one are sampled at evaluate.temperature."""
    passages: int = 3
    """cot_rag: how many are shown."""
    tasks: TasksConfig
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    env: EnvSpec
    retrieval: RetrievalConfig
    episode: EpisodeSettings
    evaluate: EvaluateConfig
    rollout: RolloutConfig
    spend: SpendCap = SpendCap()
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    out: str
    """Folder of ledgers and results; another call with other policies or modes adds to it."""

    def __post_init__(self) -> None:
        check_bounds(self, at_least_1=("samples", "passages"))
        if not self.modes:
            raise ValueError("modes names none; give one or more, such as modes=[agent,agent_sc]")
        if len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes names one twice: {', '.join(self.modes)}")
        if not self.benchmark.name and self.tasks.source == "files" and not self.tasks.test:
            raise ValueError("source 'files' needs at least one file in tasks.test")
        if self.benchmark.name and self.policy.kind == "expert":
            raise ValueError(
                f"the built-in expert knows the starter world alone, not benchmark {self.benchmark.name!r}"
            )
        for mode in self.modes:
            refuse(
                mode, env=self.env, policy=self.policy, samples=self.samples, retrieval=self.retrieval.kind
            )  # fmt: skip
            self.job(mode)

    def job(self, mode: str, tasks: TasksConfig | None = None) -> EvaluationJob:
        """What one mode comes to; `tasks`: the files of a benchmark. Raises `ValueError` for what cannot be."""
        env = mode_env(mode, self.env, passages=self.passages)
        evaluate = self.evaluate
        if self.policy.kind == "vllm" and self.policy.max_model_len != evaluate.max_model_len:
            evaluate = replace(evaluate, max_model_len=self.policy.max_model_len)
        return EvaluationJob(
            recipe=self.label,
            seed=self.seed,
            tasks=tasks or self.tasks,
            env=env,
            retrieval=self.retrieval,
            teacher=self.policy,
            episode=self.settings(mode),
            rollout=self.rollout,
            curation=CurationConfig(),
            spend=self.spend,
            cluster=self.cluster,
            evaluate=evaluate,
        )

    def settings(self, mode: str) -> EpisodeSettings:
        """How its episodes are run."""
        env = mode_env(mode, self.env, passages=self.passages)
        return mode_settings(
            mode, self.episode, self.evaluate, env=env, prompt=self.prompt, samples=self.samples
        )  # fmt: skip

    def runs(self, mode: str) -> int:
        """Of each task."""
        return runs_of(mode, self.evaluate, self.samples)
