"""How `EvaluationConfig` is read: Hydra composes `configs/evaluate.yaml`, a run's own settings go in between, and what
the command line says comes last.

`run=RUN` takes the world (tasks, env, retrieval), the settings and the student of a run; a group that the command line
chooses (`tasks=files`, `benchmark=paper8`, `policy=openai`) is taken from there instead.

Example::

    load_evaluation(["run=runs/starter-seed0", "modes=[agent,agent_sc]", "tasks.test_count=300"])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.config import DIALECT_OF_ENV
from launch.config_reading import CONFIG_FOLDER, local_folder, parse_config, to_plain
from launch.evaluation.config import EvaluationConfig
from launch.evaluation.modes import OLD_NAMES
from learner.base_student import BASE_STUDENT_FOLDER
from learner.config import ConfigError
from rollout.adapter_merge import base_of

NAME = "evaluate"
GROUPS = ("tasks", "env", "retrieval", "rollout", "evaluate", "cluster", "policy", "benchmark")
_OF_THE_RUN = ("tasks", "env", "retrieval", "episode", "evaluate", "rollout", "cluster")
_TASK_FILES = (".jsonl", ".json", ".parquet")


def load_evaluation(overrides: Sequence[str] = ()) -> EvaluationConfig:
    """Raises `ConfigError`."""
    return parse_evaluation(compose_evaluation(overrides))


def parse_evaluation(plain: dict[str, Any]) -> EvaluationConfig:
    """Plain data to the typed schema. Raises `ConfigError`."""
    return parse_config(plain, EvaluationConfig)


def compose_evaluation(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The composed configuration as plain data, every interpolation resolved. Raises `ConfigError`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    OmegaConf.register_new_resolver("local_folder", local_folder, replace=True)
    OmegaConf.register_new_resolver("dialect_of", lambda env: DIALECT_OF_ENV.get(env, "code"), replace=True)
    OmegaConf.register_new_resolver("megabytes", lambda mb: None if mb is None else int(mb) << 20, replace=True)
    OmegaConf.register_new_resolver("sequences", lambda episodes: 4 * max(int(episodes), 8), replace=True)
    OmegaConf.register_new_resolver("label_of", lambda name, source: name or source, replace=True)
    run, given = _run_of(overrides)
    given = [each for text in given for each in _override(text)]
    groups = {text.partition("=")[0] for text in given if not text.startswith("++")}
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            composed: Any = compose(NAME, overrides=given)
        OmegaConf.set_struct(composed, False)
        if run is not None:
            _take_run(composed, run, groups)
            parser = OverridesParser.create()
            for override in parser.parse_overrides([text for text in given if text.startswith("++")]):
                OmegaConf.update(composed, override.key_or_group, override.value(), force_add=True)
        _fill(composed)
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _run_of(overrides: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The run, and the overrides, with `run` made absolute."""
    run, given = None, []
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key != "run":
            given.append(text)
        elif value:
            run = Path(value).absolute()
            if not (run / "config.json").is_file():
                raise ConfigError(f"config run: {value!r} holds no run: there is no config.json")
    return run, given


def _take_run(composed: Any, run: Path, groups: set[str]) -> None:
    from omegaconf import OmegaConf

    from launch.run_folder import RunFolder, RunFolderError

    folder = RunFolder(run)
    try:
        config = to_plain(folder.config())
    except (RunFolderError, json.JSONDecodeError) as error:
        raise ConfigError(f"config run: {error}") from None
    composed.run = str(run)
    composed.seed = config["seed"]
    foreign = bool(groups & {"tasks", "benchmark"})
    if not foreign:
        composed.label = "starter" if config["tasks"]["source"] == "starter" else config["recipe"]
    for section in _OF_THE_RUN:
        if section in groups or (section == "retrieval" and foreign and not config["retrieval"]["corpus"]):
            continue
        if section == "tasks" and "benchmark" in groups:
            continue
        judge = composed.env.get("judge")
        OmegaConf.update(composed, section, config[section], merge=section == "episode")
        if section == "env" and judge is not None and config["env"]["judge"] is None:
            composed.env.judge = judge  # the benchmark's
    if config["env"]["name"] == "answer" and "env" not in groups:
        composed.modes = ["cot_rag" if config["env"]["context_passages"] else "cot"]
        composed.passages = config["env"]["context_passages"] or composed.passages
    if "policy" not in groups:
        composed.policy.model = str(folder.student)
    composed.out = f"{run}/scores/{composed.label}"


def _fill(composed: Any) -> None:
    """What stands for something else: the packaged base student, an adapter's own base."""
    from omegaconf import OmegaConf

    composed.modes = [OLD_NAMES.get(mode, mode) for mode in composed.modes]
    policy = composed.policy
    adapter = policy.get("adapter")
    if adapter and OmegaConf.is_missing(policy, "model"):
        try:
            policy.model = base_of(adapter) or "???"
        except ValueError as error:
            raise ConfigError(f"config policy.adapter: {error}") from None
        if OmegaConf.is_missing(policy, "model"):
            raise ConfigError(f"config policy.model: the adapter {adapter!r} does not say what it was trained on")
    if not OmegaConf.is_missing(policy, "model") and policy.get("model") == "base_student":
        policy.model = str(BASE_STUDENT_FOLDER)
        policy.name = policy.get("name") or "base_student"
    for folder in (adapter, None if OmegaConf.is_missing(policy, "model") else policy.get("model")):
        if folder and not policy.get("name") and Path(folder).is_dir():
            policy.name = Path(folder).absolute().name


def _override(text: str) -> list[str]:
    """As for the other jobs: a value may be set that no YAML file names. `tasks=FILE` is short for that one file."""
    key, _, value = text.partition("=")
    if key == "tasks" and (value.startswith("hf:") or value.endswith(_TASK_FILES)):
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        kind = "".join(c if c.isalnum() else "_" for c in Path(value).stem)
        return ["tasks=files", f"++tasks.test=[{{path: '{quoted}', kind: '{kind}'}}]", f"++label='{kind}'"]
    if key == "modes" and "[" not in value:  # modes=agent,cot
        return [f"++modes=[{value}]"]
    return [text if key in GROUPS or not key[:1].isalpha() else f"++{text}"]


def _one_line(error: Exception) -> str:
    from launch import config_reading

    return config_reading._one_line(error)  # noqa: SLF001
