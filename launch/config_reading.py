"""How a job's configuration is read: Hydra composes `configs/`, pydantic checks it, before anything starts.

An unknown key, a wrong type or an impossible value ends in a `ConfigError` of one line that names it.

Example::

    config = load_config(["recipe=starter", "seed=1", "learner.epochs=2"])
    config.learner.epochs                                                   # 2
    load_config(["tasks=questions.jsonl", "out=runs/mine"], CollectConfig)  # one file of tasks
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from launch.config import DIALECT_OF_ENV, CollectConfig, DistillConfig, JobConfig
from learner.config import ConfigError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"
JOBS: dict[type[JobConfig], str] = {DistillConfig: "distill", CollectConfig: "collect"}
"""Schema -> its file in `configs/`."""
NOT_COLLECTED = ("learner", "tracking", "evaluate", "student", "run_dir")
"""What recipes say of the whole loop and a collection has no use for."""
_TASK_FILES = (".jsonl", ".json", ".parquet")

_Job = TypeVar("_Job", bound=JobConfig)
_Config = TypeVar("_Config")


def load_config(overrides: Sequence[str] = (), schema: type[_Job] = DistillConfig) -> _Job:
    """Compose the job's file with Hydra overrides and check it. Raises `ConfigError`."""
    return parse_config(compose(overrides, name=JOBS[schema]), schema)


def compose(overrides: Sequence[str] = (), *, name: str = "distill") -> dict[str, Any]:
    """The composed configuration as plain data, every interpolation resolved."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if name == "collect":
        _refuse_what_is_not_collected(overrides)
    OmegaConf.register_new_resolver("local_folder", local_folder, replace=True)
    OmegaConf.register_new_resolver("dialect_of", lambda env: DIALECT_OF_ENV.get(env, "code"), replace=True)
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            composed = hydra_compose(name, overrides=[each for text in overrides for each in _override(text)])
        dropped = NOT_COLLECTED if name == "collect" else ()
        OmegaConf.set_struct(composed, False)
        for key in set(dropped) - {"run_dir"}:  # others point to that one
            composed.pop(key, None)
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in dropped}


def parse_config(plain: Mapping[str, Any], schema: type[_Config] = DistillConfig) -> _Config:
    """Plain data to the typed schema. Raises `ConfigError`."""
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(schema, plain, "")
    try:
        return TypeAdapter(schema).validate_python(plain)
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


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain data as `a.b.c` -> value; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def local_folder(out: object) -> str:
    """`out` itself, or where it is no folder of this machine, one that stands for it."""
    out = str(out)
    if "://" not in out:
        return out
    return f"runs/scratch-{hashlib.sha256(out.encode()).hexdigest()[:12]}"


def _override(text: str) -> list[str]:
    """`a.b=1` may set a field that no YAML file names, since the schema has it; unknown ones are refused by the
    schema. `tasks=FILE` is short for that one file."""
    key, _, value = text.partition("=")
    if key == "tasks" and (value.startswith("hf:") or value.endswith(_TASK_FILES)):
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        kind = "".join(c if c.isalnum() else "_" for c in Path(value).stem)
        return ["tasks=files", f"++tasks.train=[{{path: '{quoted}', kind: '{kind}'}}]"]
    is_group = (CONFIG_FOLDER / key).is_dir()
    return [text if is_group or not key[:1].isalpha() else f"++{text}"]


def _refuse_what_is_not_collected(overrides: Sequence[str]) -> None:
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0].partition(".")[0]
        if key in NOT_COLLECTED:
            instead = "; say where with out=" if key == "run_dir" else ""
            raise ConfigError(f"config {key}: a collection has none{instead}")


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
