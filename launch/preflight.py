"""Checks that cost nothing and save hours: done before a cluster, a model or a paid endpoint is touched in earnest."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config import CollectConfig, DistillConfig, JobConfig
from launch.reuse import check_reuse
from launch.spending import is_endpoint
from launch.world import load_world
from learner.config import ConfigError
from rollout.guidance import guide_text
from rollout.policy import PolicyError
from rollout.policy_spec import PolicySpec

if TYPE_CHECKING:
    from launch.evaluation.config import EvaluationConfig
    from launch.evaluation.folder import EvaluationFolder
    from launch.evaluation.tasks import EvaluationWorld


def check(config: DistillConfig) -> None:
    """Raises `ConfigError` or `ValueError` of one line: missing files, malformed tasks, an endpoint that does not
    answer."""
    from launch.bucket.stored_run import open_run
    from learner.needed_scores import configured_scorer, refuse_missing_scores
    from learner.objectives import OBJECTIVES, make_objective
    from learner.tracking import check_installed

    objective = config.learner.objective
    if objective not in OBJECTIVES:
        known = ", ".join(sorted(OBJECTIVES))
        raise ConfigError(f"config learner.objective: {objective!r} is unknown; there are {known}")
    try:
        made = make_objective(objective, **config.learner.objective_options)
    except ValueError as error:
        raise ConfigError(f"config learner.objective_options: {error}") from None
    refuse_missing_scores(config.learner, made, configured_scorer(config.learner))
    check_installed(config.learner.tracking)
    if config.learner.lora is not None and config.learner.lora.export == "adapter":
        raise ConfigError(
            "config learner.lora.export: 'adapter' is no student that can be scored alone; use 'merged' or 'both'"
        )
    _check_model("learner.model_path", config.learner.model_path)
    _check_lasting("run_dir", config.run_dir)
    check_reuse(config)
    _check_job(config, open_run(config).index)


def check_collection(config: CollectConfig) -> None:
    """The same for a collection."""
    from launch.collect_folder import CollectFolder

    _check_lasting("out", config.out)
    _check_job(config, CollectFolder(config.out, config.scratch).index)


def check_evaluation(config: EvaluationConfig, folder: EvaluationFolder) -> EvaluationWorld:
    """The same for an evaluation; returns its tasks, which are loaded now."""
    from launch.evaluation.tasks import load_tasks_of
    from rollout.adapter_merge import base_of

    spec = config.policy
    _check_lasting("out", config.out)
    if spec.kind == "vllm":
        _check_model("policy.model", spec.model)
    if spec.adapter:
        base_of(spec.adapter)
    if spec.kind == "vllm_server":
        _check_tokenizer("policy.tokenizer", spec.tokenizer or spec.model)
    _check_prices("policy", spec, config.spend.usd)
    folder.check(config)
    world = load_tasks_of(config, folder.index(config))
    if is_endpoint(spec):  # last: it waits for others
        _check_endpoint("policy", spec)
    return world


def _check_job(config: JobConfig, index: Path) -> None:
    several = len(config.all_teachers) > 1
    teachers = {
        f"teachers.{i}.teacher" if several else "teacher": share.teacher for i, share in enumerate(config.all_teachers)
    }
    for key, spec in teachers.items():
        if spec.kind == "vllm":
            _check_model(f"{key}.model", spec.model)
        if spec.kind == "vllm_server":
            _check_tokenizer(f"{key}.tokenizer", spec.tokenizer or spec.model)
        _check_prices(key, spec, config.spend.usd)
    _check_judge(config)
    if config.tasks.source == "files" or config.retrieval.corpus or config.env.context_passages:
        world = load_world(config, index)
        for task in world.train if config.episode.guide != "none" else ():
            guide_text(task, config.episode.guide)
    for key, spec in teachers.items():  # last: it waits for others
        if is_endpoint(spec):
            _check_endpoint(key, spec)


def _check_prices(key: str, spec: PolicySpec, usd: float | None) -> None:
    if is_endpoint(spec) and usd is not None and spec.prices is None:
        raise ConfigError(
            f"config {key}.prices: spend.usd={usd:g} is a cap in money, so prices are needed: "
            f"{key}.prices='{{prompt_usd_per_million: 0.15, completion_usd_per_million: 0.6}}', or cap spend.tokens"
        )


def _check_lasting(key: str, folder: str) -> None:
    """A submitted job runs in a copy of the working directory that Ray removes some day."""
    if "working_dir_files" in Path.cwd().parts and "://" not in folder and not Path(folder).is_absolute():
        raise ConfigError(
            f"config {key}: {folder!r} would vanish with the submitted job's copy; give an absolute path that all "
            "nodes share or s3://bucket/path"
        )


def _check_tokenizer(key: str, tokenizer: str) -> None:
    """As `_check_model`, for a folder that needs no model in it."""
    path = Path(tokenizer)
    looks_local = tokenizer.startswith((".", "/", "~")) or path.exists() or tokenizer.count("/") > 1
    if looks_local and not (path / "tokenizer_config.json").is_file():
        raise ConfigError(f"config {key}: {tokenizer!r} holds no tokenizer (no tokenizer_config.json there)")


def _check_model(key: str, model: str) -> None:
    """A path must hold a model; anything else is a hub id, which only the hub can check."""
    path = Path(model)
    looks_local = model.startswith((".", "/", "~")) or path.exists() or model.count("/") > 1
    if model != "base_student" and looks_local and not (path / "config.json").is_file():
        raise ConfigError(f"config {key}: {model!r} is no Hugging Face folder (no config.json there)")


def _check_judge(config: JobConfig) -> None:
    """A missing judge or key is found now, not at the first answer."""
    judged = [task_set.path for task_set in (*config.tasks.train, *config.tasks.test) if task_set.grader == "judge"]
    if not judged:
        return
    judge = config.env.judge
    if judge is None:
        raise ConfigError(f"config env.judge: {judged[0]!r} has the grader 'judge', so env.judge.model must be set")
    if judge.base_url is None and not os.environ.get(judge.api_key_env):
        raise ConfigError(f"config env.judge: the variable {judge.api_key_env} is not set; it holds the endpoint's key")


def _check_endpoint(key: str, spec: PolicySpec) -> None:
    async def ask() -> None:
        policy = spec.build()
        try:
            await policy.check()  # type: ignore[attr-defined]  # only endpoints are asked
        finally:
            await policy.close()

    try:
        asyncio.run(ask())
    except PolicyError as error:
        raise ConfigError(f"config {key}: {error}") from None
