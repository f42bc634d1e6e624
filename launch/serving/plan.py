"""What is asked or served, chosen and checked before anything is started: `AgentPlan`.

An agent is a policy, the env that it acts in and how its episodes run. The policy is the student of a run, another
student's folder, or the run's own teacher; env, retrieval and settings are the run's, or those that overrides compose
as for `launch/distill.py`.

Example::

    plan = plan_agent(run="runs/starter-seed0")
    plan_agent(student="runs/starter-seed0/learner/snapshots/0.1")      # the run is found above that folder
    plan_agent(run="runs/starter-seed0", policy="teacher")
    plan_agent(student="my-model", overrides=["recipe=paper", "retrieval.corpus=wiki.jsonl"])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from envs.base import Task
from envs.pool import EnvSpec
from envs.retrieval.spec import RetrieverSpec
from envs.sandbox.session import MAX_CANDIDATES
from launch.config import DistillConfig
from launch.config_reading import load_config
from launch.evaluation.scoring import student_settings, student_spec
from launch.run_folder import RunFolder
from launch.world import load_world
from learner.config import ConfigError
from rollout.episode import EpisodeSettings
from rollout.policy_spec import PolicySpec

POLICIES = ("student", "teacher")
CHARACTERS_OF_A_TOKEN = 8
"""More than any language has: a longer question cannot fit and need not be counted in tokens."""
_MOST_CHARACTERS = 400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentPlan:
    """Plain data; nothing is started."""

    name: str
    """For people and clients: the run's, with the student folder's where it is another."""
    spec: PolicySpec
    env: EnvSpec
    retriever: RetrieverSpec | None
    greedy: EpisodeSettings
    """How a question is answered with one candidate a step."""
    voting: EpisodeSettings
    """How it is answered with several."""
    env_timeout_s: float = 60.0
    """Of each call of an env."""
    search_timeout_s: float = 30.0
    tasks: tuple[Task, ...] = ()
    """The run's held-out tasks, to try."""

    @property
    def most_characters(self) -> int:
        """Of a question."""
        if self.spec.kind != "vllm":
            return _MOST_CHARACTERS
        return min(_MOST_CHARACTERS, CHARACTERS_OF_A_TOKEN * self.spec.max_model_len)

    def settings(self, candidates: int) -> EpisodeSettings:
        """Those of an episode with so many candidates a step. Raises `ValueError` for an impossible number."""
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, not {candidates}")
        if candidates > MAX_CANDIDATES:
            raise ValueError(f"candidates must be at most {MAX_CANDIDATES}, not {candidates}: the sandbox runs no more")
        return self.greedy if candidates == 1 else replace(self.voting, candidates=candidates)


def plan_agent(
    *, run: str = "", student: str = "", policy: str = "student", engine: str = "", overrides: Sequence[str] = ()
) -> AgentPlan:
    """`engine` overrides where the student's vLLM runs. Raises `ValueError` (`ConfigError`, `RunFolderError`) or
    `EnvError` for what cannot be, with what would be right."""
    if policy not in POLICIES:
        raise ConfigError(f"policy {policy!r} is unknown; there are {', '.join(POLICIES)}")
    if policy == "teacher" and student:
        raise ConfigError(f"a teacher is named by the run, so leave the student {student!r} out")
    if student and not (Path(student) / "config.json").is_file():
        raise ConfigError(f"student {student!r} is no Hugging Face folder: it holds no config.json")
    if run and overrides:
        raise ConfigError(f"{overrides[0]!r}: a run has its own configuration; give overrides without a run")
    if overrides:
        config = load_config(overrides)
        folder = RunFolder(config.run_dir)
    else:
        folder = RunFolder(run or (_run_above(student) if student else newest_run()))
        config = folder.config()
    if engine:
        config = replace(config, evaluate=replace(config.evaluate, engine=engine))
    spec, greedy, voting = _teacher(config) if policy == "teacher" else _student(config, folder, student)
    world = load_world(config, folder.index)
    name = folder.path.name
    if student:
        own = Path(student).absolute().name
        name = own if overrides else f"{name}-{own}"
    return AgentPlan(
        name=name if policy == "student" else f"{name}-teacher",
        spec=spec,
        env=replace(config.env, judge=None),  # nobody grades what is asked here
        retriever=world.retriever,
        greedy=greedy,
        voting=voting,
        env_timeout_s=config.rollout.env_timeout_s,
        search_timeout_s=config.retrieval.timeout_s,
        tasks=tuple(world.test),
    )


def newest_run() -> Path:
    """The folder of the run that finished last under runs/. Raises `ConfigError`."""
    finished = sorted(Path("runs").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise ConfigError("no finished run under runs/: run launch/distill.py first, or name one with --run")
    return finished[-1].parent


def _run_above(student: str) -> Path:
    """The run that a student's folder lies in. Raises `ConfigError`."""
    place = Path(student).absolute()
    for parent in place.parents:
        if (parent / "config.json").is_file() and (parent / "ledger").is_dir():
            return parent
    raise ConfigError(
        f"student {student!r} lies in no run, so its env is unknown: name a run whose env it is to act in, or give a "
        "configuration, such as recipe=starter"
    )


def _student(
    config: DistillConfig, folder: RunFolder, student: str
) -> tuple[PolicySpec, EpisodeSettings, EpisodeSettings]:
    place = Path(student) if student else folder.student
    if not (place / "config.json").is_file():
        raise ConfigError(f"{place} holds no student yet: let launch/distill.py finish, or name one with --student")
    spec = student_spec(config, str(place.absolute()))
    return spec, student_settings(config, "greedy"), student_settings(config, "self_consistent")


def _teacher(config: DistillConfig) -> tuple[PolicySpec, EpisodeSettings, EpisodeSettings]:
    evaluate = config.evaluate
    greedy = replace(config.episode, guide="none", candidates=1)  # a question that is asked has no solution to show
    voting = replace(
        greedy,
        candidates=evaluate.candidates,
        temperature=greedy.temperature or evaluate.temperature,
        top_p=greedy.top_p if greedy.temperature else evaluate.top_p,
        top_k=greedy.top_k if greedy.temperature else evaluate.top_k,
    )
    return config.all_teachers[0].teacher, greedy, voting
