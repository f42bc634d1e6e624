"""The passages that can be found: `Passage`, and `Corpus`, an ordered set of them with a checksum.

A corpus is text alone: no index, no embedding. It is read whole into memory; a passage of 100 words costs about 1 kB.

Two JSONL line formats are read, and may be mixed: `{"id", "title", "text"}`, and the one of Search-R1's wiki-18 dump
(https://github.com/PeterGriffinJin/Search-R1), `{"id", "contents"}` with `contents` = `"Title"`, a newline, the text.

Example::

    corpus = Corpus.from_jsonl("wiki.jsonl")
    corpus = Corpus([Passage(id="1", title="Paris", text="Paris is the capital of France.")])
    corpus[0].contents        # '"Paris"\\nParis is the capital of France.'
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class CorpusError(ValueError):
    """A corpus that cannot be used; the message names the file, the line and what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One piece of text that a search can return."""

    id: str
    title: str
    """May be empty."""
    text: str

    @property
    def contents(self) -> str:
        """Title and text in one string, as wiki-18 has it: what is indexed and what most formatters show."""
        return f'"{self.title}"\n{self.text}' if self.title else self.text


class Corpus:
    """Passages in their file's order, addressed by row.

    Raises `CorpusError` when there is none, when an id comes twice, or when a text is not valid Unicode.
    """

    def __init__(self, passages: Iterable[Passage], *, source: str = "passages") -> None:
        self._passages = tuple(passages)
        self.source = source
        """Where the passages came from; for messages only."""
        if not self._passages:
            raise CorpusError(f"{source}: holds no passage; at least one is needed")
        digest = hashlib.sha256()
        seen: dict[str, int] = {}
        for row, passage in enumerate(self._passages):
            first = seen.setdefault(passage.id, row)
            if first != row:
                raise CorpusError(
                    f"{source}: id {passage.id!r} of passage {row + 1} is that of passage {first + 1}; ids must differ"
                )
            try:
                line = json.dumps([passage.id, passage.title, passage.text], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise CorpusError(
                    f"{source}: passage {passage.id!r} holds a lone surrogate ({error.reason}); valid Unicode is needed"
                ) from error
            digest.update(line + b"\n")
        self.sha256 = digest.hexdigest()
        """Checksum of ids, titles and texts in order: the same for both line formats."""

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Corpus:
        """Read a file, one passage a line; blank lines are skipped.

        Raises `CorpusError` naming file and line for a malformed line, `FileNotFoundError` for a missing file.
        """
        return cls(_read_jsonl(Path(path)), source=str(path))

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, row: int) -> Passage:
        return self._passages[row]

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._passages)

    @cached_property
    def tie_rank(self) -> np.ndarray:
        """int64 [n]: place of each row when ids are sorted; orders equal scores, whatever the file's order."""
        import numpy as np

        rank = np.empty(len(self), dtype=np.int64)
        rank[sorted(range(len(self)), key=lambda row: self._passages[row].id)] = np.arange(len(self))
        return rank


def _read_jsonl(path: Path) -> Iterator[Passage]:
    with path.open(encoding="utf-8") as lines:
        number = 0
        while True:
            number += 1
            try:
                line = lines.readline()
            except UnicodeDecodeError as error:
                raise CorpusError(f"{path}:{number}: not UTF-8: {error}") from error
            if not line:
                return
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{path}:{number}: not JSON: {error}") from error
            try:
                yield _passage(fields)
            except CorpusError as error:
                raise CorpusError(f"{path}:{number}: {error}") from None


def _passage(fields: Any) -> Passage:
    if not isinstance(fields, dict):
        raise CorpusError(f"an object with id, title, text (or id, contents) is needed, got {type(fields).__name__}")
    if isinstance(identity := fields.get("id"), int) and not isinstance(identity, bool):
        identity = str(identity)  # some dumps number their passages
    if not isinstance(identity, str) or not identity:
        raise CorpusError(f"id must be a non-empty string, got {fields.get('id')!r}")
    names = ("contents",) if "contents" in fields else ("title", "text")
    for name in names:
        if not isinstance(fields.get(name), str):
            raise CorpusError(f"{name} of passage {identity!r} must be a string, got {fields.get(name)!r}")
    if names == ("title", "text"):
        return Passage(id=identity, title=fields["title"], text=fields["text"])
    head, newline, text = fields["contents"].partition("\n")
    if newline and len(head) > 2 and head[0] == head[-1] == '"':
        return Passage(id=identity, title=head[1:-1], text=text)
    # No quoted title: all of it is text, so that `contents` gives back what was read, byte for byte.
    return Passage(id=identity, title="", text=fields["contents"])
