"""How an encoder wants to be used: pooling, length, prefixes, as its own folder says in sentence-transformers' files.

Where it says nothing: mean pooling, 256 tokens, and E5's two prefixes for models of that name. Reads JSON alone; loads
no model.

Example::

    settings = settings_of(Path("models/e5-base-v2"), name="intfloat/e5-base-v2", max_tokens=None, pooling=None,
                           query_prefix=None, passage_prefix=None)
    settings.query_prefix           # "query: "

Files: modules.json, 1_Pooling/config.json, sentence_bert_config.json, config_sentence_transformers.json, as
sentence-transformers 2 to 5 write them (https://sbert.net); prefixes of E5: arXiv 2212.03533.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Pooling = Literal["mean", "cls", "last"]

DEFAULT_MAX_TOKENS = 256
_E5 = re.compile(r"(^|[/_-])(multilingual-)?e5-(small|base|large)", re.IGNORECASE)
_POOLING_FLAGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


class EncoderError(RuntimeError):
    """An encoder that cannot be loaded, or whose files are not the expected ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """Everything besides the weights that decides a vector."""

    pooling: Pooling
    max_tokens: int
    """A longer text is cut."""
    query_prefix: str
    passage_prefix: str


def settings_of(
    folder: Path,
    *,
    name: str,
    pooling: Pooling | None,
    max_tokens: int | None,
    query_prefix: str | None,
    passage_prefix: str | None,
) -> EncoderSettings:
    """The given settings, and for each None what `folder` says, else mean pooling, 256 tokens, no prefixes.

    Raises `EncoderError` for a model that pooling and L2 normalisation alone do not describe, `ValueError` for a wrong
    value.
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise ValueError(f"pooling must be 'mean', 'cls' or 'last', got {pooling!r}")
    if max_tokens is not None and max_tokens < 8:
        raise ValueError(f"max_tokens must be at least 8, got {max_tokens}")
    own_pooling = _pooling_of(folder)
    own_query, own_passage = _prefixes_of(folder, name)
    return EncoderSettings(
        pooling=pooling or own_pooling or "mean",
        max_tokens=max_tokens or _max_tokens_of(folder),
        query_prefix=own_query if query_prefix is None else query_prefix,
        passage_prefix=own_passage if passage_prefix is None else passage_prefix,
    )


def _pooling_of(folder: Path) -> Pooling | None:
    path = "1_Pooling"
    for module in _read(folder / "modules.json") or []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _KNOWN_MODULES:
            raise EncoderError(f"{folder}: its module {kind!r} is not supported; there are {', '.join(_KNOWN_MODULES)}")
        if kind == "Pooling":
            path = module.get("path", path)
    config = _read(folder / path / "config.json")
    if config is None:
        return None
    named = config.get("pooling_mode")
    chosen: list[Pooling | None] = []
    if isinstance(named, str):
        chosen.append(_POOLING_NAMES.get(named))
    chosen.extend(pooling for flag, pooling in _POOLING_FLAGS.items() if config.get(flag))
    others = [
        flag
        for flag, wanted in config.items()
        if flag.startswith("pooling_mode_") and wanted is True and flag not in _POOLING_FLAGS
    ]
    if len(chosen) != 1 or chosen[0] is None or others:
        raise EncoderError(
            f"{folder / path / 'config.json'}: exactly one of mean, cls and last-token pooling is needed"
        )
    return chosen[0]


def _max_tokens_of(folder: Path) -> int:
    found = (_read(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    model = _read(folder / "config.json") or {}
    positions = model.get("max_position_embeddings")
    if model.get("model_type") in ("roberta", "xlm-roberta") and isinstance(positions, int):
        positions -= 2  # RoBERTa counts its positions from 2
    wanted = found if isinstance(found, int) and found >= 8 else DEFAULT_MAX_TOKENS
    return min(wanted, positions) if isinstance(positions, int) else wanted


def _prefixes_of(folder: Path, name: str) -> tuple[str, str]:
    prompts = (_read(folder / "config_sentence_transformers.json") or {}).get("prompts") or {}
    query, passage = prompts.get("query"), prompts.get("passage", prompts.get("document"))
    if query or passage:
        return query or "", passage or ""
    return ("query: ", "passage: ") if _E5.search(name) else ("", "")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise EncoderError(f"{path}: not JSON: {error}") from error
