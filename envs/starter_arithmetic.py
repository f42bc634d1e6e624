"""Arithmetic half of the starter world: word problems over large numbers, made from a seed.

A problem is an opening sentence, one to three clauses that each change the amount, and a question. Its numbers are too
large to guess. Held out are all problems whose tuple of numbers falls into a fixed fifth of all tuples, and, as a kind
of its own, problems with an ordered pair of clauses that never stands in training (`UNSEEN_PAIRS`). """

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

ITEMS = "coins stamps books apples bricks marbles bottles tickets shells cards boxes seeds pens nails".split()
OPENINGS = (
    "{name} has {n} {items} at home.",
    "There are {n} {items} in the store of {name}.",
    "{name} starts the year with {n} {items} in a safe.",
    "A warehouse run by {name} holds {n} {items} on its shelves.",
)
QUESTIONS = (
    "How many {items} does {name} have now?",
    "How many {items} are there at the end?",
    "What is the final number of {items}?",
)


@dataclass(frozen=True, slots=True)
class Clause:
    """A sentence that changes the amount: `amount = amount <operator> n`, on whole numbers."""

    operator: str
    template: str


# No two of them end alike, and none stands twice in a problem: how a sentence ends tells which one it was.
CLAUSES = (
    Clause("+", "{name} buys {n} more {items} at the market."),
    Clause("+", "A friend gives {name} {n} extra {items} as a present."),
    Clause("+", "Then {n} {items} arrive by post."),
    Clause("+", "{name} finds another {n} {items} in the garden."),
    Clause("-", "{name} sells {n} {items} to a neighbor."),
    Clause("-", "After that {n} {items} are lost."),
    Clause("-", "{name} gives away {n} {items} to a school."),
    Clause("-", "Then {n} {items} get damaged and are thrown out."),
    Clause("*", "The number of {items} then grows to {n} times as many."),
    Clause("*", "{name} repeats this collection {n} times in total."),
    Clause("*", "Each of the {items} is then swapped for {n} new ones."),
    Clause("//", "The {items} are shared equally among {n} people and {name} keeps one share."),
    Clause("//", "Then only one out of every {n} {items} is kept."),
    Clause("%", "{name} packs the {items} into crates of {n} and keeps only what is left over."),
)
# Which combinations are unseen is part of the world, not of a run: the same for every seed.
UNSEEN_PAIRS = frozenset(
    random.Random("unseen clause pairs").sample(
        [(i, j) for i in range(len(CLAUSES)) for j in range(len(CLAUSES)) if i != j], len(CLAUSES) ** 2 // 5
    )
)
_DIGITS = {"+": (2, 5), "-": (2, 5), "*": (1, 2), "//": (1, 3), "%": (2, 3)}
_APPLY = {
    "+": lambda amount, n: amount + n,
    "-": lambda amount, n: amount - n,
    "*": lambda amount, n: amount * n,
    "//": lambda amount, n: amount // n,
    "%": lambda amount, n: amount % n,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem, made or read back from its text."""

    items: str
    sentences: tuple[str, ...]
    """The opening and the clauses, in order, without the question."""
    start: int
    changes: tuple[tuple[str, int], ...]
    """(operator, number) of each clause."""
    ask: str
    """The question at the end."""

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.start, *(n for _, n in self.changes))

    @property
    def amounts(self) -> tuple[int, ...]:
        """The amount after each clause."""
        amount, amounts = self.start, []
        for operator, n in self.changes:
            amount = _APPLY[operator](amount, n)
            amounts.append(amount)
        return tuple(amounts)


def held_out(numbers: tuple[int, ...]) -> bool:
    """Whether a tuple of numbers belongs to the held-out fifth; a pure function of the tuple."""
    return hashlib.sha256(repr(numbers).encode()).digest()[0] < 51


def make_problem(rng: random.Random, names: list[str], *, split: str, unseen: bool) -> tuple[str, Problem]:
    """A question of `split` ("train" or "test") and its problem; `unseen`: with a pair of clauses never trained on."""
    while True:
        lengths = (1, 2, 2, 3, 3) if split == "train" else (2, 2, 3)
        chosen = rng.sample(range(len(CLAUSES)), rng.choice(lengths))
        if any(pair in UNSEEN_PAIRS for pair in zip(chosen, chosen[1:], strict=False)) != unseen:
            continue
        name, items = rng.choice(names), rng.choice(ITEMS)
        start = _number(rng, 3, 6)
        changes = [(CLAUSES[i].operator, max(2, _number(rng, *_DIGITS[CLAUSES[i].operator]))) for i in chosen]
        sentences = [rng.choice(OPENINGS).format(name=name, n=start, items=items)]
        sentences += [
            CLAUSES[i].template.format(name=name, n=n, items=items) for i, (_, n) in zip(chosen, changes, strict=True)
        ]
        ask = rng.choice(QUESTIONS).format(name=name, items=items)
        problem = Problem(items, tuple(sentences), start, tuple(changes), ask)
        if min(problem.amounts) <= 1 or held_out(problem.numbers) != (split == "test"):
            continue
        return " ".join([*sentences, ask]), problem


def read_problem(question: str) -> Problem | None:
    """Understands the text of a word problem; None when it is none. This is how the built-in expert sees it."""
    *sentences, ask = re.split(r"(?<=[.?]) ", question)
    if not sentences:
        return None
    opening = _match_any(OPENINGS, sentences[0])
    if opening is None:
        return None
    changes = []
    for sentence in sentences[1:]:
        for clause in CLAUSES:
            found = _pattern(clause.template).fullmatch(sentence)
            if found:
                changes.append((clause.operator, int(found["n"])))
                break
        else:
            return None
    return Problem(opening["items"], tuple(sentences), int(opening["n"]), tuple(changes), ask) if changes else None


def _number(rng: random.Random, fewest_digits: int, most_digits: int) -> int:
    digits = rng.randint(fewest_digits, most_digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


_GROUPS = {"name": r"(?P<name>[A-Z][a-z]+)", "n": r"(?P<n>\d+)", "items": r"(?P<items>[a-z]+)"}
_PATTERNS: dict[str, re.Pattern[str]] = {}


def _pattern(template: str) -> re.Pattern[str]:
    if template not in _PATTERNS:
        text = re.escape(template)
        for field, group in _GROUPS.items():
            escaped = re.escape("{" + field + "}")
            text = text.replace(escaped, group, 1).replace(escaped, f"(?P={field})")
        _PATTERNS[template] = re.compile(text)
    return _PATTERNS[template]


def _match_any(templates: tuple[str, ...], sentence: str) -> re.Match[str] | None:
    return next((found for template in templates if (found := _pattern(template).fullmatch(sentence))), None)
