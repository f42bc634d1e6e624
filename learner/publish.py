"""Weights of a learner that runs, to whoever acts with them: numbered folders, and a hand-over beside the training.

    published/step-0000200/     a student like any export, and logprob_check.json

Every rank takes part in writing a version (`write_version`): the model as it is scores a few rows, its whole weights
are gathered, and rank 0 writes both as one folder, whole or not at all. Whoever loads the folder has to give the same
log-probabilities as the file says; an adapter that was merged wrongly, a stale head or a reload that did nothing do not
get past that. Two computations in float32 agree to 1e-4. Where one of them is in bfloat16, single tokens differ by up
to 0.6 and on average by 0.04 (the 2 M parameter student), hence `publish_tolerance`.

Rank 0 then tells the `WeightPublisher` (`Publications.offer`) from a thread of its own: training goes on, and of
versions that come while one is handed over only the newest is next. A version that is refused, late or lost is counted
and told, and ends nothing. What the publisher does is not known here: `rollout.weight_sync.WeightSync` is one.

Folders are removed when newer ones took their place, but for the `keep` newest, the one in use, and those that somebody
needs for longer (`hold`).

Example::

    publications = Publications(Path("runs/a/learner/published"), publisher, keep=2)
    write_version(backend, publications.folder(200), batches, facts)     # every rank
    publications.offer(200)                                              # rank 0
    publications.status().version                                        # 200, once it is in use
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from learner.examples import Example

if TYPE_CHECKING:
    from learner.deepspeed_backend import DeepSpeedBackend
    from learner.packing import MicroBatch

CHECK_FILE = "logprob_check.json"
CHECK_ROWS = 4
MEAN_SHARE = 0.05
"""Of the tolerance: what the differences may be on average."""
_HOLD = ".held-"


class WeightPublisher(Protocol):
    """Who hands a version on. Used by one thread; pickled to rank 0 where that is a process of its own."""

    def publish(self, folder: Path, version: str) -> object:
        """Bring everybody to the weights in `folder`; blocks, with a deadline of its own. Returns a receipt whose `str`
        is one line for people; raises whatever it likes when nobody took them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishStatus:
    """Where publishing is."""

    version: str = ""
    """The newest that is in use."""
    told: str = ""
    """What was told of the last one: its receipt, or why nobody has it."""
    taken: int = 0
    """Versions in use, one after the other, by this process."""
    failed: int = 0
    """Versions that nobody took."""
    passed_over: int = 0
    """Versions that a newer one overtook before their turn."""


class CheckRows:
    """The rows that every version is checked on: the shortest of the first that there were when they were first asked
    for."""

    def __init__(self) -> None:
        self._rows: list[Example] = []

    def batches(self, examples: Iterable[Example], *, packed: bool) -> tuple[MicroBatch, ...]:
        """A row each."""
        from learner.packing import plan_step

        if len(self._rows) < CHECK_ROWS:
            self._rows = sorted(itertools.islice(examples, 8 * CHECK_ROWS), key=len)[:CHECK_ROWS]
        batching = "packed" if packed else "bucketed"
        plans = [
            plan_step([row], ranks=1, micro_batch_tokens=len(row), row_tokens=len(row), batching=batching)
            for row in self._rows
        ]
        return tuple(plan.ranks[0][0] for plan in plans)


class Publications:
    """The versions of one learner, on its rank 0. `offer` and `status` may be called from any thread."""

    def __init__(self, folder: Path, publisher: WeightPublisher, *, keep: int = 2) -> None:
        self._folder, self._publisher, self._keep = folder, publisher, keep
        self._changed = threading.Condition()
        self._next: str | None = None
        self._under_way: str | None = None
        self._status = PublishStatus()
        self._thread: threading.Thread | None = None

    def folder(self, step: int) -> Path:
        """Where the version of `step` is, or is to be."""
        return self._folder / _name(step)

    def offer(self, step: int) -> None:
        """Hand the version of `step` on when its turn has come; returns at once."""
        with self._changed:
            if self._next is not None:
                self._tell(passed_over=self._status.passed_over + 1)
            self._next = _name(step)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="publish", daemon=True)
                self._thread.start()

    def status(self) -> PublishStatus:
        return self._status

    def figures(self) -> dict[str, Any]:
        """The same by the names that `learner.base.Progress` has for it."""
        at = self._status
        return {"published": at.version, "publish_told": at.told, "publish_failures": at.failed}

    def wait(self, timeout_s: float) -> bool:
        """Until nothing is under way; False when that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                version, self._next = self._next, None
                self._under_way = version
                if version is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
            try:
                receipt = self._publisher.publish(self._folder / version, version)
            except Exception as error:
                with self._changed:
                    self._tell(told=f"{version}: {error}", failed=self._status.failed + 1)
            else:
                with self._changed:
                    self._tell(version=version, told=str(receipt), taken=self._status.taken + 1)
            self._remove_old()

    def _tell(self, **changes: Any) -> None:
        kept = {name: getattr(self._status, name) for name in PublishStatus.__dataclass_fields__}
        self._status = PublishStatus(**{**kept, **changes})

    def _remove_old(self) -> None:
        with self._changed:
            needed = {self._status.version, self._next, self._under_way}
        versions = sorted(path for path in self._folder.glob("step-*") if path.is_dir())
        for path in versions[: -self._keep]:
            if path.name not in needed and not _is_held(path):
                shutil.rmtree(path, ignore_errors=True)


Said = list[tuple[np.ndarray, np.ndarray]]
"""Of each checked row its ids and their log-probabilities, each [n]."""


def write_version(
    backend: DeepSpeedBackend,
    folder: Path,
    batches: Sequence[MicroBatch],
    facts: Mapping[str, Any],
    *,
    before: Said | None = None,
) -> Said:
    """Write the model as it is, and what it says of `batches` (a row each), to `folder`, replacing what is there.

    Every rank calls it together, with the same batches; rank 0 writes. `before`: what this returned for the version
    before, so that an engine that still has that one is told from one whose rounding is coarse.
    """
    partial = folder.with_name(f".unchecked-{folder.name}")
    weights = backend.full_weights()
    if weights is not None:
        from learner.export import export_student

        export_student(partial, weights=weights, config=backend.config, facts=facts)
    said = add_check(backend, partial, batches, before=before)
    if weights is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    return said


def add_check(
    backend: DeepSpeedBackend, folder: Path, batches: Sequence[MicroBatch], *, before: Said | None = None
) -> Said:
    """Put what the model says of `batches` (a row each) into `folder`, an export of the model as it is. Every rank
    calls it together; rank 0 writes. `before` and what it returns as for `write_version`."""
    with backend.evaluation(), backend.as_exported():
        said = [_scored(backend, batch) for batch in batches]
    if backend.rank == 0 and said:
        _write_check(folder, said, before, tolerance=backend.config.publish_tolerance)
    return said


def _write_check(folder: Path, said: Said, before: Said | None, *, tolerance: float) -> None:
    check: dict[str, Any] = {
        "rows": [row.tolist() for row, _ in said],
        "logprobs": [_json_able(values) for _, values in said],
        "tolerance": tolerance,
        "mean_tolerance": tolerance * MEAN_SHARE,
    }
    if before is not None and [row.tolist() for row, _ in before] == check["rows"]:
        check["before"] = [_json_able(values) for _, values in before]
    (folder / CHECK_FILE).write_text(json.dumps(check) + "\n")


def _json_able(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def _scored(backend: DeepSpeedBackend, batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """The row's ids, and what the model gives those of them that it is trained on; NaN for the others."""
    if batch.input_ids.shape[0] != 1:
        raise ValueError(f"a batch of {batch.input_ids.shape[0]} rows; a check has one row a batch")
    row = batch.input_ids[0]
    values = np.full(len(row), np.nan, np.float32)
    logits = backend.forward(batch).float()
    targets = backend.to_device(batch.targets)
    own = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    values[batch.selected + 1] = own.cpu().numpy()
    return row, values


@contextlib.contextmanager
def hold(folder: Path, *, by: str, for_s: float) -> Iterator[None]:
    """Keep a published folder from being removed within it, `for_s` at most, should this process not live to its end.

    Raises FileNotFoundError where it is gone already.
    """
    mark = folder / f"{_HOLD}{by}"
    mark.write_text(str(time.time() + for_s))
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def _is_held(folder: Path) -> bool:
    for mark in folder.glob(f"{_HOLD}*"):
        try:
            if float(mark.read_text()) > time.time():
                return True
        except (OSError, ValueError):
            continue  # it was given back just now, or cut off while it was written
    return False


def _name(step: int) -> str:
    return f"step-{step:07d}"
