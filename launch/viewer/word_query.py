"""What a person types into the text filter, as a query of SQLite's FTS5 and as what to mark in a page.

Words are looked for anywhere in a trajectory, in any order, all of them; a word of three letters or more also finds
those that begin with it. `"in quotes"` is a phrase, `-word` must not occur. Case and accents do not count. Scripts that
write without spaces are taken character by character, so a part of a sentence is found there too.

Example::

    parse('lantern "directed by" -novel').match    # '("lantern" * AND "directed by") NOT ("novel" *)'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TERM = re.compile(r'(-?)"([^"]*)"?|(\S+)')
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff])"
)
_PREFIX_CHARACTERS = 3
"""A shorter beginning has so many words that looking them all up takes seconds."""
_MOST_TERMS = 32


class QueryError(ValueError):
    """A text filter that cannot be looked for; the message says what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordQuery:
    """A parsed text filter."""

    match: str
    """For `MATCH`; "" when nothing is asked for."""
    marked: re.Pattern[str] | None
    """Finds in a text what was asked for."""


def spaced(text: str) -> str:
    """As it is indexed: characters of scripts without spaces stand alone, NUL is a space."""
    if text.isascii():
        return text.replace("\0", " ")
    return _UNSPACED.sub(r" \1 ", text.replace("\0", " "))


def parse(text: str) -> WordQuery:
    """Raises `QueryError` for one that only excludes, or has too many words."""
    wanted: list[str] = []
    excluded: list[str] = []
    marks: list[str] = []
    for minus, phrase, word in _TERM.findall(text.replace("\0", " ")):
        negative = bool(minus) or (word.startswith("-") and len(word) > 1 and word[1].isalpha())
        said = phrase or (word[1:] if negative and word else word)
        if not any(each.isalnum() for each in said):
            continue
        quoted = '"' + " ".join(spaced(said).split()).replace('"', '""') + '"'
        if not phrase and len(said) >= _PREFIX_CHARACTERS and said[-1].isalnum() and not _UNSPACED.search(said):
            quoted += " *"
        (excluded if negative else wanted).append(quoted)
        if not negative:
            marks.append(r"\W+".join(map(re.escape, re.findall(r"\w+", said))))
    if len(wanted) + len(excluded) > _MOST_TERMS:
        raise QueryError(
            f"the text filter has {len(wanted) + len(excluded)} words; at most {_MOST_TERMS} are looked for"
        )
    if excluded and not wanted:
        raise QueryError(f"the text filter {text!r} only leaves out; name a word to look for as well")
    match = " AND ".join(wanted)
    if excluded:
        match = f"({match}) NOT ({' OR '.join(excluded)})"
    pattern = "|".join(rf"(?<!\w){each}" for each in marks if each)
    return WordQuery(match=match, marked=re.compile(pattern, re.IGNORECASE) if pattern else None)
