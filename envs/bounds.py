"""Bounds of numbers in settings: an impossible one is refused where it is set, not hours later where it is used.

Example::

    def __post_init__(self) -> None:
        check_bounds(self, at_least_1=("max_steps",), above_0=("timeout_s",))     # max_steps=0 must be at least 1
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def check_bounds(
    settings: Any,
    *,
    at_least_0: Iterable[str] = (),
    at_least_1: Iterable[str] = (),
    above_0: Iterable[str] = (),
    shares: Iterable[str] = (),
) -> None:
    """Raises `ValueError` for the first of these fields that is out of bounds or no finite number; None is within.

    `shares` are within 0 and 1.
    """
    rules = (
        (at_least_0, lambda value: value >= 0, "at least 0"),
        (at_least_1, lambda value: value >= 1, "at least 1"),
        (above_0, lambda value: value > 0, "above 0"),
        (shares, lambda value: 0 <= value <= 1, "within 0 and 1"),
    )
    for names, holds, bound in rules:
        for name in names:
            value = getattr(settings, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name}={value} must be {bound}")
