"""The passages that can be found: `Passage`, and `Corpus`, an ordered set of them with a checksum.

A corpus is text alone: no index, no embedding. It is read whole into memory; a passage of 100 words costs about 1 kB
(`passage_store` has one that stays on disk).

JSON lines and Parquet are read, with one of two sets of fields: `id`, `title`, `text`, or those of Search-R1's wiki-18
dump (https://github.com/PeterGriffinJin/Search-R1), `id`, `contents` with `contents` = `"Title"`, a newline, the text.

Example::

    corpus = Corpus.from_file("wiki.jsonl")          # or wiki.parquet
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
        check = CorpusCheck(source)
        self._passages = tuple(check.passing(passages))
        self.source = source
        """Where the passages came from; for messages only."""
        self.sha256 = check.sha256()
        """Checksum of ids, titles and texts in order: the same for all formats."""

    @classmethod
    def from_file(cls, path: str | Path) -> Corpus:
        """`from_parquet` for a name that ends in .parquet, else `from_jsonl`."""
        return cls(read_passages(path), source=str(path))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Corpus:
        """Read a file, one passage a line; blank lines are skipped.

        Raises `CorpusError` naming file and line for a malformed line, `FileNotFoundError` for a missing file.
        """
        return cls(_read_jsonl(Path(path)), source=str(path))

    @classmethod
    def from_parquet(cls, path: str | Path) -> Corpus:
        """Read a file with the columns id, title, text, or id, contents; an id may be a string or an integer.

        Raises `CorpusError` naming file and row for a wrong value, `FileNotFoundError` for a missing file.
        """
        return cls(_read_parquet(Path(path)), source=str(path))

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


class CorpusCheck:
    """Lets passages through one by one, and sees to it that they make a corpus.

    `passing` raises `CorpusError` when there is none, when an id comes twice, or when a text is not valid Unicode.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._digest = hashlib.sha256()

    def passing(self, passages: Iterable[Passage]) -> Iterator[Passage]:
        """The same passages."""
        seen: dict[str, int] = {}
        for row, passage in enumerate(passages):
            first = seen.setdefault(passage.id, row)
            if first != row:
                raise CorpusError(
                    f"{self._source}: id {passage.id!r} of passage {row + 1} is that of passage {first + 1}; "
                    "ids must differ"
                )
            try:
                line = json.dumps([passage.id, passage.title, passage.text], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise CorpusError(
                    f"{self._source}: passage {passage.id!r} holds a lone surrogate ({error.reason}); "
                    "valid Unicode is needed"
                ) from error
            self._digest.update(line + b"\n")
            yield passage
        if not seen:
            raise CorpusError(f"{self._source}: holds no passage; at least one is needed")

    def sha256(self) -> str:
        """Of all that has passed until now."""
        return self._digest.hexdigest()


def read_passages(path: str | Path) -> Iterator[Passage]:
    """The passages of a Parquet file (by its name) or a JSON-lines file, one at a time; raises as `Corpus` does."""
    return _read_parquet(Path(path)) if Path(path).suffix == ".parquet" else _read_jsonl(Path(path))


def _read_parquet(path: Path) -> Iterator[Passage]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with pq.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            columns = ["id", "contents"] if "contents" in names else ["id", "title", "text"]
            if not names.issuperset(columns):
                raise CorpusError(
                    f"{path}: the columns id, title, text (or id, contents) are needed, got {', '.join(sorted(names))}"
                )
            row = 0
            for batch in file.iter_batches(columns=columns):
                for fields in batch.to_pylist():
                    row += 1
                    try:
                        yield passage_from_fields(fields)
                    except CorpusError as error:
                        raise CorpusError(f"{path}: row {row}: {error}") from None
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read as Parquet: {error}") from error


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
                yield passage_from_fields(fields)
            except CorpusError as error:
                raise CorpusError(f"{path}:{number}: {error}") from None


def passage_from_fields(fields: Any) -> Passage:
    """The passage of one decoded line, in either format. Raises `CorpusError` for anything else."""
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
