"""`CollectFolder`: where a collection is kept, on a file system or in a bucket.

    out/config.json     the configuration that the folder belongs to
    out/ledger/         every trajectory and every failure
    out/spend.jsonl     what API teachers cost, call by call, over all jobs
    out/summary.json    what came of it
    out/events.jsonl    what went wrong on the way, where something did
    scratch/            this machine's: the index, caches (out itself unless that is a bucket)

Another configuration is refused, and told what differs; more tasks, more samples, a higher cap and other filters are no
other configuration. A lock keeps two jobs of one machine apart; two machines that collect into one bucket lose nothing,
but may do the same episode twice (the ledger counts it once).
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launch.config import CollectConfig
from launch.config_reading import to_plain
from launch.events import NAME as EVENTS
from launch.events import EventRecord
from launch.run_folder import FREE, RunFolderError, check_same, read_record
from rollout.storage import FolderStorage, open_storage

FREE_TO_COLLECT = (
    *FREE, "compact", "curation", "out", "rollout.samples", "scratch", "tasks.test_count", "tasks.train_count"
)  # fmt: skip
RECORD, SUMMARY, LOCK = "config.json", "summary.json", ".lock"


class CollectFolder:
    """Paths of one collection. Raises `ValueError` for a URI of another kind than `s3://` or `gs://`."""

    def __init__(self, out: str, scratch: str) -> None:
        self._storage = open_storage(out)
        self.is_local = isinstance(self._storage, FolderStorage)
        self.out = str(Path(self._storage.uri).absolute()) if self.is_local else out
        place, mark, options = self.out.partition("?")
        self.ledger, self.spend, self.summary = (
            f"{place.rstrip('/')}/{name}{mark}{options}" for name in ("ledger", "spend.jsonl", SUMMARY)
        )
        self.scratch = Path(scratch).absolute()
        self.index = self.scratch / "index"

    @contextmanager
    def claim(self, config: CollectConfig) -> Iterator[bool]:
        """Hold the folder for this job; yields whether an earlier job of the same configuration left something.

        Raises `RunFolderError`: it belongs to another configuration, another job runs in it, it cannot be written.
        """
        try:
            self._refuse_foreign()
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._storage.prepare("")
            lock = open(Path(self.out if self.is_local else self.scratch) / LOCK, "w")
        except OSError as error:
            raise self._unusable(error) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = self._claimed(config)
            except BlockingIOError:
                raise RunFolderError(
                    f"another job is collecting into {self.out}; wait for it or choose another out"
                ) from None
            except OSError as error:
                raise self._unusable(error) from None
            yield found

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Raises `OSError`."""
        self._storage.replace(SUMMARY, _json(summary))

    @contextmanager
    def events(self, say: Callable[[str], None]) -> Iterator[EventRecord]:
        """What goes wrong from now on; a bucket gets it at the end."""
        kept = Path(self.out) if self.is_local else self.scratch / "events"
        if not self.is_local:
            kept.mkdir(parents=True, exist_ok=True)
            (kept / EVENTS).unlink(missing_ok=True)
            with suppress(OSError):  # none was written yet
                (kept / EVENTS).write_bytes(self._storage.read(EVENTS))
        record = EventRecord(kept, say=say)
        try:
            yield record
        finally:
            record.close()
            if not self.is_local and (kept / EVENTS).exists():
                with suppress(OSError):  # the collection itself is what counts
                    self._storage.replace(EVENTS, (kept / EVENTS).read_bytes())

    def _refuse_foreign(self) -> None:
        """Before anything is written there."""
        if self._has_record():
            return
        folder = Path(self.out)
        if self.is_local:
            foreign = folder.exists() and any(path.name != LOCK for path in folder.iterdir())
        else:
            foreign = not self._storage.empty()
        if foreign:
            raise RunFolderError(f"out {self.out} is not empty and holds no collection; choose another out")

    def _has_record(self) -> bool:
        return any(each.name == RECORD for each in self._storage.list(""))

    def _claimed(self, config: CollectConfig) -> bool:
        found = self._has_record()
        if found:
            old = read_record(self._storage.read(RECORD).decode(), f"{self.out}/{RECORD}", CollectConfig)
            check_same(f"out {self.out}", old, config, FREE_TO_COLLECT)
        self._storage.replace(RECORD, _json(to_plain(config)))
        return found

    def _unusable(self, error: OSError) -> RunFolderError:
        return RunFolderError(f"out {self.out} cannot be used: {error.strerror or error}")


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
