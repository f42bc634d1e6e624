"""The typed schema of the jobs: `DistillConfig` of the whole loop, `CollectConfig` of collection alone.

`launch.config_reading` makes them of `configs/` and overrides. What both have is `JobConfig`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from envs.bounds import check_bounds
from envs.pool import EnvSpec
from envs.sandbox.session import MAX_CANDIDATES
from envs.tasks import Columns
from learner.config import LearnerConfig
from rollout.curation import Curation
from rollout.episode import EpisodeSettings
from rollout.placement import PLACE_S, RoleResources
from rollout.policy_spec import PolicySpec
from rollout.retries import RetryRule
from rollout.spend import SpendCap

DIALECT_OF_ENV = {"code": "code", "answer": "cot", "tool": "tool", "search": "search"}
OTHER_DIALECT_OF_ENV = {"answer": "direct"}
STORE_VARIABLES = [
    "AWS_ACCESS_KEY_ID",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "GOOGLE_APPLICATION_CREDENTIALS",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """A named file of tasks: scores are reported under `kind`."""

    path: str
    """JSON lines, the paper's JSON, Parquet, a saved data set's folder, or `hf:owner/name`; see `envs.task_files`."""
    kind: str
    grader: str = "exact"
    count: int | None = None
    """Take the first `count` tasks; None takes all."""
    columns: Columns = field(default_factory=Columns)
    """Where the file calls its columns something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksConfig:
    """Where tasks come from: the built-in starter world, or files."""

    source: Literal["starter", "files"] = "starter"
    seed: int = 0
    """starter: which world."""
    train_count: int = 3000
    test_count: int = 150
    """starter: held-out tasks of each kind."""
    arithmetic_share: float = 0.5
    train: tuple[TaskSet, ...] = ()
    test: tuple[TaskSet, ...] = ()
    drop_overlap: bool = False
    """files: leave training tasks out whose question is a test question too; without it such files are an error."""

    def __post_init__(self) -> None:
        if self.train_count < 1 or self.test_count < 1:
            raise ValueError(
                f"train_count and test_count must be at least 1, not {self.train_count} and {self.test_count}"
            )
        check_bounds(self, shares=("arithmetic_share",))


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalConfig:
    """What `web_search` searches."""

    kind: Literal["hybrid", "bm25", "dense", "none"] = "hybrid"
    corpus: str = ""
    """JSON lines of passages; empty takes the starter world's pages."""
    encoder: str = "minilm"
    """"minilm" (packaged, works offline) or a Hugging Face id or folder such as intfloat/e5-base-v2."""
    query_prefix: str = ""
    passage_prefix: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        check_bounds(self, above_0=("timeout_s",))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How trajectories are collected for training."""

    samples: int = 1
    """Trajectories of each training task."""
    workers: int = 1
    """At the start; what is lost is made up for as nodes are found."""
    max_workers: int | None = None
    """So many when nodes join that have room for more; None: no more than at the start."""
    min_workers: int = 1
    """With fewer it waits for some minutes that others come, then ends; the same command goes on."""
    concurrency: int = 32
    """Episodes at a time, per worker (and so per engine): the most, if `adaptive`."""
    adaptive: bool = True
    """Fewer at a time when an engine's KV cache is full, more again when it is not."""
    env_hosts: int = 1
    """Ray actors that hold the envs; 0: each worker has its envs in its own process, cheapest on one machine."""
    env_timeout_s: float = 60.0
    retry: RetryRule = RetryRule()
    """How many attempts of a failed episode are recorded, over all jobs, before it is quarantined."""
    retry_quarantined: bool = False
    """Try those again, too."""
    queue_capacity: int = 256
    """Trajectories between rollout and learner; when it is full, rollout waits."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            at_least_0=("env_hosts",),
            at_least_1=("samples", "workers", "max_workers", "min_workers", "concurrency", "queue_capacity"),
            above_0=("env_timeout_s",),
        )
        check_workers(self.workers, self.max_workers)
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} must not be more than workers={self.workers}")


def check_workers(workers: int, most: int | None) -> None:
    """Raises `ValueError`."""
    if most is not None and most < workers:
        raise ValueError(f"max_workers={most} must not be less than workers={workers}; leave it out for no more")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """How students are scored on held-out tasks."""

    max_tokens: int = 192
    max_model_len: int = 2048
    fruitless_steps: int = 2
    """Give an episode up after so many turns in a row without an action; 0 never does."""
    candidates: int = 8
    temperature: float = 0.4
    top_p: float = 0.8
    top_k: int = 20
    """As in `rollout.episode.EpisodeSettings`."""
    concurrency: int = 48
    rows: tuple[Literal["untrained", "student", "self_consistent", "teacher"], ...] = (
        "untrained", "student", "self_consistent", "teacher",
    )  # fmt: skip
    """Who is scored at the end of the main job."""
    validation_tasks: int = 48
    """learner.best_by "rollout_score": how many of the tasks that are held out of training a student is scored on."""
    during_training_every_steps: int = 0
    """Watch how well the student acts while it learns, after so many steps (`launch.evaluation.during_training`); 0: do
    not."""
    publish_deadline_s: float = 600.0
    """Within it a running engine has to have taken such a student's weights."""
    dtype: str = "auto"
    kv_cache_mb: int | None = None
    enforce_eager: bool = False
    engine: Literal["auto", "in_process", "own_process"] = "auto"
    """On a CPU: where the engine runs; see `rollout.vllm_policy`."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            at_least_0=("fruitless_steps", "temperature", "top_k", "during_training_every_steps"),
            at_least_1=("max_tokens", "max_model_len", "candidates", "concurrency", "validation_tasks", "kv_cache_mb"),
            above_0=("top_p", "publish_deadline_s"),
            shares=("top_p",),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolesConfig:
    """What each role of a job takes of the cluster, and where it may be; what is not said has the role's default."""

    teacher: RoleResources = RoleResources()
    """Workers with a teacher; num_gpus is of each rank of an engine, else cluster.gpus_per_worker."""
    student: RoleResources = RoleResources()
    """Workers that act with a student; likewise."""
    envs: RoleResources = RoleResources()
    """Hosts of envs (rollout.env_hosts of them, for each teacher); spread over the nodes."""
    retrieval: RoleResources = RoleResources()
    learner: RoleResources = RoleResources()
    """Ranks, together or not at all; 1 CPU and cluster.gpus_per_rank GPUs each, packed on few nodes."""
    services: RoleResources = RoleResources()
    """The queue and what hands out episodes: on the driver's node, unless resources or labels say where else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The Ray cluster."""

    address: str = ""
    """Empty: `RAY_ADDRESS` when it is set (as in a Ray job), else a cluster of this machine that ends with the run."""
    num_cpus: int = 4
    """Logical CPUs of a local cluster; its actors share the real ones."""
    object_store_mb: int = 200
    metrics_port: int | None = None
    """A local cluster: where Prometheus finds the job's metrics, and Ray's own; None: a port that is free, named in
    status.json. A cluster that is there already has its own (`ray start --metrics-export-port`)."""
    gpus_per_worker: float = 0.0
    """GPUs of one vLLM engine, for each of its tensor-parallel ranks; 0 runs it on CPUs."""
    gpus_per_rank: float = 0.0
    """GPUs of one learner rank."""
    roles: RolesConfig = field(default_factory=RolesConfig)
    place_s: float = PLACE_S
    """What others hold is waited for so long; then the job ends, and says what is missing."""
    autoscale: bool | None = None
    """Whether nodes may be added when they are asked for; None: as Ray tells. Then nothing is refused because no node
    has it yet."""
    autoscale_s: float = 900.0
    """place_s of such a cluster."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            at_least_0=("num_cpus", "gpus_per_worker", "gpus_per_rank"),
            at_least_1=("object_store_mb",),
            above_0=("place_s", "autoscale_s"),
        )
        if self.metrics_port is not None and not 1 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port must be 1 to 65535, or null for any that is free, not {self.metrics_port}")
        if self.metrics_port is not None and self.address:
            raise ValueError(
                f"metrics_port={self.metrics_port} is for a local cluster; the one at {self.address} has its own: "
                "ray start --metrics-export-port"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherShare:
    """One of several teachers."""

    teacher: PolicySpec
    weight: float = 1.0
    """`share: split`: its part of the episodes is its weight over the sum of all."""
    workers: int | None = None
    """None takes rollout.workers."""
    max_workers: int | None = None
    """None takes rollout.max_workers; where `workers` is given, no more than that."""
    concurrency: int | None = None
    """None takes rollout.concurrency."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"the weight of a teacher must be above 0, not {self.weight}")
        check_bounds(self, at_least_1=("workers", "max_workers", "concurrency"))
        if self.workers is not None:
            check_workers(self.workers, self.max_workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurationConfig:
    """Which trajectories a student is trained on."""

    filters: tuple[Any, ...] = ()
    """Names, or mappings of `name` and parameters; see `rollout.curation`."""

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Curation:
        return Curation.from_config(self.filters)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """What every job that collects has."""

    recipe: str
    """Name of the recipe, for people."""
    seed: int
    tasks: TasksConfig
    env: EnvSpec
    retrieval: RetrievalConfig
    teacher: PolicySpec
    teachers: tuple[TeacherShare, ...] = ()
    """Several teachers at once, instead of `teacher`."""
    share: Literal["split", "all"] = "split"
    """split: each (task, sample) goes to one teacher, by weight; all: every teacher does every one of them."""
    episode: EpisodeSettings
    """How teacher episodes are run."""
    rollout: RolloutConfig
    curation: CurationConfig
    """distill: what the learner is handed; collect: only counted, nothing is left out of the ledger."""
    spend: SpendCap = SpendCap()
    """What API teachers may cost in all, over every job on this folder."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        wanted = DIALECT_OF_ENV[self.env.name]
        if self.episode.dialect not in (wanted, OTHER_DIALECT_OF_ENV.get(self.env.name)):
            raise ValueError(
                f"env.name {self.env.name!r} does not go with episode.dialect {self.episode.dialect!r}: "
                f"use episode.dialect={wanted}"
            )
        if self.env.name not in ("code", "answer") and any(t.teacher.kind == "expert" for t in self.all_teachers):
            raise ValueError(
                f"the built-in expert knows the envs 'code' and 'answer', not {self.env.name!r}: choose another teacher"
            )
        if self.env.name == "code" and self.episode.candidates > MAX_CANDIDATES:
            raise ValueError(
                f"episode.candidates={self.episode.candidates}: the sandbox previews at most {MAX_CANDIDATES} at once"
            )
        names = Counter(share.teacher.policy_name for share in self.all_teachers)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two teachers are named {twice[0]!r}: give each a teacher.name of its own")

    @property
    def run_name(self) -> str:
        """What its metrics are labelled with: the name of its folder."""
        return self.recipe

    @property
    def all_teachers(self) -> tuple[TeacherShare, ...]:
        return self.teachers or (TeacherShare(teacher=self.teacher),)

    def variables(self) -> list[str]:
        """Of the environment: keys of endpoints, and how object stores are reached; workers need them too."""
        specs = [share.teacher for share in self.all_teachers]
        names = [spec.api_key_env for spec in specs if spec.kind not in ("expert", "vllm")]
        if self.env.judge is not None:
            names.append(self.env.judge.api_key_env)
        return list(dict.fromkeys(names))

    def episodes_of(self, tasks: int) -> int:
        """How many episodes a collection of so many tasks has."""
        return tasks * self.rollout.samples * (len(self.all_teachers) if self.share == "all" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig(JobConfig):
    """A whole run of `launch/distill.py`."""

    run_dir: str
    """Folder or `s3://bucket/path` of everything the run leaves behind; a second run of the same command goes on in
    it."""
    scratch: str = ""
    """Where machines work on a run that is kept in an object store, at the same path on each
    (`launch.bucket.stored_run`); empty: in the machine's folder for temporary files."""
    reuse: tuple[str, ...] = ()
    """Ledgers of earlier runs: those episodes of this run that they hold are taken from there (`launch.reuse`)."""
    learner: LearnerConfig
    evaluate: EvaluateConfig

    @property
    def run_name(self) -> str:
        return Path(self.run_dir).absolute().name

    def variables(self) -> list[str]:
        tracking = self.learner.tracking
        asked = {"WANDB_API_KEY": tracking.wandb_project, "MLFLOW_TRACKING_URI": tracking.mlflow_experiment}
        stores = STORE_VARIABLES if "://" in self.run_dir else []
        return JobConfig.variables(self) + [name for name, used in asked.items() if used] + stores

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)  # `super()` finds no class in a dataclass with slots
        if self.learner.publish_every_steps:
            raise ValueError(
                "learner.publish_every_steps is for learners that are handed a publisher; in this job, "
                "evaluate.during_training_every_steps says how often weights are published"
            )
        if self.evaluate.during_training_every_steps and self.learner.best_by == "rollout_score":
            raise ValueError(
                "evaluate.during_training_every_steps and learner.best_by 'rollout_score' both run the student while "
                "it learns; set one of them to its default"
            )
        if self.tasks.source == "files" and not (self.tasks.train and self.tasks.test):
            raise ValueError("source 'files' needs at least one file in both tasks.train and tasks.test")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig(JobConfig):
    """A run of `launch/collect.py`."""

    out: str
    """Folder or `s3://bucket/path` of everything that the collection leaves behind; run again, it goes on there."""
    scratch: str
    """Folder for what can be made again (index, caches)."""
    split: Literal["train", "test"] = "train"
    """Which of the tasks."""
    compact: bool = True
    """Merge the ledger's small shards, when a job goes on and when all is collected."""

    @property
    def run_name(self) -> str:
        return self.out.partition("?")[0].rstrip("/").rpartition("/")[2]

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)
        if self.tasks.source == "files" and not getattr(self.tasks, self.split):
            raise ValueError(f"source 'files' needs at least one file in tasks.{self.split}")

    def variables(self) -> list[str]:
        return JobConfig.variables(self) + (STORE_VARIABLES if "://" in self.out else [])
