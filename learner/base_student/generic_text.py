"""The base student's pretraining text: unlimited, seeded, generic. Copying, looking up, quoting, listing, plain Python.

It holds no tools, no agent's turns, no arithmetic to be learnt by heart and nothing of any task, which
`tests/test_base_student.py` checks. A document is a list of pieces, each marked *given* (made up at random, nothing to
learn) or *learnt* (it follows from what was given); the loss is taken on the learnt pieces alone.

    >>> document(random.Random(0)).text     # for instance '<|im_start|>user\\nRepeat: 4821, Velmora ...'
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from learner.base_student.made_up import (
    any_word,
    full_name,
    institution,
    item,
    name,
    number,
    proper,
    sentence,
    title,
    words,
    year,
)
from learner.base_student.word_lists import ADJECTIVES, FIELD_NAMES, NOUNS

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

SYSTEM_LINES = (
    "You copy with care.",
    "You are a careful clerk. Answer with what the text says.",
    "You answer from the text that you are given.",
    "You write short plain Python.",
    "You keep lists and quote them exactly.",
)


# Never fields of an entry here: what a task may well ask about is left for the student to learn.
_LEFT_OUT = set(
    "author writer poet novelist founder director mayor publisher birthplace employer employee profession population "
    "country headquarters university college company city birth year border capital language inhabitant owner "
    "member base".split()
)
# Words thrown together can read like a question or a page of a task by chance: such documents are dropped.
_LIKE_A_TASK = re.compile(
    r"\b(buys?|bought|sells?|sold|loses|finds|gives? away|packs) (\w+ ){0,2}\d|\b(how many|in which|was born)\b"
    r"|\b(written|wrote|published|founded|directed|released|created|born|based|located|employed) (by|in|at)\b"
    r"|\bthe (author|writer|director|founder|mayor|publisher|birthplace|employer|headquarters) (of|is)\b|\bAnswer:",
    re.IGNORECASE,
)
_NOUN_FIELDS = [noun for noun in NOUNS if noun not in _LEFT_OUT]


@dataclass(slots=True)
class Document:
    """Pieces of text in order, each with whether it is learnt."""

    pieces: list[tuple[str, bool]] = field(default_factory=list)

    def given(self, text: str) -> "Document":
        self.pieces.append((text, False))
        return self

    def learnt(self, text: str) -> "Document":
        self.pieces.append((text, True))
        return self

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    @property
    def learnt_flags(self) -> bytes:
        """One byte per character of `text`: 1 where it is learnt."""
        return b"".join(bytes([flag]) * len(text) for text, flag in self.pieces)


Exchange = tuple[str, str]
"""What is asked and what follows from it."""
Exchanges = list[Exchange]
"""Exchanges about one text; the first one holds the text."""


# ---- exchanges: (what is asked, the answer that can be read off it)


def listed(rng: random.Random) -> Exchanges:
    """A list copied in order, set in other forms, asked about."""
    make = rng.choice((item, item, proper, number, name, any_word, lambda r: number(r, 4, 7), sentence))
    items = [make(rng) for _ in range(rng.randint(2, 4 if make is sentence else 9))]
    separators = (", ", "; ", " ", "\n", " | ", " / ", " - ")
    separator = rng.choice(separators)
    text = separator.join(items)

    def ask() -> Exchange:
        i = rng.randrange(len(items) - 1)
        u = rng.random()
        if u < 0.4:
            verb = rng.choice(("Repeat", "Copy", "Echo", "Say again", "Write out", "List"))
            return f"{verb}:", text if rng.random() < 0.6 else rng.choice(separators).join(items)
        if u < 0.8:
            form, line = rng.choice(_LIST_FORMS)
            return form, "\n".join(line(i, x) for i, x in enumerate(items, 1))
        if u < 0.9:
            return f"What comes after {items[i]}?", items[i + 1]
        return f"What comes before {items[i + 1]}?", items[i]

    return _about(rng, text, ask, most=4)


_LIST_FORMS: tuple[tuple[str, Callable[[int, str], str]], ...] = (
    ("Number these:", lambda i, x: f"{i}. {x}"),
    ("Bullets:", lambda i, x: f"- {x}"),
    ("Brackets:", lambda i, x: f"[{i}] {x}"),
    ("Quote each:", lambda i, x: f'"{x}"'),
    ("As comments:", lambda i, x: f"# {x}"),
    ("Print each:", lambda i, x: f'print("{x}")'),
)


def key_values(rng: random.Random) -> Exchanges:
    """Pairs, then a few keys to look up."""
    make_key = rng.choice((any_word, name, full_name, title, institution, lambda r: number(r, 2, 4)))
    pairs = {make_key(rng): item(rng) for _ in range(rng.randint(2, 12))}
    join, sep = rng.choice(((": ", "; "), (" = ", "\n"), (" -> ", "\n"), (" is ", ". "), (" - ", ", "), ("\t", "\n")))
    text = sep.join(f"{k}{join}{v}" for k, v in pairs.items())

    def ask() -> Exchange:
        asked = rng.sample(list(pairs), min(len(pairs), rng.randint(1, 3)))
        return rng.choice(
            (
                (f"{asked[0]}?", pairs[asked[0]]),
                (f"Look up: {', '.join(asked)}", "\n".join(f"{k}{join}{pairs[k]}" for k in asked)),
                (f"{', '.join(asked)}?", ", ".join(pairs[k] for k in asked)),
            )
        )

    return _about(rng, text, ask, most=min(len(pairs), 7))


def _about(rng: random.Random, text: str, ask: Callable[[], Exchange], most: int) -> Exchanges:
    """Up to `most` questions about one text, which stands before or after the first of them."""
    (asked, answer), *more = [ask() for _ in range(rng.randint((most + 1) // 2, most))]
    return [(f"{text}\n{asked}" if rng.random() < 0.6 else f"{asked}\n{text}", answer), *more]


def numbered_lines(rng: random.Random) -> Exchanges:
    """Lines with numbers; some of them quoted."""
    lines = [
        sentence(rng, number(rng) if rng.random() < 0.5 else None) if rng.random() < 0.7 else item(rng)
        for _ in range(rng.randint(2, 8))
    ]

    def ask() -> Exchange:
        wanted = sorted(rng.sample(range(len(lines)), min(len(lines), rng.randint(1, 2))))
        if rng.random() < 0.6:
            return f"Quote line {' and '.join(str(i + 1) for i in wanted)}.", "\n".join(
                f'Line {i + 1} says "{lines[i]}"' for i in wanted
            )
        start = " ".join(lines[wanted[0]].split()[: rng.randint(1, 2)])
        return f'Which line starts with "{start}"?', next(line for line in lines if line.startswith(start))

    return _about(rng, "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1)), ask, most=4)


def delimited(rng: random.Random) -> Exchange:
    """Something between marks inside other words."""
    left, right = rng.choice((("<", ">"), ("[", "]"), ("(", ")"), ('"', '"'), ("*", "*"), ("{", "}"), ("--", "--")))
    found = [item(rng) for _ in range(rng.randint(1, 3))]
    text = words(rng, 1, 6)
    for thing in found:
        text += f" {left}{thing}{right} {words(rng, 1, 6)}"
    return f"{text}\nWhat is inside {left} {right}?", rng.choice((", ", "\n")).join(found)


def _record(rng: random.Random, fields: list[str]) -> tuple[str, dict[str, str], str]:
    """(subject, value by field, the prose that says so)"""
    subject = proper(rng)
    values = {f: rng.choice((item, full_name, name, institution, year, number))(rng) for f in fields}
    order = rng.sample(fields, len(fields))
    style = rng.randrange(5)
    if style == 0:
        prose = "; ".join(f"{f} {values[f]}" for f in order) + "."
    elif style == 1:
        prose = ". ".join(f"The {f} is {values[f]}" for f in order) + "."
    elif style == 2:
        prose = f"{rng.choice(('a', 'one'))} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} with " + ", ".join(
            rng.choice((f"{values[f]} as {f}", f"{f} {values[f]}", f"the {f} {values[f]}")) for f in order
        )
    elif style == 3:
        prose = ", ".join(f"{f}{rng.choice((':', ' by', ' in'))} {values[f]}" for f in order) + "."
    else:
        prose = " ".join(f"{rng.choice(('Its', 'A', 'Their'))} {f}, {values[f]}, {words(rng, 1, 3)}." for f in order)
    return subject, values, prose


def _fields(rng: random.Random) -> list[str]:
    return rng.sample(FIELD_NAMES if rng.random() < 0.7 else _NOUN_FIELDS, rng.randint(2, 5))


def registry(rng: random.Random) -> Exchanges:
    """Entries about made-up subjects; fields of some of them."""
    fields = _fields(rng)
    records = [_record(rng, rng.sample(fields, rng.randint(1, len(fields)))) for _ in range(rng.randint(1, 4))]
    join = rng.choice((": ", " - ", ", ", " is "))
    lead = rng.choice(("", "", "Registry entry: ", "Entry: "))

    def ask() -> Exchange:
        subject, values, _ = rng.choice(records)
        f = rng.choice(list(values))
        return rng.choice(
            (
                (f"{f} of {subject}?", values[f]),
                (f"{subject}: {f}?", values[f]),
                (f"State the {f} of {subject}.", f"The {f} of {subject} is {values[f]}."),
                (f"Which {f} does the entry {subject} give?", values[f]),
                (f"{f} of {subject}", f"{f} of {subject} -> {values[f]}"),
                (f"Note the {f} of {subject}.", f"The {f} is {values[f]}."),
                (f"Set {f} from {subject}.", f'{f} = "{values[f]}"'),
            )
        )

    text = "\n".join(f"{lead}{s}{join}{prose}" for s, _, prose in records)
    return _about(rng, text, ask, most=1 + sum(len(values) for _, values, _ in records))


def results(rng: random.Random) -> Exchanges:
    """A numbered list of pages; something from the ones that match."""
    fields = _fields(rng)
    records = [_record(rng, rng.sample(fields, rng.randint(1, len(fields)))) for _ in range(rng.randint(2, 4))]

    def ask() -> Exchange:
        i = rng.randrange(len(records))
        subject, values, prose = records[i]
        f = rng.choice(list(values))
        return rng.choice(
            (
                (f"{subject}: which {f}?", f"[{i + 1}] gives the {f} {values[f]}."),
                (f"Want: {f} of {subject}", f"The {f} of {subject} is {values[f]}."),
                (f"Print the {f} of {subject}.", f'print("{values[f]}")'),
                (f"What does the page {subject} say?", prose),
                (f"{f} in [{i + 1}]?", f"The {f} is {values[f]}."),
                (f"{f} in [{i + 1}], as code", f'# The {f} is {values[f]}.\nprint("{values[f]}")'),
                ("Titles?", ", ".join(s for s, _, _ in records)),
            )
        )

    text = "\n".join(f"[{i}] {s}: {prose}" for i, (s, _, prose) in enumerate(records, 1))
    return _about(rng, text, ask, most=7)


def follow(rng: random.Random) -> Exchange:
    """Arrows, followed from a start."""
    make = rng.choice((name, any_word, full_name, lambda r: number(r, 2, 5)))
    nodes = list(dict.fromkeys(make(rng) for _ in range(rng.randint(4, 9))))
    arrows = list(zip(nodes, nodes[1:], strict=False))
    rng.shuffle(arrows)
    steps = rng.randint(1, 3)
    i = rng.randrange(max(1, len(nodes) - steps))
    text = rng.choice((", ", "\n", "; ")).join(f"{a} -> {b}" for a, b in arrows)
    return f"{text}\nFollow {nodes[i]}, {steps} arrows.", " -> ".join(nodes[i : i + steps + 1])


_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "over": "//", "modulo": "%"}


def passage(rng: random.Random) -> Exchanges:
    """A passage as code, each sentence quoted as a comment above the line that uses it; and in other forms."""
    style = rng.choice(("same", "new", "chain", "chain", "chain", "text"))
    sentences, values, code = [], [], []
    variable = rng.choice(("x", "x", "y", "n", "a", "v", "value", "level", "total", "count", "result"))
    for i in range(rng.randint(1, 5)):
        word, operator = rng.choice(list(_OPERATORS.items()))
        if style == "text":
            value = proper(rng)
            said = rng.choice((f"{words(rng, 1, 4)} {value}.", f"the {rng.choice(FIELD_NAMES)} is {value}."))
            said = said[0].upper() + said[1:]
            line = rng.choice((f'name = "{value}"', f'text = "{value}"', f'print("{value}")', f'print("{value}")'))
        else:
            value = number(rng, 1, 6)
            said = sentence(rng, value)
            line = f"{chr(97 + i) if style == 'new' else variable} = {value}"
            if style == "chain" and i:
                said = rng.choice((f"{words(rng, 1, 5)} {word} {value}.", f"{word} {value} {words(rng, 1, 4)}."))
                said = said[0].upper() + said[1:]
                line = f"{variable} = {variable} {operator} {value}"
        sentences.append(said)
        values.append(value)
        code += [f"# {said}", line]
    if style != "text":
        code.append(f"print({variable if style != 'new' else 'a'})")
    block = "\n".join(code)

    def ask() -> Exchange:
        i = rng.randrange(len(sentences))
        return rng.choices(
            (
                (rng.choice(("Write it as Python.", "Python, please.", "As code:")), block),
                ("As a code block.", f"```python\n{block}\n```"),
                ("Numbers?" if style != "text" else "Names?", rng.choice((", ", "\n", " ")).join(values)),
                ("Split into lines.", "\n".join(sentences)),
                ("Again.", " ".join(sentences)),
                (f"Which sentence has {values[i]}?", sentences[i]),
            ),
            weights=(4, 1, 1, 1, 1, 1),
        )[0]

    return _about(rng, rng.choice((" ", " ", "\n")).join(sentences), ask, most=3)


def plain_code(rng: random.Random) -> Exchange:
    """Lists, dictionaries and prints of what was given."""
    items = [item(rng) for _ in range(rng.randint(2, 6))]
    keys = list(dict.fromkeys(any_word(rng) for _ in items))
    pairs = dict(zip(keys, items, strict=False))
    listed = ", ".join(f'"{x}"' for x in items)
    mapped = ", ".join(f'"{k}": "{v}"' for k, v in pairs.items())
    k = rng.choice(keys)
    variable = rng.choice(("d", "data", "m", "table"))
    a, b = number(rng, 1, 6), number(rng, 1, 6)
    word, operator = rng.choice(list(_OPERATORS.items()))
    return rng.choice(
        (
            (f"Make a Python list: {', '.join(items)}", f"items = [{listed}]"),
            (f"Make a dict: {', '.join(f'{k} {v}' for k, v in pairs.items())}", f"{variable} = {{{mapped}}}"),
            (f'{variable} = {{{mapped}}}\nprint({variable}["{k}"])', pairs[k]),
            (f"items = [{listed}]\nfor x in items:\n    print(x)", "\n".join(items)),
            (f"Print {items[0]}", f'print("{items[0]}")'),
            (f"{a} {word} {b} in Python", f"print({a} {operator} {b})"),
            (f"Set {keys[0]} to {a} and print it", f"{keys[0]} = {a}\nprint({keys[0]})"),
            (f"x = {a}\ny = {b}\nprint(y, x)", f"{b} {a}"),
            (f"Printed:\n{a}", rng.choice((f"The value is {a}.", f"value = {a}", f"report({a})", a))),
            (f"Printed:\n{items[0]}", rng.choice((f"It shows {items[0]}.", f'report("{items[0]}")', items[0]))),
        )
    )


def session(rng: random.Random) -> Exchange:
    """An interpreter session that shows what it was given."""
    names = rng.sample("abcdeghknpqrstuvwxyz", 3)
    values = [number(rng) if rng.random() < 0.6 else f'"{proper(rng)}"' for _ in names]
    text = "\n".join(f">>> {n} = {v}" for n, v in zip(names, values, strict=True))
    i = rng.randrange(3)
    return f"{text}\n>>> print({names[i]})", values[i].strip('"')


EXCHANGES: dict[Callable[[random.Random], Exchange | Exchanges], float] = {
    listed: 3.0,
    key_values: 2.0,
    numbered_lines: 1.5,
    delimited: 0.7,
    registry: 2.5,
    results: 2.5,
    follow: 1.0,
    passage: 3.5,
    plain_code: 2.0,
    session: 0.7,
}


# ---- documents


def _exchanges(rng: random.Random) -> Exchanges:
    made = rng.choices(list(EXCHANGES), weights=list(EXCHANGES.values()))[0](rng)
    return made if isinstance(made, list) else [made]


def chat(rng: random.Random) -> Document:
    """One to four exchanges as chat turns."""
    doc = Document()
    if rng.random() < 0.6:
        doc.given(f"{TURN_START}system\n{rng.choice(SYSTEM_LINES)}{TURN_END}\n")
    for _ in range(rng.choice((1, 1, 1, 2, 2))):
        for asked, answer in _exchanges(rng):
            doc.given(f"{TURN_START}user\n{asked}{TURN_END}\n{TURN_START}assistant\n")
            doc.learnt(f"{answer}{TURN_END}").given("\n")
    return doc


def plain(rng: random.Random) -> Document:
    """The same exchanges as running text."""
    doc = Document()
    for _ in range(rng.randint(1, 4)):
        for asked, answer in _exchanges(rng):
            doc.given(asked + "\n").learnt(answer + "\n")
    return doc


def recall(rng: random.Random) -> Document:
    """Notes that come back word for word after other notes: copying over hundreds of tokens."""
    notes = {}
    for _ in range(rng.randint(3, 8)):
        make = rng.choice((item, sentence, lambda r: sentence(r, number(r)), lambda r: ", ".join(map(item, [r] * 4))))
        notes[f"{rng.choice(NOUNS)} {number(rng, 1, 2)}"] = make(rng)
    doc = Document()
    if rng.random() < 0.5:
        doc.given(f"{TURN_START}user\n")
    for key, text in notes.items():
        doc.given(f"Note {key}: {text}\n")
    order = rng.sample(list(notes), len(notes)) if rng.random() < 0.7 else list(notes)
    for key in order[: rng.randint(len(order) // 2, len(order))]:
        doc.given(f"Again {key}:").learnt(f" {notes[key]}\n")
    return doc


def whole_again(rng: random.Random) -> Document:
    """A passage, then the same passage."""
    passage = " ".join(sentence(rng, number(rng) if rng.random() < 0.4 else None) for _ in range(rng.randint(2, 7)))
    if rng.random() < 0.4:
        return Document().given(passage + "\n").learnt(passage + "\n")
    doc = Document().given(f"{TURN_START}user\n{passage}{TURN_END}\n{TURN_START}assistant\n")
    return doc.learnt(passage + TURN_END).given("\n")


DOCUMENTS: dict[Callable[[random.Random], Document], float] = {chat: 6.0, plain: 1.5, recall: 1.5, whole_again: 1.0}


def document(rng: random.Random) -> Document:
    """One document of a random kind."""
    return rng.choices(list(DOCUMENTS), weights=list(DOCUMENTS.values()))[0](rng)


def documents(seed: int) -> Iterator[Document]:
    """Documents without end; the same seed gives the same ones."""
    rng = random.Random(seed)
    while True:
        made = document(rng)
        if _LIKE_A_TASK.search(made.text) is None:
            yield made
