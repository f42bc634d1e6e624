"""Passages in an Arrow file that is mapped into memory: a corpus of any size costs no memory until it is read.

It is written from an iterator, so a corpus need never be in memory whole (its ids are, while it is written). An index
folder holds one for each of its shards. Format: Arrow IPC file (https://arrow.apache.org), columns id, title, text.

Example::

    sha256 = write_passages(read_passages("wiki.jsonl"), Path("passages.arrow"), source="wiki.jsonl")
    corpus = StoredCorpus(Path("passages.arrow"), sha256=sha256)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.retrieval.corpus import Corpus, CorpusCheck, CorpusError, Passage

if TYPE_CHECKING:
    import numpy as np

_BATCH_ROWS = 4096  # every batch of a file but the last has as many, so that a row's place is arithmetic


def write_passages(
    passages: Iterable[Passage], path: Path, *, source: str, on_progress: Callable[[int], None] | None = None
) -> str:
    """Write `passages` to `path` and return their checksum, that of a `Corpus` of them.

    Raises `CorpusError` as `Corpus` does; `on_progress` is called with the number written so far.
    """
    import pyarrow as pa

    schema = pa.schema([("id", pa.large_string()), ("title", pa.large_string()), ("text", pa.large_string())])
    check = CorpusCheck(source)
    written = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        rows: list[Passage] = []

        def flush() -> None:
            nonlocal written
            columns = [[passage.id for passage in rows], [passage.title for passage in rows]]
            columns.append([passage.text for passage in rows])
            arrays = [pa.array(column, pa.large_string()) for column in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            written += len(rows)
            rows.clear()
            if on_progress is not None:
                on_progress(written)

        for passage in check.passing(passages):
            rows.append(passage)
            if len(rows) == _BATCH_ROWS:
                flush()
        if rows:
            flush()
    return check.sha256()


class StoredCorpus(Corpus):
    """A `Corpus` that reads each passage from the file that `write_passages` wrote.

    `sha256` is what `write_passages` returned; it is believed (`index_folder` keeps a checksum of the file itself).
    Raises `CorpusError` for a file that is none of these.
    """

    def __init__(self, path: Path, *, sha256: str) -> None:
        import pyarrow as pa

        self.source, self.sha256 = str(path), sha256
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            self._columns: list[list[Any]] = [table.column(name).chunks for name in ("id", "title", "text")]
        except (pa.ArrowInvalid, KeyError) as error:
            raise CorpusError(f"{path}: holds no stored passages: {error}") from error
        self._table, self._count = table, table.num_rows

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < self._count:
            raise IndexError(f"passage {row} of {self._count}")
        batch, at = divmod(row, _BATCH_ROWS)
        identity, title, text = (column[batch][at].as_py() for column in self._columns)
        return Passage(id=identity, title=title, text=text)

    def __iter__(self) -> Iterator[Passage]:
        return self.slice(0, self._count)

    def slice(self, start: int, stop: int) -> Iterator[Passage]:
        """Passages `start` to before `stop`, a batch in memory at a time."""
        for first in range(start, stop, _BATCH_ROWS):
            rows = self._table.slice(first, min(_BATCH_ROWS, stop - first)).to_pydict()
            for identity, title, text in zip(rows["id"], rows["title"], rows["text"], strict=True):
                yield Passage(id=identity, title=title, text=text)

    @cached_property
    def tie_rank(self) -> np.ndarray:
        """See `Corpus.tie_rank`: the order of UTF-8 bytes is that of code points."""
        import numpy as np
        import pyarrow.compute as pc

        rank = np.empty(self._count, dtype=np.int64)
        rank[pc.sort_indices(self._table.column("id")).to_numpy()] = np.arange(self._count)  # type: ignore[attr-defined]
        return rank
