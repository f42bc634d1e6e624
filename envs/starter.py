"""The built-in world: tasks that are made from a seed, not downloaded, and the pages that their agent can search.

Kinds: `arithmetic` (word problems that need real computation) and `two_hop` (questions that need two searches); the
held-out set also has `arithmetic_unseen` and `two_hop_unseen`, whose combinations of clauses or relations never stand
in training. Train and held-out tasks share no question, no tuple of numbers and no pair of entities
(`tests/test_starter.py`).

Example::

    world = StarterWorld(seed=0)
    train = world.train_tasks(3000, seed=0)
    test = world.test_tasks(200)
    pages = world.passages()           # [(id, title, text), ...] for the retrieval index
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from envs.base import Task
from envs.starter_arithmetic import make_problem
from envs.starter_two_hop import Encyclopedia, made_up_words, make_encyclopedia, make_two_hop

KINDS = ("arithmetic", "two_hop", "arithmetic_unseen", "two_hop_unseen")
TRAIN_KINDS = KINDS[:2]


class StarterWorld:
    """Pages and tasks of one seed. Construction takes some 50 ms."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.encyclopedia: Encyclopedia = make_encyclopedia(seed)
        self._names = made_up_words(random.Random(f"owners {seed}"), 120, (2,), set())

    def passages(self) -> list[tuple[str, str, str]]:
        """(id, title, text) of every page."""
        return [(str(i), entity.name, entity.text) for i, entity in enumerate(self.encyclopedia.entities.values())]

    def train_tasks(self, count: int, *, seed: int = 0, arithmetic_share: float = 0.5) -> list[Task]:
        """`count` different training tasks, arithmetic and two-hop mixed at random."""
        if not 0 <= arithmetic_share <= 1:
            raise ValueError(f"arithmetic_share must be in [0, 1], not {arithmetic_share}")
        rng = random.Random(f"train {self.seed} {seed}")
        kinds = (TRAIN_KINDS[rng.random() >= arithmetic_share] for _ in iter(int, 1))
        return self._distinct(lambda: self._make(rng, next(kinds), "train"), count)

    def test_tasks(self, count_per_kind: int) -> list[Task]:
        """`count_per_kind` different held-out tasks of each of the four kinds."""
        tasks: list[Task] = []
        for kind in KINDS:
            rng = random.Random(f"test {self.seed} {kind}")
            tasks += self._distinct(lambda kind=kind, rng=rng: self._make(rng, kind, "test"), count_per_kind)
        return tasks

    def _make(self, rng: random.Random, kind: str, split: str) -> Task:
        unseen = kind.endswith("_unseen")
        if kind.startswith("arithmetic"):
            question, problem = make_problem(rng, self._names, split=split, unseen=unseen)
            answer, metadata = str(problem.amounts[-1]), {"numbers": list(problem.numbers)}
        else:
            question, hops, answer = make_two_hop(rng, self.encyclopedia, split=split, unseen=unseen)
            bridge = self.encyclopedia.entities[hops.entity].facts[hops.first.name]
            metadata = {"entities": [hops.entity, bridge], "relations": [hops.first.name, hops.second.name]}
        return Task(id="", question=question, answer=answer, kind=kind, metadata={**metadata, "split": split})

    def _distinct(self, make: Callable[[], Task], count: int) -> list[Task]:
        seen: dict[str, Task] = {}
        for task in _tries(make, 50 * count + 1000):
            if len(seen) == count:
                break
            if task.question not in seen:
                name = f"starter{self.seed}-{task.metadata['split']}-{task.kind}-{_digest(task.question)}"
                seen[task.question] = Task(
                    id=name, question=task.question, answer=task.answer, kind=task.kind, metadata=task.metadata
                )
        if len(seen) < count:
            raise ValueError(f"the starter world has no {count} different tasks of this kind, only {len(seen)}")
        return list(seen.values())


def _tries(make: Callable[[], Task], limit: int) -> Iterator[Task]:
    for _ in range(limit):
        yield make()


def _digest(question: str) -> str:
    import hashlib

    return hashlib.sha256(question.encode()).hexdigest()[:10]
