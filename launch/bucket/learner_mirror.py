"""`LearnerMirror`: a learner's folder, kept in a store by the process that writes it (`learner.base.FolderKeeper`).

It is pickled to every rank. Rank 0's machine brings what the store has before training starts, copies what is new while
it goes on, and all that is left before rank 0 returns: when a run has ended, it is in the store. The other ranks only
make sure that they see the same folder, since each writes a part of every checkpoint.

Example::

    group = LearnerGroup.start(config, source, keeper=LearnerMirror(uri="s3://bucket/run/learner", fence=lease.fence))
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.bucket.lease import Fence
from launch.bucket.mirror import Mirror, Mirroring

WHOLE = ("checkpoints/*", "snapshots/*", "best", "student")
SKIP = ("published/", "candidates/", "checkpoints/damaged-*/", "final.json")
"""What other processes use while they run, and what belongs to the driver."""


class NotSharedError(RuntimeError):
    """Ranks on several machines, each with a folder of its own."""


@dataclass(slots=True)
class LearnerMirror:
    """`uri`: the learner's folder in the store; `fence`: None for one that only reads; `sight_s`: within it a rank has
    to see what rank 0 has written."""

    uri: str
    fence: Fence | None
    sight_s: float = 60.0
    mirroring: Mirroring | None = None

    def check(self) -> None:
        """Raises `OSError` when nothing could be copied for minutes."""
        if self.mirroring is not None:
            self.mirroring.check()

    @contextmanager
    def kept(self, folder: Path, *, rank: int, attempt: str) -> Iterator[None]:
        """See `learner.base.FolderKeeper`. Raises `OSError`, `NotSharedError`."""
        mark = folder / f".rank0-{attempt}"
        if rank != 0:
            _see(mark, rank, self.sight_s)
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".rank0-*"):
            old.unlink(missing_ok=True)
        mark.touch()
        mirror = self._mirror(folder)
        mirror.pull()
        with Mirroring(mirror) as self.mirroring:
            yield
        self.mirroring = None

    def bring(self, folder: Path, name: str = "", *, checkpoints: bool = True) -> bool:
        """What the store has, to this machine: all of it, or one whole folder. Not while a rank writes here."""
        mirror = self._mirror(folder, () if checkpoints else ("checkpoints/*",))
        return mirror.bring(name) if name else mirror.pull()

    def checkpoints(self) -> list[str]:
        """Names of those that are whole in the store, sorted."""
        names = self._mirror(Path()).folders()
        return sorted(name.removeprefix("checkpoints/") for name in names if name.startswith("checkpoints/"))

    def _mirror(self, folder: Path, without: tuple[str, ...] = ()) -> Mirror:
        fence = self.fence.check if self.fence else None
        return Mirror(folder, self.uri, whole=WHOLE, skip=SKIP, without=without, fence=fence)


def _see(mark: Path, rank: int, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not mark.exists():
        if time.monotonic() > deadline_s:
            raise NotSharedError(
                f"rank {rank} does not see rank 0's folder {mark.parent}: ranks on several machines need a scratch "
                "on a file system that they share (scratch=/shared/folder), or fewer ranks on one machine"
            )
        time.sleep(0.2)
