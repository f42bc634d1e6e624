"""The typed schema of a run, and how it is read: Hydra composes `configs/`, pydantic checks it, before anything starts.

An unknown key, a wrong type or an impossible value ends in a `ConfigError` of one line that names it.

Example::

    config = load_config(["recipe=starter", "seed=1", "learner.epochs=2"])
    config.learner.epochs      # 2
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from envs.pool import EnvSpec
from envs.tasks import Columns
from learner.config import ConfigError, LearnerConfig
from rollout.episode import EpisodeSettings
from rollout.policy_spec import PolicySpec

DIALECT_OF_ENV = {"code": "code", "answer": "cot", "tool": "tool", "search": "search"}
CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


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
        if self.source == "files" and not (self.train and self.test):
            raise ValueError("source 'files' needs at least one file in both tasks.train and tasks.test")
        if self.train_count < 1 or self.test_count < 1:
            raise ValueError(
                f"train_count and test_count must be at least 1, not {self.train_count} and {self.test_count}"
            )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How trajectories are collected for training."""

    samples: int = 1
    """Trajectories of each training task."""
    workers: int = 1
    concurrency: int = 32
    """Episodes at a time, per worker."""
    env_hosts: int = 1
    env_timeout_s: float = 60.0
    queue_capacity: int = 256
    """Trajectories between rollout and learner; when it is full, rollout waits."""


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
    concurrency: int = 48
    dtype: str = "auto"
    kv_cache_mb: int | None = None
    enforce_eager: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The Ray cluster."""

    address: str = ""
    """Empty: `RAY_ADDRESS` when it is set (as in a Ray job), else a cluster of this machine that ends with the run."""
    num_cpus: int = 4
    """Logical CPUs of a local cluster; its actors share the real ones."""
    object_store_mb: int = 200
    gpus_per_worker: float = 0.0
    """GPUs of one vLLM engine, for each of its tensor-parallel ranks; 0 runs it on CPUs."""
    gpus_per_rank: float = 0.0
    """GPUs of one learner rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """A whole run of `launch/distill.py`."""

    recipe: str
    """Name of the recipe, for people."""
    seed: int
    run_dir: str
    """Everything the run leaves behind; a second run of the same command goes on in it."""
    tasks: TasksConfig
    env: EnvSpec
    retrieval: RetrievalConfig
    teacher: PolicySpec
    episode: EpisodeSettings
    """How teacher episodes are run."""
    rollout: RolloutConfig
    learner: LearnerConfig
    evaluate: EvaluateConfig
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        wanted = DIALECT_OF_ENV[self.env.name]
        if self.episode.dialect != wanted:
            raise ValueError(
                f"env.name {self.env.name!r} does not go with episode.dialect {self.episode.dialect!r}: "
                f"use episode.dialect={wanted}"
            )


def load_config(overrides: Sequence[str] = (), *, name: str = "distill") -> DistillConfig:
    """Compose `configs/<name>.yaml` with Hydra overrides and check it. Raises `ConfigError`."""
    return parse_config(compose(overrides, name=name))


def compose(overrides: Sequence[str] = (), *, name: str = "distill") -> dict[str, Any]:
    """The composed configuration as plain data, every interpolation resolved."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            composed = hydra_compose(name, overrides=[_override(text) for text in overrides])
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def parse_config(plain: Mapping[str, Any]) -> DistillConfig:
    """Plain data to the typed schema. Raises `ConfigError`."""
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(DistillConfig, plain, "")
    try:
        return TypeAdapter(DistillConfig).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], (dict, Mapping)) else f" (it is {first['input']!r})"
        raise ConfigError(f"config {place}: {message}{given}" if place else f"config: {message}") from None


def to_plain(config: Any) -> Any:
    """The typed configuration as JSON-able data."""
    if dataclasses.is_dataclass(config):
        return {spec.name: to_plain(getattr(config, spec.name)) for spec in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return config


def _override(text: str) -> str:
    """`a.b=1` may set a field that no YAML file names, since the schema has it; unknown ones are refused by the
    schema."""
    key = text.partition("=")[0]
    is_group = (CONFIG_FOLDER / key).is_dir()
    return text if is_group or not key[:1].isalpha() else f"++{text}"


def _refuse_unknown(schema: type, plain: Mapping[str, Any], place: str) -> None:
    """Pydantic lets unknown keys of standard dataclasses pass; a typo must not."""
    hints = get_type_hints(schema)
    for key, value in plain.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(hints)}"
            raise ConfigError(f"config {place}{key}: unknown key; {advice}")
        for nested in (hints[key], *get_args(hints[key])):
            if dataclasses.is_dataclass(nested) and isinstance(nested, type):
                items = value if isinstance(value, list) else [value]
                for item in items:
                    if isinstance(item, Mapping):
                        _refuse_unknown(nested, item, f"{place}{key}.")


def _one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's messages, without search paths and hints that span lines."""
    lines = [line.strip() for line in str(error).split("Config search path")[0].splitlines() if line.strip()]
    place = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return " ".join(["config", place]).strip() + ": " + " ".join(kept)
