"""What a run was told: the command that would start it again, its configuration as YAML, and nothing that is secret.

Example::

    command(config)               # "python launch/distill.py recipe=starter seed=1 learner.epochs=3"
    as_yaml(without_secrets(config))
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from launch.config_reading import flattened

HIDDEN = "(hidden)"
_SECRET_NAME = re.compile(
    r"(?:^|[_\-.])(?:api_?keys?|key|secrets?|passwords?|passwd|credentials?|authorization|auth|cookies?|bearer"
    r"|(?:access|auth|api|bearer|id|refresh|session|hf|private|client)[_\-]?tokens?|token|x-api-key|signature)$",
    re.IGNORECASE,
)
_NOT_SECRET_NAMES = ("api_key_env",)
"""It names a variable, and holds nothing."""
_LOOKS_SECRET = re.compile(
    r"\b(?:sk|pk|hf|gsk|xai|ghp|gho|github_pat|glpat|xox[a-z]|AIza|AKIA)[-_]?[A-Za-z0-9_\-]{12,}"
    r"|\beyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-.]+"
    r"|(?i:bearer|basic)\s+[A-Za-z0-9+/=_\-.]{8,}"
)
_IN_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.\-]*://)[^/\s@?#]+@", re.IGNORECASE)
_IN_QUERY = re.compile(
    r"(?P<name>[?&](?:[\w\-]*(?:key|token|secret|password|signature|sig|credential|auth)[\w\-]*)=)[^&#\s]+",
    re.IGNORECASE,
)
_IN_ARGUMENT = re.compile(
    r"(?P<name>--?[\w\-]*(?:api-?key|token|secret|password|auth)[\w\-]*[= ])\S+|"
    r"(?P<variable>\b[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD)[A-Z0-9_]*=)\S+"
)
_MISSING = object()
_PLAIN = re.compile(r"[A-Za-z_/.][\w./:\-]*")
_LIKE_A_VALUE = re.compile(r"(?i)true|false|null|nan|inf")
_MAPS_OF_SECRETS = ("env", "headers", "extra_headers", "default_headers")
"""Mappings whose values may all be secret, where their values are text."""


def without_secrets(value: Any, name: str = "") -> Any:
    """The same with every value hidden that is named as a secret or looks like one."""
    if isinstance(value, Mapping):
        if (
            name.rpartition(".")[2].lower() in _MAPS_OF_SECRETS
            and value
            and all(isinstance(each, str) for each in value.values())
            and "name" not in value
        ):
            return {str(key): HIDDEN for key in value}
        return {str(key): without_secrets(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return _list_without_secrets(value, name)
    if isinstance(value, str) and value:
        if _SECRET_NAME.search(name) and name not in _NOT_SECRET_NAMES:
            return HIDDEN
        return text_without_secrets(value)
    return value


def text_without_secrets(text: str) -> str:
    """Without what looks like a key, and without user, password and keys in URLs."""
    text = _LOOKS_SECRET.sub(HIDDEN, text)
    text = _IN_URL.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\g<name>{HIDDEN}", text)
    return _IN_ARGUMENT.sub(lambda found: f"{found['name'] or found['variable']}{HIDDEN}", text)


def as_yaml(config: Mapping[str, Any]) -> str:
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_yaml(OmegaConf.create(dict(config)))
    except Exception:  # text that OmegaConf takes for an interpolation of its own
        return json.dumps(config, indent=2, ensure_ascii=False, default=str)


def overrides(config: Mapping[str, Any], *, job: str) -> list[str]:
    """What differs from the recipe that it names, as arguments of the command; `job`: "distill", "collect" or
    "evaluate"."""
    here = flattened(config)
    for chosen in _starts(config, job):
        try:
            there = flattened(_composed(tuple(chosen), job))
        except Exception:  # a recipe or a file of another version or machine: told as what differs from less
            continue
        given = {argument.partition("=")[0] for argument in chosen}
        differing = [key for key, value in here.items() if there.get(key, _MISSING) != value and key not in given]
        return [*chosen, *(_override(key, here[key]) for key in differing)]
    return []


def _starts(config: Mapping[str, Any], job: str) -> Iterator[list[str]]:
    """Arguments that may lie under the run, the likeliest first: its recipe, the kind of its policy."""
    if job == "evaluate":
        policy = config.get("policy") or {}
        run = [f"run={config['run']}"] if config.get("run") else []
        named = [_override(f"policy.{name}", policy[name]) for name in ("model", "base_url") if policy.get(name)]
        group = "student" if policy.get("kind") == "vllm" else policy.get("kind")
        yield [*run, *named]
        yield [f"policy={group}", *named]
        return
    recipe = [f"recipe={config.get('recipe', '')}"]
    teacher = config.get("teacher") or {}
    named = [_override(f"teacher.{name}", teacher[name]) for name in ("model", "base_url") if teacher.get(name)]
    if teacher.get("kind") not in (None, "expert"):
        yield [*recipe, f"teacher={teacher['kind']}", *named]
    yield recipe
    yield []


@functools.lru_cache(maxsize=16)
def _composed(arguments: tuple[str, ...], job: str) -> Any:
    """The whole configuration of a command with these arguments. Raises `ValueError`."""
    from launch.config_reading import load_config, to_plain

    if job == "evaluate":
        from launch.evaluation.reading import load_evaluation

        return to_plain(load_evaluation(arguments))
    from launch.config import CollectConfig, DistillConfig

    return to_plain(load_config(arguments, CollectConfig if job == "collect" else DistillConfig))


def command(config: Mapping[str, Any], *, job: str) -> str:
    """One that starts the same run."""
    return " ".join([f"python launch/{job}.py", *map(shlex.quote, overrides(without_secrets(config), job=job))])


def _list_without_secrets(values: list[Any] | tuple[Any, ...], name: str) -> list[Any]:
    """What follows an argument such as `--api-key` is one, too."""
    kept: list[Any] = []
    hide = False
    for value in values:
        is_flag = isinstance(value, str) and value.startswith("-") and "=" not in value
        kept.append(HIDDEN if hide and isinstance(value, str) and not is_flag else without_secrets(value, name))
        hide = is_flag and bool(_SECRET_NAME.search(value.lstrip("-").replace("-", "_")))
    return kept


def _override(key: str, value: Any) -> str:
    return f"{key}={_grammar(value)}"


def _grammar(value: Any) -> str:
    """A value as Hydra's overrides are written (https://hydra.cc/docs/advanced/override_grammar/basic)."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_grammar(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_grammar, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and not _LIKE_A_VALUE.fullmatch(value):
        return value
    quoted = value.replace("\\", "\\\\") if value.endswith("\\") else value
    return '"' + quoted.replace('"', '\\"') + '"'
