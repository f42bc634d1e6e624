"""Encoding a corpus so that nothing is encoded twice: embeddings go to disk shard by shard, a later run does the rest.

The folder is named by the digest of corpus and encoder, so shards of something else are never mistaken for these. A
shard is renamed into place when it is whole. This is no index: see `faiss_index` and `index_store`.

Example::

    embeddings = encode_in_shards(corpus, encoder, "outputs/shards", on_progress=lambda done, all_: print(done, all_))
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from envs.retrieval.corpus import Corpus
from envs.retrieval.encoders import Encoder
from envs.retrieval.retriever import digest

if TYPE_CHECKING:
    import numpy as np

SHARD_ROWS = 1024  # half a minute of a small encoder on one core: what a killed run loses at most
Progress = Callable[[int, int], None]
"""Called with (passages embedded, passages in all)."""


def shards_folder(corpus: Corpus, encoder: Encoder, folder: str | Path) -> Path:
    """Where the shards of `corpus` by `encoder` are kept under `folder`."""
    facts = {"corpus": corpus.sha256, "encoder": encoder.fingerprint, "rows": SHARD_ROWS}
    return Path(folder) / f"embeddings-{digest(facts)[:16]}"


def encode_in_shards(
    corpus: Corpus,
    encoder: Encoder,
    folder: str | Path,
    *,
    into: np.ndarray | None = None,
    on_progress: Progress | None = None,
) -> np.ndarray:
    """float32 [n, dim]: the embeddings of all passages, encoded now or by an earlier run that was given `folder`.

    They are written to `into` (a memory-mapped file, say) where one is given, and it is returned.
    """
    import numpy as np

    kept = shards_folder(corpus, encoder, folder)
    kept.mkdir(parents=True, exist_ok=True)
    embeddings = np.empty((len(corpus), encoder.dim), dtype=np.float32) if into is None else into
    for start in range(0, len(corpus), SHARD_ROWS):
        stop = min(start + SHARD_ROWS, len(corpus))
        embeddings[start:stop] = _shard(corpus, encoder, kept, start, stop)
        if on_progress is not None:
            on_progress(stop, len(corpus))
    return embeddings


def _shard(corpus: Corpus, encoder: Encoder, kept: Path, start: int, stop: int) -> np.ndarray:
    import numpy as np

    path = kept / f"rows-{start:010d}.npy"
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # not there, or damaged: encoded again
        rows = np.load(path)
        if rows.shape == (stop - start, encoder.dim) and rows.dtype == np.float32:
            return rows
    rows = encoder.encode_passages([corpus[row].contents for row in range(start, stop)])
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    with draft.open("wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    return rows
