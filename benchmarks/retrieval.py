"""Retrieval: quality on real multi-hop questions, and queries per CPU-second of the server beside Search-R1's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from envs.retrieval.corpus import Corpus, Passage

DISTRACTOR_SEED = 20261121


def distractors(real: Corpus, count: int) -> Iterator[Passage]:
    """`count` passages spliced from the words of two real ones each, under the title of the first."""
    rng = random.Random(DISTRACTOR_SEED)
    for number in range(count):
        first, second = (real[rng.randrange(len(real))] for _ in range(2))
        head, tail = first.text.split(), second.text.split()
        words = head[: rng.randint(len(head) // 3, len(head))] + tail[len(tail) // 2 :]
        yield Passage(id=f"distractor-{number}", title=first.title, text=" ".join(words))


def corpus_of(data: Path, count: int) -> Corpus:
    """The real passages, and distractors up to `count`."""
    real = Corpus.from_jsonl(data / "corpus.jsonl")
    return Corpus([*list(real)[:count], *distractors(real, count - len(real))])
