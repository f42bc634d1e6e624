"""Two-hop half of the starter world: a made-up encyclopedia and questions that need two of its pages.

"In which city was the author of The Silver Harbor born?" needs the page of the book (who is the author?) and then the
page of the author (where born?). Held out are the questions about a fixed share of first entities, so that no pair of
entities is shared with training, and, as a kind of its own, combinations of two relations that never stand in
training. """

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

_ONSETS = "b d f g k l m n p r s t v z br dr kr st tr th sh".split()
_VOWELS = "a e i o u ai ea".split()
_CODAS = ["", "", "n", "r", "l", "s", "m", "x"]
_ADJECTIVES = (
    "Silver Hidden Broken Golden Silent Crimson Distant Hollow Burning Frozen Gentle Ancient Bitter Wild Pale Quiet "
    "Iron Velvet Amber Lost Restless Narrow Winter Scarlet Stolen Sunken Bright Endless Fading Lonely"
).split()
_NOUNS = (
    "Harbor River Garden Mirror Tower Forest Letter Crown Bridge Lantern Mountain Road Island Window Clock Orchard "
    "Shadow Song Desert Compass Feather Castle Ocean Valley Station Library Candle Storm Voyage Meadow"
).split()
_COMPANY_SUFFIXES = "Industries Labs Motors Foods Systems Press Bank Airlines".split()
_JOBS = "novelist engineer physicist painter composer chemist architect singer".split()

# A page begins with its subject's name, as an encyclopedia's does: it is what ranks it above pages that mention the
# subject.
PAGES: dict[str, tuple[str, ...]] = {
    "person": (
        "{name} is a {job} born in {birthplace} in {birth_year}, studied at {university} and works for {employer}.",
        "{name}, born in {birthplace} in {birth_year}, works for {employer} as a {job} and studied at {university}.",
    ),
    "city": ("{name} is a city in {country} with {population} inhabitants. The mayor is {mayor}.",),
    "company": (
        "{name} is a company founded by {founder} in {founding_year}, based in {base}.",
        "{name}, based in {base}, is a company created in {founding_year}. The founder is {founder}.",
    ),
    "book": (
        "{name} is a novel written by {author}, published by {publisher} in {year}.",
        "{name} is a novel published in {year} by {publisher}. The author is {author}.",
    ),
    "film": (
        "{name} is a {year} film directed by {director}, set in {setting}.",
        "{name} is a film set in {setting}, released in {year} and directed by {director}.",
    ),
}


@dataclass(frozen=True, slots=True)
class Relation:
    """A fact that a page of `subject` type tells: its name, what type it leads to (None: a plain value), how it is
    asked."""

    subject: str
    name: str
    target: str | None
    phrases: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")


FIRST_HOPS = (
    Relation(
        "book", "author", "person", ("the author of {x}", "the writer of the novel {x}", "the person who wrote {x}")
    ),
    Relation("book", "publisher", "company", ("the publisher of {x}", "the company that published {x}")),
    Relation("film", "director", "person", ("the director of {x}", "the person who directed {x}")),
    Relation("film", "setting", "city", ("the city where {x} is set",)),
    Relation("company", "founder", "person", ("the founder of {x}", "the person who founded {x}")),
    Relation("company", "base", "city", ("the city where {x} is based",)),
    Relation("city", "mayor", "person", ("the mayor of {x}", "the mayor of the city {x}")),
    Relation("person", "birthplace", "city", ("the birthplace of {x}", "the city where {x} was born")),
    Relation("person", "employer", "company", ("the employer of {x}", "the company {x} works for")),
)
SECOND_HOPS = (
    Relation("person", "birthplace", None, ("In which city was {x} born?", "What is the birthplace of {x}?")),
    Relation("person", "birth_year", None, ("In which year was {x} born?", "What is the birth year of {x}?")),
    Relation("person", "university", None, ("Where did {x} study?", "Which university did {x} attend?")),
    Relation("person", "employer", None, ("Which company does {x} work for?", "Who employs {x}?")),
    Relation("person", "job", None, ("What is the profession of {x}?", "What does {x} do for a living?")),
    Relation("city", "country", None, ("In which country is {x}?", "To which country does {x} belong?")),
    Relation("city", "mayor", None, ("Who is the mayor of {x}?",)),
    Relation("city", "population", None, ("How many people live in {x}?", "What is the population of {x}?")),
    Relation("company", "founder", None, ("Who founded {x}?", "Who is the founder of {x}?")),
    Relation("company", "base", None, ("Where is {x} based?", "In which city is {x} based?")),
    Relation("company", "founding_year", None, ("When was {x} founded?",)),
)
COMBINATIONS = tuple((a, b) for a in FIRST_HOPS for b in SECOND_HOPS if a.target == b.subject)
# As with clauses: unseen combinations belong to the world and are the same for every seed.
UNSEEN_COMBINATIONS = frozenset(
    random.Random("unseen relations").sample(range(len(COMBINATIONS)), len(COMBINATIONS) // 6)
)


@dataclass(frozen=True, slots=True)
class Entity:
    """One page's subject: name, type, its facts (relation name -> value) and the page's text."""

    name: str
    type: str
    facts: dict[str, str]
    text: str


@dataclass(frozen=True, slots=True)
class Encyclopedia:
    """All pages by name, made from a seed."""

    entities: dict[str, Entity]
    held_out: frozenset[str] = field(default_factory=frozenset)
    """Entities that training questions neither begin with nor pass through."""

    def of_type(self, kind: str) -> list[str]:
        return [entity.name for entity in self.entities.values() if entity.type == kind]


def made_up_words(rng: random.Random, count: int, syllables: tuple[int, ...], taken: set[str]) -> list[str]:
    """Capitalised pronounceable words, none of them in `taken` (which grows)."""
    words: list[str] = []
    while len(words) < count:
        body = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice(syllables)))
        word = (body + rng.choice(_CODAS)).capitalize()
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def make_encyclopedia(seed: int) -> Encyclopedia:
    """2,000 pages: 800 people, 150 cities, 350 companies, 350 books, 350 films."""
    rng, taken = random.Random(f"encyclopedia {seed}"), set[str]()
    first, last = made_up_words(rng, 120, (2,), taken), made_up_words(rng, 160, (2, 3), taken)
    cities, countries = made_up_words(rng, 150, (2, 3), taken), made_up_words(rng, 30, (2, 3), taken)
    universities = [f"{word} University" for word in made_up_words(rng, 60, (2,), taken)]
    people = rng.sample([f"{a} {b}" for a in first for b in last], 800)
    companies = rng.sample([f"{a} {b}" for a in last for b in _COMPANY_SUFFIXES], 350)
    titles = rng.sample([f"The {a} {b}" for a in _ADJECTIVES for b in _NOUNS], 700)
    makers = {
        "person": lambda: {
            "job": rng.choice(_JOBS),
            "birthplace": rng.choice(cities),
            "birth_year": str(rng.randint(1850, 1999)),
            "university": rng.choice(universities),
            "employer": rng.choice(companies),
        },
        "city": lambda: {
            "country": rng.choice(countries),
            "mayor": rng.choice(people),
            "population": str(rng.randint(10**4, 10**7)),
        },
        "company": lambda: {
            "founder": rng.choice(people),
            "base": rng.choice(cities),
            "founding_year": str(rng.randint(1850, 2010)),
        },
        "book": lambda: {
            "author": rng.choice(people),
            "publisher": rng.choice(companies),
            "year": str(rng.randint(1900, 2020)),
        },
        "film": lambda: {
            "director": rng.choice(people),
            "setting": rng.choice(cities),
            "year": str(rng.randint(1930, 2020)),
        },
    }
    names = {"person": people, "city": cities, "company": companies, "book": titles[:350], "film": titles[350:]}
    entities: dict[str, Entity] = {}
    for kind, members in names.items():
        for name in members:
            facts = makers[kind]()
            entities[name] = Entity(name, kind, facts, rng.choice(PAGES[kind]).format(name=name, **facts))
    held_out = frozenset(rng.sample(sorted(entities), len(entities) * 15 // 100))
    return Encyclopedia(entities, held_out)


@dataclass(frozen=True, slots=True)
class TwoHop:
    """A question's two hops, made or read back from its text."""

    entity: str
    first: Relation
    second: Relation
    asked: str
    """The question about the second hop alone, X for who or what it is about: "In which city was X born?"."""
    middle: str
    """Who or what X is, in the question's words: "the author of The Silver Harbor"."""


def make_two_hop(rng: random.Random, world: Encyclopedia, *, split: str, unseen: bool) -> tuple[str, TwoHop, str]:
    """A question of `split`, its hops and its answer; `unseen`: with a combination of relations never trained on."""
    while True:
        index = rng.randrange(len(COMBINATIONS))
        if (index in UNSEEN_COMBINATIONS) != unseen:
            continue
        first, second = COMBINATIONS[index]
        entity = rng.choice(world.of_type(first.subject))
        bridge = world.entities[entity].facts[first.name]
        touches_held_out = entity in world.held_out if split == "test" else not {entity, bridge} & world.held_out
        if not touches_held_out:
            continue
        asked = rng.choice(second.phrases)
        middle = rng.choice(first.phrases).format(x=entity)
        hops = TwoHop(entity, first, second, asked.format(x="X"), middle)
        return asked.format(x=middle), hops, world.entities[bridge].facts[second.name]


def read_two_hop(question: str) -> TwoHop | None:
    """Understands the text of a two-hop question; None when it is none. This is how the built-in expert sees it."""
    best: TwoHop | None = None
    for second in SECOND_HOPS:
        for asked, middle in _filled(second.phrases, question):
            for first in FIRST_HOPS:
                if first.target != second.subject:
                    continue
                for _, entity in _filled(first.phrases, middle):
                    # "the mayor of the city {x}" also fits "the mayor of {x}": the longest phrase leaves the shortest
                    # name.
                    if best is None or len(entity) < len(best.entity):
                        best = TwoHop(entity, first, second, asked.format(x="X"), middle)
    return best


def read_page(text: str) -> dict[str, str]:
    """The facts that a page's text tells; empty when it is no page of this world."""
    for templates in PAGES.values():
        for template in templates:
            pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(template))
            found = re.fullmatch(pattern, text)
            if found:
                return {fact: value for fact, value in found.groupdict().items() if fact != "name"}
    return {}


def _filled(templates: tuple[str, ...], text: str) -> list[tuple[str, str]]:
    """Each template that fits, with what stands at its {x}."""
    fits = []
    for template in templates:
        before, after = template.split("{x}")
        if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            fits.append((template, text[len(before) : len(text) - len(after)]))
    return fits
