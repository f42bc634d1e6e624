"""The folder of a run: one configuration, one job at a time, and where everything in it is.

`config.json` holds the configuration that the folder belongs to; a job with another one is refused and told what
differs. A lock that dies with its process keeps two jobs from sharing the folder. A run in an object store works in
such a folder, too: `launch.bucket.stored_run`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from launch.config import DistillConfig, JobConfig
from launch.config_reading import flattened, parse_config, to_plain
from learner.base import FolderKeeper

# What may differ between two jobs on the same folder: where it runs and how long it waits, not what it computes.
FREE = (
    "cluster",
    "evaluate",
    "learner.collective_timeout_s",
    "learner.data_timeout_s",
    "learner.keep_published",
    "learner.output_dir",
    "learner.publish_tolerance",
    "learner.restarts",
    "learner.score_timeout_s",
    "learner.tracking",
    "retrieval.timeout_s",
    "reuse",
    "rollout.adaptive",
    "rollout.concurrency",
    "rollout.env_hosts",
    "rollout.env_timeout_s",
    "rollout.queue_capacity",
    "rollout.retry",
    "rollout.retry_quarantined",
    "rollout.max_workers",
    "rollout.min_workers",
    "rollout.workers",
    "run_dir",
    "scratch",
    "spend",
)
POLICY_FIXED = ("kind", "name", "model", "tokenizer", "prefill", "extra_body", "dtype", "max_model_len", "world_seed")
"""Of a teacher: what it is. The rest says where it runs, how it is asked and what it costs."""


_Job = TypeVar("_Job", bound=JobConfig)


class RunFolderError(ValueError):
    """A folder that this run must not use; the message says why and what to do."""


class RunLostError(RuntimeError):
    """The job must end: what it does can no longer be kept."""


class RunFolder:
    """Paths of one run. What a job does for a run that lasts elsewhere has nothing to do here."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.place = str(self.path)
        """Where the run lasts, for people."""
        self.ledger = self.path / "ledger"
        self.index = self.path / "index"
        self.learner = self.path / "learner"
        self.student = self.learner / "student"
        self.scores = self.path / "evaluation"
        self.results = self.path / "results.json"
        self.curve = self.path / "learning_curve.png"
        self.metrics = self.path / "metrics.jsonl"
        self.spend: Path | str = self.path / "spend.jsonl"
        self.watched = self.path / "evaluation" / "while_learning.jsonl"
        self.first_step = self.path / "first_step.json"

    def config(self) -> DistillConfig:
        """The configuration of the run that is here. Raises `RunFolderError`, `ConfigError`."""
        record = self.path / "config.json"
        if not record.is_file():
            raise RunFolderError(f"{self.path} holds no run: there is no config.json")
        return parse_config(json.loads(record.read_text()))

    @contextmanager
    def claim(self, config: DistillConfig) -> Iterator[bool]:
        """Hold the folder for this job; yields whether an earlier job of the same configuration left something.

        Raises `RunFolderError` when the folder belongs to another configuration or another job runs in it.
        """
        record = self.path / "config.json"
        if self.path.exists() and not record.exists() and any(self.path.iterdir()):
            raise RunFolderError(f"run_dir {self.path} is not empty and holds no run; choose another run_dir")
        self.path.mkdir(parents=True, exist_ok=True)
        with self._locked(config) as found:
            yield found

    def check(self) -> None:
        """Asked often by a job. Raises `RunLostError`."""

    def keeper(self) -> FolderKeeper | None:
        """Who keeps what the learner writes; None: it lasts where it is."""
        return None

    def bring_learner(self) -> None:
        """The learner has ended: see what it wrote in `learner`. Raises `OSError`."""

    def bring_student(self, actors: Sequence[Any]) -> None:
        """Let these Ray actors find the student in `student`. Raises `RunLostError`."""

    def gather(self) -> None:
        """Have the ledgers in `path`, too, for those who read a run as one folder. Raises `OSError`."""

    def evaluated(self) -> list[str]:
        """Names of the evaluations that have a ledger."""
        return sorted(path.name for path in self.scores.iterdir() if path.is_dir()) if self.scores.is_dir() else []

    def checkpoints(self) -> list[str]:
        """Names, oldest first."""
        folder = self.learner / "checkpoints"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    @contextmanager
    def _locked(self, config: DistillConfig) -> Iterator[bool]:
        record = self.path / "config.json"
        with open(self.path / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"another job is running in {self.path}; wait for it or choose another run_dir"
                ) from None
            found = record.exists()
            plain = to_plain(config)
            if found:
                old = read_record(record.read_text(), record, DistillConfig)
                check_same(f"run_dir {self.place}", old, config, FREE)
            write_json(record, plain)
            yield found


def write_json(path: Path, data: Any) -> None:
    """Atomically, so that a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=2, sort_keys=False) + "\n")
    os.replace(temporary, path)


def read_record(text: str, where: object, schema: type[_Job]) -> _Job:
    """A recorded configuration; what it does not name yet has its default. Raises `RunFolderError`."""
    try:
        return parse_config(json.loads(text), schema)
    except ValueError as error:  # a ConfigError is one
        raise RunFolderError(f"{where} is no configuration of this version ({error}); choose another folder") from None


def check_same(place: str, old: JobConfig, new: JobConfig, free: Sequence[str]) -> None:
    """Raises `RunFolderError` when `place`, which belongs to `old`, must not be used by `new`."""
    there, here = _fixed(old, free), _fixed(new, free)
    differing = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    if differing:
        key = min(differing, key=lambda name: name.count("."))  # `seed` says more than `episode.seed`
        more = f" (and {len(differing) - 1} more settings)" if len(differing) > 1 else ""
        raise RunFolderError(
            f"{place} belongs to another run: there {key} is {there.get(key)!r}, "
            f"here it is {here.get(key)!r}{more}; choose another {place.split()[0]}"
        )


def _fixed(config: JobConfig, free: Sequence[str]) -> dict[str, Any]:
    plain = to_plain(config)
    del plain["teacher"], plain["teachers"]
    plain["teacher"] = {
        str(i): {"weight": share.weight, **{name: getattr(share.teacher, name) for name in POLICY_FIXED}}
        for i, share in enumerate(config.all_teachers)
    }
    if len(config.all_teachers) == 1:
        plain["teacher"] = plain["teacher"]["0"]
        del plain["teacher"]["weight"], plain["share"]
    return {
        key: value
        for key, value in flattened(plain).items()
        if not any(key == name or key.startswith(name + ".") for name in free)
    }
