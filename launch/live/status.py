"""`JobStatus`: a running job at one moment, as plain data. All that shows a job is made of it: the terminal, the plain
lines, `status.json`, the metrics for Prometheus and the curves for TensorBoard.

It is composed of what its parts tell of themselves (`CollectProgress` of the rollouts, `Progress` of the learner,
`QueueStats`, `SpendSnapshot`), so that nothing is counted twice. It gathers nothing; `launch.live.view.LiveView` does.

Example::

    status = from_json(path.read_bytes())
    status.state, status.current.title, status.learning.loss_by_span["code"]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

from launch.evaluation.intervals import Score
from learner.base import Progress
from rollout.spend import SpendSnapshot
from rollout.task_feed import CollectProgress
from rollout.trajectory_queue import QueueStats

VERSION = 1
"""Of the file's format; raised when a reader of an older one would be misled."""
State = Literal["running", "done", "failed", "interrupted"]


class StatusError(ValueError):
    """What was read is no status of a job; the message says what it is instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of the job."""

    title: str
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    elapsed_s: float = 0.0
    learns: bool = False
    """The learner works in it."""
    episodes: CollectProgress | None = None
    """Of its rollouts, all teachers together; None where it has none, or none was told of yet."""
    by_policy: Mapping[str, CollectProgress] = field(default_factory=dict)
    """The same, of each teacher (or other policy)."""
    episodes_left_s: float | None = None
    """Until its last episode ends, at the pace of late; None while that is unknown."""
    completion_tokens_per_s: float = 0.0
    """Of late."""
    scores: Mapping[str, Score] = field(default_factory=dict)
    """By kind of task, once an evaluation has ended."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What its workers wait for, in their words."""
        workers = self.episodes.workers.values() if self.episodes is not None else ()
        return tuple(sorted({worker.note for worker in workers if worker.note}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A line that the job has printed."""

    unix_s: float
    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A job at one moment."""

    version: int = VERSION
    job: str = ""
    """What it does: distill, collect, evaluate, score."""
    run: str = ""
    """The folder's name: what metrics are labelled with."""
    folder: str = ""
    note: str = ""
    """What a person calls it ("recipe starter, seed 2")."""
    state: State = "running"
    error: str = ""
    """Why it failed."""
    host: str = ""
    pid: int = 0
    began_unix_s: float = 0.0
    """When the first job on this folder began: where curves over time begin."""
    started_unix_s: float = 0.0
    """When this one began."""
    updated_unix_s: float = 0.0
    """When something was last told of it."""
    written_unix_s: float = 0.0
    """When its file was last written: its process was alive then, whatever it waits for."""
    metrics_url: str = ""
    """Where Ray exports the metrics of the driver's node; "" where it exports none."""
    stages: tuple[Stage, ...] = ()
    queue: QueueStats | None = None
    """Between rollout and learner."""
    learning: Progress | None = None
    learning_left_s: float | None = None
    """Until the learner has ended, at the pace of late; None while that is unknown."""
    trails: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """span ("all" is the whole loss) -> the loss over the whole run, oldest first, at most some 100 means."""
    spent: SpendSnapshot | None = None
    """None where no policy is an API."""
    figures: Mapping[str, str] = field(default_factory=dict)
    """What a job of another kind wants to have shown."""
    said: tuple[Said, ...] = ()
    """The last lines of each kind, oldest first."""

    @property
    def current(self) -> Stage | None:
        """The stage that runs, or the last that did."""
        begun = [stage for stage in self.stages if stage.state != "waiting"]
        return next((stage for stage in begun if stage.state == "running"), begun[-1] if begun else None)

    @property
    def elapsed_s(self) -> float:
        return max(0.0, self.updated_unix_s - self.started_unix_s)

    @property
    def warnings(self) -> tuple[Said, ...]:
        return tuple(each for each in self.said if each.warning)

    @property
    def waits(self) -> tuple[str, ...]:
        """What is waited for at the moment, in words."""
        stage = self.current
        if stage is None:
            return ()
        full = stage.learns and self.queue is not None and self.queue.waiting_puts > 0
        return (*stage.notes, *(["rollout waits for the learner: the queue is full"] if full else []))


def to_json(status: JobStatus) -> bytes:
    """One object. JSON knows no NaN: what is not finite is a string ("NaN", "Infinity")."""
    return json.dumps(_plain(asdict(status)), allow_nan=False, default=_mapping).encode() + b"\n"


def from_json(data: bytes | str) -> JobStatus:
    """Fields of a newer writer are passed over. Raises `StatusError`."""
    from pydantic import ValidationError

    try:
        plain = json.loads(data)
    except ValueError as error:
        raise StatusError(f"it is no JSON: {error}") from None
    if not isinstance(plain, dict) or not isinstance(plain.get("version"), int):
        raise StatusError("it is no status of a job: it names no version")
    if plain["version"] > VERSION:
        raise StatusError(f"it is of version {plain['version']}; this program reads up to {VERSION}")
    try:
        return _adapter().validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StatusError(f"{where}: {first['msg']}") from None


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(JobStatus)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _mapping(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a status holds plain data, not {type(value).__name__}")


def printable(text: str, limit: int = 300) -> str:
    """What somebody else's program said, as one line without control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", text).strip()[:limit]
