"""Made-up things to copy: proper names from many syllable inventories, digit strings, titles, phrases, plain sentences.

Every function takes a `random.Random` and returns one string. Names are never drawn from a list, so that a model
trained on them learns to copy any name and not to remember some.

    >>> name(random.Random(0))          # for instance 'Brisaimon'
"""

import random

from learner.base_student.word_lists import (
    ADJECTIVES,
    FIELD_NAMES,
    FUNCTION_WORDS,
    NOUNS,
    OTHER_VERBS,
    UNITS,
    VERBS_PAST,
)

# (onsets, vowels, codas): each line its own made-up language; "-" is nothing.
_INVENTORIES = [
    [["" if part == "-" else part for part in parts.split()] for parts in language]
    for language in (
        ("b c d f g h j k l m n p r s t v w z", "a e i o u", "- - n r s d l m"),
        ("b br c ch d dr g gr k kr l m n p pr r s sh st t th tr v", "a e i o u ai ea ie oa", "- - n r l s x th t"),
        ("k t p s h m n r w y", "a i u e o", "- - - n i"),
        ("bl br cl cr dr fl fr gl gr pr st tr sk sp wh", "a e i o u oo ee", "ck ll nd ng rt sk m t"),
        ("v z l m n r d s el al or", "a ia io e ie o u", "- - r n th l ra"),
        ("kh qu z y r n d g b h j", "a aa u o i ou", "- sh q z m n r"),
        ("h j sv k th g b f l n r s v t", "a e i o y au ei", "- r n ld rn sson k berg"),
    )
]


def name_syllables(rng: random.Random) -> list[str]:
    """One made-up name as one to three lower-case syllables and a last consonant, which may be empty."""
    onsets, vowels, codas = rng.choice(_INVENTORIES)
    return [rng.choice(onsets) + rng.choice(vowels) for _ in range(rng.choice((2, 2, 2, 3, 1)))] + [rng.choice(codas)]


def name(rng: random.Random) -> str:
    """One capitalised made-up word."""
    return "".join(name_syllables(rng)).capitalize()


def full_name(rng: random.Random) -> str:
    return f"{name(rng)} {name(rng)}"


def number(rng: random.Random, least_digits: int = 1, most_digits: int = 8) -> str:
    """A digit string without a leading zero; now and then of few distinct digits, the hard case for copying."""
    digits = rng.randint(least_digits, most_digits)
    alphabet = rng.sample("0123456789", 2) if rng.random() < 0.15 else "0123456789"
    first = rng.choice([d for d in alphabet if d != "0"] or ["1"])
    return first + "".join(rng.choice(alphabet) for _ in range(digits - 1))


def year(rng: random.Random) -> str:
    return str(rng.randint(1700, 2099))


def title(rng: random.Random) -> str:
    """For instance 'The Silver Harbor'."""
    words = f"{rng.choice(ADJECTIVES).capitalize()} {rng.choice(NOUNS).capitalize()}"
    return "The " + words if rng.random() < 0.7 else words


def institution(rng: random.Random) -> str:
    """A made-up name and one or two capitalised nouns, either way round."""
    return f"{name(rng)} {rng.choice(NOUNS).capitalize()}{'s' * (rng.random() < 0.3)}"


def any_word(rng: random.Random) -> str:
    lists = (NOUNS, NOUNS, ADJECTIVES, VERBS_PAST, OTHER_VERBS, FUNCTION_WORDS, UNITS, FIELD_NAMES)
    return rng.choice(rng.choice(lists))


def words(rng: random.Random, least: int, most: int) -> str:
    """Words in no order that means anything."""
    return " ".join(any_word(rng) for _ in range(rng.randint(least, most)))


def proper(rng: random.Random) -> str:
    """Something that has a capital: a name, a full name, a title, an institution."""
    return rng.choice((name, full_name, full_name, title, institution))(rng)


def item(rng: random.Random) -> str:
    """One thing of any sort."""
    u = rng.random()
    if u < 0.33:
        return number(rng)
    if u < 0.70:
        return proper(rng)
    if u < 0.75:
        return year(rng)
    if u < 0.97:
        return words(rng, 1, 3)
    return f"{number(rng, 1, 3)}.{number(rng, 1, 2)}"


def sentence(rng: random.Random, value: str | None = None) -> str:
    """A plain sentence; with `value` it holds that number exactly once and no other."""
    n, a = (lambda: rng.choice(NOUNS)), (lambda: rng.choice(ADJECTIVES))
    who = rng.choice((lambda: name(rng), lambda: full_name(rng), lambda: f"The {n()}", lambda: f"A {a()} {n()}"))()
    tail = rng.choice(("near", "beside", "above", "behind", "from", "under"))
    tail = rng.choice((f" {tail} {name(rng)}", f" {tail} the {n()}", f" {tail} {title(rng)}", "", ""))
    if value is None:
        if rng.random() < 0.25:
            return words(rng, 3, 10).capitalize() + "."
        return f"{who} {rng.choice(VERBS_PAST)} the {a()} {n()}{tail}."
    unit = rng.choice(UNITS)
    return rng.choice(
        (
            f"{who} {rng.choice(VERBS_PAST)} {value} {unit}{tail}.",
            f"The {n()}{tail} measures {value} {unit}.",
            f"{rng.choice(FIELD_NAMES).capitalize()} {value} marks the {a()} {n()}.",
            f"After {value} {unit} the {n()} {rng.choice(VERBS_PAST)} the {n()}.",
            f"{words(rng, 1, 6).capitalize()} {value} {words(rng, 1, 6)}.",
            f"{words(rng, 2, 8).capitalize()} {value}.",
        )
    )
