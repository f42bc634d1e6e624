"""A teacher's scores of a ledger's rows, on disk: `ScoreWriter` puts them there, `StoredScores` is a learner's scorer.

    ledger/scores/<teacher>/part-*.parquet      key, digest, tokens, places, ids, logprobs

A row is known by its trajectory's key and a digest of its token ids: scores of the same trajectory under another
tokenizer, chat template or system prompt are no scores of this row, and to ask for them is an error, never a silent
mismatch. Only places that a student is trained on are kept. Parts are written whole or not at all and never changed, so
that a scoring run that was cut off goes on where it was; each holds few rows, and only the latest that were asked for
are in memory.

How the scores are made is not its business: see `launch.score`.

Example::

    scorer = StoredScores("runs/a/ledger/scores/Qwen2.5-32B-Instruct")
    scorer(example.key, example.token_ids)      # TokenScores, or None for a row that was never scored
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learner.token_scores import TokenScores

FORMAT = 1
PART_ROWS = 64
"""Rows that are lost at most when a scoring run is killed."""
_CACHED_PARTS = 64
_METADATA = b"teacher_scores"


class StoredScoresError(ValueError):
    """Scores that are not of what is asked for; the message says what differs."""


def row_digest(token_ids: Sequence[int]) -> str:
    """32 hexadecimal digits that two rows share only when their ids are the same."""
    return hashlib.sha256(np.asarray(token_ids, "<i4").tobytes()).hexdigest()[:32]


def _schema(facts: dict[str, Any]) -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("key", pa.string()),
            ("digest", pa.string()),
            ("tokens", pa.int32()),  # of the whole row
            ("places", pa.list_(pa.int32())),  # [m] indices of the scored tokens
            ("ids", pa.list_(pa.int32())),  # [m * width], -1 where there is none
            ("logprobs", pa.list_(pa.float32())),  # [m * width], NaN where there is none
        ],
        metadata={_METADATA: json.dumps(facts, sort_keys=True).encode()},
    )


class ScoreWriter:
    """Adds to a folder of scores. Raises `StoredScoresError` when it holds those of another teacher or another k."""

    def __init__(self, folder: str | Path, *, teacher: str, top_k: int) -> None:
        self._folder = Path(folder)
        self._facts = {"format": FORMAT, "teacher": teacher, "top_k": top_k}
        self._rows: list[dict[str, Any]] = []
        for part in _parts(self._folder)[:1]:
            found = _facts(part)
            if found != self._facts:
                raise StoredScoresError(
                    f"{self._folder} holds scores of teacher {found.get('teacher')!r} with top_k "
                    f"{found.get('top_k')}, not of {teacher!r} with {top_k}; write to another folder"
                )
        self._folder.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, token_ids: Sequence[int], ids: np.ndarray, logprobs: np.ndarray, keep: np.ndarray) -> None:
        """`ids`, `logprobs`: [n, width] of the row's n tokens; `keep`: [n] bool, which of them."""
        places = np.flatnonzero(keep)
        self._rows.append(
            {
                "key": key,
                "digest": row_digest(token_ids),
                "tokens": len(token_ids),
                "places": places.astype(np.int32),
                "ids": ids[places].reshape(-1).astype(np.int32),
                "logprobs": logprobs[places].reshape(-1).astype(np.float32),
            }
        )
        if len(self._rows) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Put what was added on disk."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            return
        schema = _schema(self._facts)
        columns = {name: [row[name] for row in self._rows] for name in schema.names}
        path = self._folder / f"part-{uuid.uuid4().hex}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(pa.table(columns, schema=schema), partial, compression="zstd")
        os.replace(partial, path)
        self._rows.clear()


class StoredScores:
    """A folder of scores as a `learner.examples.Scorer`; picklable. Files that come after its first use are not seen.

    Raises `StoredScoresError` at once for a folder without scores.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()
        parts = _parts(self._folder)
        if not parts:
            raise StoredScoresError(f"{self._folder} holds no scores (no part-*.parquet); make them with launch.score")
        facts = _facts(parts[0])
        self.teacher: str = facts["teacher"]
        self.top_k: int = facts["top_k"]
        self._index: dict[str, dict[str, tuple[Path, int]]] | None = None
        self._read: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None, "_read": None}

    def __call__(self, key: str, token_ids: Sequence[int]) -> TokenScores | None:
        """None for a trajectory that was never scored. Raises `StoredScoresError` for one that was, with other ids."""
        found = self._known().get(key)
        if found is None:
            return None
        digest = row_digest(token_ids)
        if digest not in found:
            raise StoredScoresError(
                f"the scores of {key!r} in {self._folder} are of a row with other token ids: score it again with this "
                "tokenizer, chat template and system prompt"
            )
        path, row = found[digest]
        columns = self._read(path)
        places = columns["places"][row].values.to_numpy()
        width = len(columns["ids"][row].values) // max(len(places), 1)
        ids = np.full((len(token_ids), width), -1, np.int32)
        logprobs = np.full((len(token_ids), width), np.nan, np.float32)
        ids[places] = columns["ids"][row].values.to_numpy().reshape(-1, width)
        logprobs[places] = columns["logprobs"][row].values.to_numpy().reshape(-1, width)
        return TokenScores(teacher_ids=ids, teacher_logprobs=logprobs)

    def has(self, key: str, token_ids: Sequence[int]) -> bool:
        """Whether this very row was scored."""
        return row_digest(token_ids) in self._known().get(key, {})

    def __len__(self) -> int:
        """Rows."""
        return sum(map(len, self._known().values()))

    def _known(self) -> dict[str, dict[str, tuple[Path, int]]]:
        if self._index is None:
            import pyarrow.parquet as pq

            self._index = {}
            for part in _parts(self._folder):
                if (facts := _facts(part)) != _facts_of(self):
                    raise StoredScoresError(f"{part} holds scores of {facts}, others here of {_facts_of(self)}")
                table = pq.read_table(part, columns=["key", "digest"])
                pairs = zip(table["key"].to_pylist(), table["digest"].to_pylist(), strict=True)
                for row, (key, digest) in enumerate(pairs):
                    self._index.setdefault(key, {})[digest] = (part, row)
            columns = ["places", "ids", "logprobs"]
            self._read = functools.lru_cache(_CACHED_PARTS)(functools.partial(pq.read_table, columns=columns))
        return self._index


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _facts_of(scores: StoredScores) -> dict[str, Any]:
    return {"format": FORMAT, "teacher": scores.teacher, "top_k": scores.top_k}


def _facts(part: Path) -> dict[str, Any]:
    """What a part says of itself. Raises `StoredScoresError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        told = (pq.read_schema(part).metadata or {}).get(_METADATA)
    except (OSError, pa.ArrowInvalid) as error:
        raise StoredScoresError(f"{part} cannot be read: {error}; remove it, and score again") from None
    facts = json.loads(told) if told is not None else {}
    if facts.get("format") != FORMAT:
        raise StoredScoresError(f"{part} holds no teacher's scores of format {FORMAT}")
    return facts
