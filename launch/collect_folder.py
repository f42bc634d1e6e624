"""`CollectFolder`: where a collection is kept, on a file system or in a bucket.

    out/config.json     the configuration that the folder belongs to
    out/ledger/         every trajectory and every failure
    out/summary.json    what came of it
    scratch/            this machine's: the index, caches, what was spent (out itself unless that is a bucket)

Another configuration is refused, and told what differs; more tasks, more samples, a higher cap and other filters are no
other configuration. A lock keeps two jobs of one machine apart; two machines that collect into one bucket lose nothing,
but may do the same episode twice (the ledger counts it once).
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.config import CollectConfig
from launch.config_reading import to_plain
from launch.run_folder import FREE, RunFolderError, check_same, read_record, write_json

FREE_TO_COLLECT = (*FREE, "out", "scratch", "tasks.train_count", "tasks.test_count", "rollout.samples", "curation")


class CollectFolder:
    """Paths of one collection."""

    def __init__(self, out: str, scratch: str) -> None:
        self.path = Path(out).absolute()
        self.scratch = Path(scratch).absolute()
        self.ledger = self.path / "ledger"
        self.summary = self.path / "summary.json"
        self.index = self.scratch / "index"

    @contextmanager
    def claim(self, config: CollectConfig) -> Iterator[bool]:
        """Hold the folder for this job; yields whether an earlier job of the same configuration left something.

        Raises `RunFolderError`: it belongs to another configuration, another job runs in it, it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.scratch.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise RunFolderError(f"out {self.path} cannot be written: {error.strerror or error}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"another job is collecting into {self.path}; wait for it or choose another out"
                ) from None
            record = self.path / "config.json"
            found = record.exists()
            if found:
                old = read_record(record.read_text(), record, CollectConfig)
                check_same(f"out {self.path}", old, config, FREE_TO_COLLECT)
            elif any(path.name != ".lock" for path in self.path.iterdir()):
                raise RunFolderError(f"out {self.path} is not empty and holds no collection; choose another out")
            write_json(record, to_plain(config))
            yield found

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.summary, json.loads(json.dumps(summary)))
