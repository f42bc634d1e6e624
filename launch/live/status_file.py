"""`status.json` in a job's folder: the job's `JobStatus`, written every few seconds, for whoever looks on.

Readers see the old content or the new one, never a part. A folder may be a bucket (`s3://...`), where each write
costs a request: there it is written less often. A thread writes, so that no job waits for a network. What cannot be
written is tried again with the next status; a job never ends by it.

Example::

    LiveView(sinks=[StatusFile("runs/a")]);  read_status("runs/a").state
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

from launch.live.status import JobStatus, StatusError, from_json, to_json
from rollout.storage import FolderStorage, open_storage

NAME = "status.json"
EVERY_S, BUCKET_EVERY_S = 2.0, 20.0
CLOSE_S = 10.0
"""How long the last write may take at most."""


class StatusFile:
    """A `StatusSink`. Raises `ValueError` for a place that is neither a folder nor a known bucket's URI."""

    def __init__(self, folder: str | Path) -> None:
        self._storage = open_storage(folder)
        local = isinstance(self._storage, FolderStorage)
        self._every_s = EVERY_S if local else BUCKET_EVERY_S
        self._newest: JobStatus | None = None
        self._changed, self._ended = threading.Event(), threading.Event()
        self._shape: object = None
        self._thread = threading.Thread(target=self._write, name="status-file", daemon=True)
        self._thread.start()

    def take(self, status: JobStatus) -> None:
        self._newest = status
        shape = (status.state, *((stage.title, stage.state) for stage in status.stages))
        if shape != self._shape:  # another stage: told at once
            self._shape = shape
            self._changed.set()

    def close(self) -> None:
        """The last status is written when it returns, unless the place does not answer."""
        self._ended.set()
        self._changed.set()
        self._thread.join(CLOSE_S)

    def _write(self) -> None:
        while True:
            self._changed.wait(self._every_s)
            ended = self._ended.is_set()
            self._changed.clear()
            status = self._newest
            if status is not None:
                try:
                    self._storage.replace(NAME, to_json(replace(status, written_unix_s=time.time())))
                except OSError:
                    pass  # a full disk, a store that is away: the next one
            if ended:
                return
            time.sleep(0.2)  # changes that come together are one write


def read_status(folder: str | Path) -> JobStatus:
    """Raises `StatusError`: nothing is there, or it is no status."""
    try:
        data = open_storage(folder).read(NAME)
    except FileNotFoundError:
        raise StatusError(
            f"{folder} holds no {NAME}: give the folder of a job (run_dir of distill, out of collect) that has begun"
        ) from None
    except (OSError, ValueError) as error:
        raise StatusError(f"{folder} cannot be read: {error}") from None
    try:
        return from_json(data)
    except StatusError as error:
        raise StatusError(f"{folder}/{NAME}: {error}") from None


def began_before(folder: str | Path) -> float | None:
    """When the first job on that folder began, in unix time; None where none is known."""
    try:
        return read_status(folder).began_unix_s or None
    except StatusError:
        return None
