"""`StoredRun`: a run whose `run_dir` is `s3://bucket/path` or `gs://bucket/path`.

    s3://bucket/path/config.json, results.json, metrics.jsonl, ...     what a run's folder holds (`launch.run_folder`)
                    /ledger/, /evaluation/NAME/                        ledgers: written there by all workers, at once
                    /spend.jsonl                                       likewise, by the spend meter
                    /learner/                                          checkpoints, the student, snapshots, numbers
                    /mirror.json, /learner/mirror.json                 what of this is whole (`launch.bucket.mirror`)
                    /lease/                                            who works on it now (`launch.bucket.lease`)

Every machine works in a folder of its own, `scratch`, at the same path on all: the driver keeps its files there, the
learner its own, and each is copied to the store by whoever wrote it. A job starts from what the store has, whatever is
left in `scratch`; so any machine can go on. Of the learner's ranks rank 0 copies, and all must see one `scratch`: ranks
on several machines need one that they share. The index of the corpus stays in `scratch`; it is made where it is
missing.

Two jobs cannot have one run: the second is refused, or waits until the first one's lease has fallen free.

Example::

    folder = open_run(config)                     # a RunFolder, or a StoredRun where run_dir is a URI
    with folder.claim(config) as found: ...
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.bucket.learner_mirror import LearnerMirror
from launch.bucket.lease import Lease, LeaseHeld, LeaseLost, LeaseTimes
from launch.bucket.mirror import INDEX, Mirror, Mirroring
from launch.config import DistillConfig
from launch.run_folder import RunFolder, RunFolderError, RunLostError
from launch.wiring import START_TIMEOUT_S
from rollout.storage import Storage, StorageError, ahead, open_storage

SKIP = ("ledger/", "index/", "evaluation/*/", "learner/*", "learner/*/", "spend.jsonl")
KEEP = ("learner/final.json",)
BRING_S = 1800.0
"""For a student to be copied to its workers."""
_LEDGERS = ("ledger", "evaluation")


def open_run(config: DistillConfig) -> RunFolder:
    """Of a configuration. Raises `RunFolderError` for a URI that cannot be one."""
    if "://" not in config.run_dir:
        return RunFolder(config.run_dir)
    return StoredRun(config.run_dir, config.scratch)


class StoredRun(RunFolder):
    """`place` is the URI; the paths are those of `scratch`, but for the ledgers', which name the store."""

    def __init__(self, uri: str, scratch: str = "", *, times: LeaseTimes | None = None) -> None:
        if "?" in uri:
            raise RunFolderError(f"run_dir {uri!r}: name the endpoint in AWS_ENDPOINT_URL, a run_dir has no options")
        try:
            self._storage = open_storage(uri)
        except ValueError as error:
            raise RunFolderError(f"run_dir {error}") from None
        self.uri = uri.rstrip("/")
        super().__init__(scratch_folder(self.uri, scratch))
        self.place = self.uri
        # A `Path` takes one slash of a URI away; `open_storage` knows.
        self.ledger, self.scores = Path(f"{self.uri}/ledger"), Path(f"{self.uri}/evaluation")
        self.spend = f"{self.uri}/spend.jsonl"
        self._times = times
        self._lease: Lease | None = None
        self._mirroring: Mirroring | None = None

    @contextmanager
    def claim(self, config: DistillConfig) -> Iterator[bool]:
        """As `RunFolder.claim`, over machines. What was written is in the store when it returns. Raises `RunLostError`
        when the store takes nothing any more, or the run was taken over."""
        try:
            known = any(each.name == INDEX for each in self._storage.list(""))
            if not known and not self._storage.empty() and not self._only_a_lease():
                raise RunFolderError(f"run_dir {self.uri} is not empty and holds no run; choose another run_dir")
            lease = Lease.acquire(self._storage, say=_say, times=self._times)
        except LeaseHeld as error:
            raise RunFolderError(f"run_dir {error}") from None
        except OSError as error:
            raise RunFolderError(f"run_dir {self.uri} cannot be used: {error.strerror or error}") from None
        with lease:
            mirror = Mirror(self.path, self.uri, skip=SKIP, keep=KEEP, fence=lease.check)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if not mirror.pull():
                    for left in ("learner", "index", *_LEDGERS):  # of a run that was removed from the store
                        shutil.rmtree(self.path / left, ignore_errors=True)
                self.learner.mkdir(exist_ok=True)
                self._lease = lease
                with self._locked(config) as found:
                    mirror.push()
                    with Mirroring(mirror) as self._mirroring:
                        yield found
            except KeyboardInterrupt:
                if lease.lost is not None:
                    raise RunLostError(str(lease.lost)) from None
                with _told_only():
                    mirror.push()
                raise
            except (LeaseLost, StorageError) as error:
                raise RunLostError(f"{self.uri}: {error}") from error
            except Exception:
                with _told_only():
                    mirror.push()
                raise
            finally:
                self._lease = self._mirroring = None

    def check(self) -> None:
        if self._mirroring is not None:
            try:
                self._mirroring.check()
            except OSError as error:
                raise RunLostError(f"nothing could be written for minutes: {error}") from error

    def keeper(self) -> LearnerMirror | None:
        assert self._lease is not None, "the run is not claimed"
        return LearnerMirror(uri=f"{self.uri}/learner", fence=self._lease.fence)

    def bring_learner(self) -> None:
        LearnerMirror(uri=f"{self.uri}/learner", fence=None).bring(self.learner)

    def bring_student(self, actors: Sequence[Any]) -> None:
        """Raises `RunLostError`."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        bring = ray.remote(num_cpus=0)(_bring)
        mirror = LearnerMirror(uri=f"{self.uri}/learner", fence=None)
        try:
            nodes = set(ray.get([actor.__ray_call__.remote(_node) for actor in actors], timeout=START_TIMEOUT_S))
            ray.get(
                [
                    bring.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                        mirror, str(self.learner), "student"
                    )
                    for node in nodes
                ],
                timeout=BRING_S,
            )
        except (ray.exceptions.RayError, TimeoutError) as error:  # type: ignore[attr-defined]
            raise RunLostError(f"the student cannot be brought to its workers: {error}") from None

    def gather(self) -> None:
        _copy_ledgers(self._storage, self.path)

    def evaluated(self) -> list[str]:
        return sorted({each.name.split("/")[1] for each in self._storage.walk("evaluation")})

    def checkpoints(self) -> list[str]:
        return LearnerMirror(uri=f"{self.uri}/learner", fence=None).checkpoints()

    def _only_a_lease(self) -> bool:
        """Left by a job that died before it had written anything else."""
        return all(each.name.startswith("lease/") for each in self._storage.walk(""))


def fetch(uri: str, folder: Path, *, checkpoints: bool = True) -> None:
    """Copy a run from its store into `folder`. Raises `RunFolderError` where there is none, `OSError`."""
    run = StoredRun(uri)
    record = folder / "config.json"
    if folder.exists() and not record.exists() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty and holds no run; choose another folder")
    storage = open_storage(run.uri)
    if not any(each.name == "config.json" for each in storage.list("")):
        raise RunFolderError(f"{run.uri} holds no run: there is no config.json")
    Mirror(folder, run.uri, skip=SKIP, keep=KEEP).pull()
    LearnerMirror(uri=f"{run.uri}/learner", fence=None).bring(folder / "learner", checkpoints=checkpoints)
    _copy_ledgers(storage, folder)


def _copy_ledgers(storage: Storage, folder: Path) -> None:
    for top in _LEDGERS:
        there = {each.name: each.size_bytes for each in storage.walk(top)}
        for path in (folder / top).rglob("*.parquet"):
            if path.relative_to(folder).as_posix() not in there:
                path.unlink()  # compacted since

        def bring(name: str) -> None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.part")
            partial.write_bytes(storage.read(name))
            os.replace(partial, target)

        # A shard never changes; what else there is may.
        due = [name for name in there if not (name.endswith(".parquet") and (folder / name).exists())]
        for _ in ahead(bring, due, storage.width):
            pass


def scratch_folder(uri: str, scratch: str = "") -> Path:
    """The folder of one run, in `scratch` or (for "") where this machine has temporary files."""
    parent = Path(scratch) if scratch else Path(tempfile.gettempdir()) / f"apprentice-{os.getuid()}"
    return parent / hashlib.sha256(uri.encode()).hexdigest()[:12] / uri.rsplit("/", 1)[-1]


def _node(_: Any) -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def _bring(mirror: LearnerMirror, folder: str, name: str) -> bool:
    return mirror.bring(Path(folder), name)


@contextmanager
def _told_only() -> Iterator[None]:
    """On the way out of something worse."""
    try:
        yield
    except OSError as error:
        _say(f"the last files could not be copied to the store: {error}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
