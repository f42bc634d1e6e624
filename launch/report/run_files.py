"""What a report is made of: the files of a run folder, an evaluation's folder, a collection (in a bucket, too) or a
bare ledger, found and told apart.

Example::

    files = find("runs/starter-seed0")
    files.kind                                        # Kind.DISTILL
    [ledger.name for ledger in files.ledgers]         # ["training", "untrained", "student", ...]
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rollout import ledger_mark
from rollout.ledger import LedgerError
from rollout.storage import FolderStorage, Storage, open_storage

STATUS = "status.json"
_DEPTH = 5
"""How deep below an evaluation's folder ledgers are looked for."""
_NO_LEDGERS = {"shards", "failures", "manifests", "learner", "index", "scratch"}
_MOST_LEDGERS = 40
_WHILE_LEARNING = re.compile(r"while_learning/step-(\d+)$")
_ORDER = ("untrained", "student", "student_self_consistent", "teacher")


class ReportError(ValueError):
    """Nothing that a report can be made of; one line that names what is wrong."""


class Kind(StrEnum):
    """Which job left it."""

    DISTILL = "distillation"
    COLLECT = "collection"
    EVALUATE = "evaluation"
    LEDGER = "ledger"


class Role(StrEnum):
    """What a ledger's trajectories are for."""

    TRAINING = "training"
    EVALUATION = "evaluation"
    WATCH = "while learning"
    """A student's that still learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerFiles:
    """One ledger of a run."""

    name: str
    """Short and unique in the run; results name it so, too."""
    role: Role
    uri: str
    step: int | None = None
    """Of `WATCH`: the learner's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Everything that was found; what is not there is None or empty."""

    kind: Kind
    place: str
    """Absolute path or URI."""
    name: str
    """Last part of it, for a title."""
    storage: Storage
    config: Mapping[str, Any] | None
    results: Mapping[str, Any] | None
    """`results.json`, or a collection's `summary.json`."""
    learned: Mapping[str, Any] | None
    """`learner/final.json`."""
    status: Mapping[str, Any] | None
    """`launch.live.status.JobStatus` of the last job on it: how it ended, and what it said last."""
    ledgers: tuple[LedgerFiles, ...]

    @property
    def folder(self) -> Path | None:
        """None where it is no folder of this machine."""
        return Path(self.place) if isinstance(self.storage, FolderStorage) else None

    def of(self, *roles: Role) -> tuple[LedgerFiles, ...]:
        return tuple(ledger for ledger in self.ledgers if ledger.role in roles)

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """A file of JSON lines, one at a time; a line that was cut off by a kill is left out, as is a missing file."""
        path = None if self.folder is None else self.folder / name
        if path is not None:
            if path.is_file():
                with open(path, encoding="utf-8", errors="replace") as file:
                    yield from _objects(file)
            return
        try:
            text = self.storage.read(name).decode("utf-8", "replace")
        except OSError:
            return
        yield from _objects(iter(text.splitlines()))


def find(place: str | Path, *, ledgers: str | Path | None = None) -> RunFiles:
    """`ledgers`: where the run's ledgers are, when that is elsewhere (`launch.bucket.stored_run`).

    Raises `ReportError` for a place where there is neither a run nor a ledger, or that cannot be read."""
    try:
        return _find(place, ledgers)
    except (LedgerError, ValueError) as error:
        raise ReportError(str(error)) from None
    except OSError as error:
        raise ReportError(f"{place} cannot be read: {error.strerror or error}") from None


def _find(place: str | Path, ledgers: str | Path | None) -> RunFiles:
    storage = open_storage(place)
    where = str(place).rstrip("/")
    if isinstance(storage, FolderStorage):
        if not Path(place).is_dir():
            raise ReportError(f"{place} is no folder; name a run's folder or a ledger's")
        where = str(Path(place).absolute())
        storage = open_storage(where)
    config = _read(storage, "config.json")
    results = _read(storage, "results.json") or _read(storage, "summary.json")
    beside = str(ledgers or where)
    found: tuple[LedgerFiles, ...]
    if _read(storage, ledger_mark.MARK) is not None and ledger_mark.version(storage) is not None:
        kind, found = Kind.LEDGER, (LedgerFiles(name=_last(where), role=Role.EVALUATION, uri=where),)
    elif config is not None and "run_dir" in config and "learner" in config:
        kind, found = Kind.DISTILL, (*_training(beside), *_evaluations(beside, "evaluation"))
    elif config is not None and "out" in config and "split" in config and "policy" not in config:
        kind, found = Kind.COLLECT, _training(beside)
    else:
        kind, found = Kind.EVALUATE, _evaluations(beside, "")
    if not found and config is None and results is None:
        raise ReportError(f"{place} holds no run and no ledger: no config.json, no ledger.json in it")
    return RunFiles(
        kind=kind,
        place=where,
        name=_last(where),
        storage=storage,
        config=config,
        results=results,
        learned=_read(storage, "learner/final.json"),
        status=_read(storage, STATUS),
        ledgers=found,
    )


def _training(place: str) -> tuple[LedgerFiles, ...]:
    uri = _below(place, "ledger")
    there = _read(open_storage(uri), ledger_mark.MARK) is not None
    return (LedgerFiles(name="training", role=Role.TRAINING, uri=uri),) if there else ()


def _evaluations(place: str, folder: str) -> tuple[LedgerFiles, ...]:
    """All ledgers below, the teacher's last; of students that still learned behind them."""
    storage = open_storage(place)
    found: list[LedgerFiles] = []
    for below in _local(Path(place), folder) if isinstance(storage, FolderStorage) else _stored(storage, folder):
        watched = _WHILE_LEARNING.search(below)
        parts = [part for part in below.removeprefix(folder).split("/") if part and part != "ledger"]
        name = _row(storage, below) or ", ".join(parts) or "ledger"
        found.append(
            LedgerFiles(
                name=name,
                role=Role.EVALUATION if watched is None else Role.WATCH,
                uri=_below(place, below),
                step=None if watched is None else int(watched.group(1)),
            )
        )
    found.sort(key=lambda each: (_ORDER.index(each.name) if each.name in _ORDER else len(_ORDER), each.name))
    found.sort(key=lambda each: each.name.startswith("teacher"))
    kept = [each for each in found if each.role is Role.EVALUATION][:_MOST_LEDGERS]
    return (*kept, *[each for each in found if each.role is Role.WATCH][:_MOST_LEDGERS])


def _local(top: Path, folder: str) -> Iterator[str]:
    """Relative names of the ledgers below `top/folder`; into a ledger itself nobody looks."""
    for path, folders, files in os.walk(top / folder):
        folders[:] = sorted(set(folders) - _NO_LEDGERS)
        relative = Path(path).relative_to(top)
        if ledger_mark.MARK in files:
            folders.clear()
            yield relative.as_posix()
        elif len(relative.parts) > _DEPTH:
            folders.clear()


def _stored(storage: Storage, folder: str) -> Iterator[str]:
    for each in storage.walk(folder):
        before, _, last = each.name.rpartition("/")
        if last == ledger_mark.MARK:
            yield before


def _row(storage: Storage, ledger: str) -> str:
    """What an evaluation calls the row that is beside its ledger; "" where it says nothing."""
    found = _read(storage, f"{ledger.rpartition('/')[0]}/row.json".lstrip("/")) or {}
    policy, mode = found.get("policy"), found.get("mode")
    return f"{policy}, {mode}" if isinstance(policy, str) and isinstance(mode, str) else ""


def _below(place: str, name: str) -> str:
    """`name` in a folder, or in a bucket whose URI may end in options."""
    path, mark, options = place.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def _read(storage: Storage, name: str) -> dict[str, Any] | None:
    """A JSON object; None where there is none. Raises `OSError` for a store that cannot be read."""
    try:
        found = json.loads(storage.read(name))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _objects(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _last(place: str) -> str:
    return place.partition("?")[0].rstrip("/").rpartition("/")[2] or place
