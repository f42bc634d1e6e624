"""Orders of one pass over the rows, given how hard each is: `Shuffled`, `Ascending`, `Paced`.

Every order has each row exactly once and depends on (seed, pass), the keys and their difficulties alone, not on the
order in which they came. Rows of unknown difficulty (None) count as the median one.

Example::

    Ascending().arrange({"a": 3.0, "b": 1.0, "c": None}, seed=0, epoch=1)      # ["b", "c", "a"] or ["b", "a", "c"]
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class RowOrder(Protocol):
    """One way to order a pass."""

    def arrange(self, difficulties: Mapping[str, float | None], seed: int, epoch: int) -> list[str]:
        """The keys, in the order of pass `epoch`."""
        ...


@dataclass(frozen=True, slots=True)
class Shuffled:
    """By chance."""

    def arrange(self, difficulties: Mapping[str, float | None], seed: int, epoch: int) -> list[str]:
        ordered = sorted(difficulties)
        random.Random(f"{seed}/{epoch}").shuffle(ordered)
        return ordered


@dataclass(frozen=True, slots=True)
class Ascending:
    """The easiest first (arXiv 2505.13820); rows that are equally hard are shuffled."""

    def arrange(self, difficulties: Mapping[str, float | None], seed: int, epoch: int) -> list[str]:
        known = [value for value in difficulties.values() if value is not None]
        middle = statistics.median(known) if known else 0.0

        def hardness(key: str) -> float:
            value = difficulties[key]
            return middle if value is None else value

        return sorted(Shuffled().arrange(difficulties, seed, epoch), key=hardness)


@dataclass(frozen=True, slots=True)
class Paced:
    """Drawn at random from the easiest rows so far, and ever more of them (arXiv 1903.09848).

    At the share t of a pass of n rows the next is one of the sqrt(t (1 - c^2) + c^2) n easiest that is still left, with
    c = `start_share`.
    """

    start_share: float = 0.3

    def arrange(self, difficulties: Mapping[str, float | None], seed: int, epoch: int) -> list[str]:
        ascending = Ascending().arrange(difficulties, seed, epoch)
        draw, n, start = random.Random(f"{seed}/{epoch}/paced"), len(ascending), self.start_share
        taken: list[str] = []
        pool: list[str] = []
        entered = 0
        while len(taken) < n:
            competence = math.sqrt(len(taken) / n * (1 - start**2) + start**2)
            enough = max(math.ceil(competence * n), entered, len(taken) + 1)
            pool.extend(ascending[entered:enough])
            entered = enough
            at = draw.randrange(len(pool))
            pool[at], pool[-1] = pool[-1], pool[at]
            taken.append(pool.pop())
        return taken
