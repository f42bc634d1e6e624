"""`JointCollection`: the collections of several teachers, as one. All write to the same ledger.

When one of them cannot go on, the others finish what is theirs; then the failure is raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from launch.fleet import Fleets
from rollout.collector import Collection, CollectionError
from rollout.task_feed import CollectProgress


class JointCollection:
    """`collections` by teacher's name; `done` more are recorded already, of teachers with nothing left to do."""

    def __init__(self, collections: Mapping[str, Collection], *, done: int = 0, fleets: Fleets | None = None) -> None:
        self._done = CollectProgress(total=done, found=done)
        self._collections = dict(collections)
        self._seen: dict[str, CollectProgress] = {}
        self._running = set(collections)
        self._broken: dict[str, CollectionError] = {}
        self._fleets = fleets or Fleets([])

    def poll(self, timeout_s: float = 0.0) -> bool:
        """True when all have ended. Raises `CollectionError` when they have, and one of them by a failure."""
        from ray.exceptions import RayError

        if self._running:
            self._fleets.look()
        for name in sorted(self._running):
            try:
                ended = self._collections[name].poll(timeout_s / len(self._running))
            except CollectionError as error:
                self._broken[name] = error
            except RayError as error:
                cause = getattr(error, "cause", None) or error
                self._broken[name] = CollectionError(_first_line(cause))
            else:
                if not ended:
                    continue
            self._running.discard(name)
            self._fleets.end(self._collections[name])
        if not self._running and self._broken:
            named = "; ".join(f"{name}: {error}" for name, error in self._broken.items())
            raise CollectionError(named)
        return not self._running

    def progress(self, timeout_s: float = 10.0) -> CollectProgress:
        """All together; of a collection that does not tell in time: what it told last."""
        from ray.exceptions import RayError

        for name, collection in self._collections.items():
            try:
                self._seen[name] = collection.progress(timeout_s)
            except (RayError, TimeoutError):  # the machine is busy, or it ends just now: `poll` knows
                continue
        return summed([self._done, *self._seen.values()])

    def by_name(self) -> dict[str, CollectProgress]:
        """What each told when `progress` last asked."""
        return dict(self._seen)

    def stop(self, reason: str) -> None:
        """Start nothing more; what is under way comes to its end."""
        from ray.exceptions import RayError

        for collection in self._collections.values():
            try:
                collection.stop(reason)
            except (RayError, TimeoutError):
                continue

    def actors(self, name: str) -> list[Any]:
        """Those that work for that teacher, or will again; [] where it had nothing to do."""
        return self._collections[name].actors if name in self._collections else []

    def draining(self) -> Mapping[str, float]:
        """Ray's id of each node that is to go -> seconds that it had left when that was last seen."""
        return self._fleets.draining()

    def close(self) -> None:
        self._fleets.close()
        for collection in self._collections.values():
            collection.close()


def summed(parts: Sequence[CollectProgress]) -> CollectProgress:
    """Counts are added, times are not: the collections ran at the same time."""
    whole = CollectProgress()
    for field in fields(CollectProgress):
        values = [getattr(part, field.name) for part in parts]
        start = getattr(whole, field.name)
        if field.name.endswith("_s"):
            setattr(whole, field.name, max(values, default=0.0))
        elif isinstance(start, str):
            setattr(whole, field.name, "; ".join(dict.fromkeys(filter(None, values))))
        elif isinstance(start, dict):
            setattr(whole, field.name, _added(values))
        else:
            setattr(whole, field.name, sum(values))
    return whole


def _added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key not in whole:
                whole[key] = value
            elif isinstance(value, tuple):
                whole[key] = tuple(a + b for a, b in zip(whole[key], value, strict=True))
            else:
                whole[key] += value
    return whole


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
