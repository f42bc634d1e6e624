"""Reading one field of a foreign record: the right type, or a `RowError` that names the field. No formats in here.

Example::

    verdict("true"), verdict(1), verdict(""), verdict(0.5)      # True, True, None, False
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rollout.interchange.recorded import RowError

_TRUE, _FALSE = {"true", "1", "1.0", "yes", "correct"}, {"false", "0", "0.0", "no", "incorrect"}
ANSWERS = ("true_answer", "answer", "gold", "gt", "target", "reference_answer", "ground_truth")
PREDICTIONS = ("prediction", "generated_answer", "pred", "predicted_answer", "final_answer")
OUTCOMES = ("success", "correct", "is_correct", "score", "reward", "em")


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError(f"{what} is no object", f"{type(value).__name__} {str(value)[:80]!r}")
    return value


def listed(record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise RowError(f"no list {name!r}", f"{type(value).__name__} {str(value)[:80]!r}")
    return value


def text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise RowError(f"no text {name!r}", f"{type(value).__name__} {str(value)[:80]!r}")
    return value


def answer_text(value: Any) -> str | None:
    """An answer as a text: numbers and booleans as Python writes them; None when there is none."""
    if value is None or isinstance(value, Mapping | list):
        return None
    return value if isinstance(value, str) else str(value)


def first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def real(value: Any, default: float = 0.0) -> float:
    """A finite number, or `default`: costs, times and token counts of foreign files are often missing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return float(value)


def count(value: Any) -> int:
    return max(int(real(value)), 0)


def verdict(value: Any) -> bool | None:
    """A recorded score as success: 1, 1.0, True, "true" ... or their opposites; None when blank or anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return None if math.isnan(value) else value >= 1
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else None
    return None


def content_text(content: Any) -> str:
    """The text of a message's content: a text, or a list of text parts. Raises `RowError` for pictures and the like."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("a message whose content is no text", type(content).__name__)
    pieces = []
    for part in content:
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowError("a message with more than text", f"a part of type {kind!r}")
    return "\n".join(pieces)
