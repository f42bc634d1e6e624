"""`FeedLink`: the driver's line to the actor that hands out a collection's episodes (`rollout.feed_actor`).

It asks, hears once in a while how far things are, and loads a feed that was started again: what is recorded is in the
ledger, and what is under way its workers tell the new one. It hands out nothing itself.

Example::

    link = FeedLink(requests, found=120, ledger=folder, running=lambda: names, say=print)
    ray.wait([link.beat])
    link.listen(answered=True)
    print(link.seen.recorded)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.feed_actor import ANSWER_S, FeedActor, FeedEmptyError
from rollout.ledger import Ledger
from rollout.task_feed import CollectionError, CollectProgress, EpisodeRequest, EpisodeSummary
from rollout.worker import summary_of

BEAT_S = 1.0
"""How often the feed is asked whether it is there."""
_AGAIN_S = 0.3


class FeedLink:
    """Starts the feed with `requests` and stays in touch.

    `options` are Ray's, of its actor; `running` names the runs of workers that may tell a new feed what they hold.
    """

    def __init__(
        self,
        requests: Sequence[EpisodeRequest],
        *,
        found: int,
        ledger: Path | str,
        running: Callable[[], list[str]],
        say: Callable[[str], None],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        import ray

        self._requests, self._found, self._ledger = list(requests), found, ledger
        self._running, self._say = running, say
        self._began_unix_s = time.time()
        self._stopped = ""
        self.handle: Any = ray.remote(FeedActor).options(
            **{"num_cpus": 0, **(options or {}), "max_restarts": -1}
        ).remote()  # fmt: skip
        self.handle.load.remote(self._requests, found)
        self.seen = CollectProgress(total=found + len(self._requests), found=found, waiting=len(self._requests))
        """As last heard."""
        self.beat: Any = None
        """A call that it will answer; None for now."""
        self._beat_at_s = 0.0

    @property
    def nothing_left(self) -> bool:
        """Every episode is recorded, as last heard."""
        return self.seen.waiting == 0 and self.seen.running == 0

    def listen(self, *, answered: bool) -> None:
        """From the polling loop: `answered` says that `beat` is. A feed that was started again is loaded."""
        import ray
        from ray.exceptions import RayActorError

        if answered:
            call, self.beat = self.beat, None
            try:
                seen: Any = ray.get(call)
                self.seen = seen
            except FeedEmptyError:
                self._reload()
            except RayActorError:
                pass  # it is being started
        if self.beat is None and time.monotonic() - self._beat_at_s > BEAT_S:
            self.beat, self._beat_at_s = self.handle.progress.remote(), time.monotonic()

    def progress(self, timeout_s: float = ANSWER_S) -> CollectProgress:
        """Raises as `ask` does."""
        self.seen = self.ask("progress", timeout_s=timeout_s)
        return self.seen

    def stop(self, reason: str) -> None:
        """Nothing more is handed out, by this feed or one that takes its place."""
        self._stopped = self._stopped or reason
        self.ask("stop", reason)

    def ask(self, method: str, *arguments: Any, timeout_s: float = ANSWER_S) -> Any:
        """Waits for a feed that is being started again. Raises `CollectionError`, `TimeoutError`."""
        import ray
        from ray.exceptions import RayActorError

        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return ray.get(getattr(self.handle, method).remote(*arguments), timeout=timeout_s)
            except FeedEmptyError:
                self._reload()
            except RayActorError as error:
                if time.monotonic() > deadline_s:
                    raise CollectionError(f"what hands out the episodes is gone: {error_words(error)}") from error
                time.sleep(_AGAIN_S)

    def close(self) -> None:
        import ray

        ray.kill(self.handle)

    def _reload(self) -> None:
        import ray
        from ray.exceptions import RayActorError

        recorded = {each.key: each for each in self._recorded()}
        rest = [request for request in self._requests if request.key not in recorded]
        try:
            loading = self.handle.load.remote(
                rest, self._found, list(recorded.values()), self._running(), self._stopped
            )
            ray.get(loading, timeout=ANSWER_S)
        except RayActorError:
            return  # dead again; it is seen again
        self._say(f"what hands out the episodes was started again: {len(recorded):,} are recorded, {len(rest):,} left")

    def _recorded(self) -> Iterable[EpisodeSummary]:
        ledger, keys = Ledger(self._ledger), {request.key for request in self._requests}
        for each in ledger.failures():
            if each.key in keys and each.started_at_s >= self._began_unix_s:  # earlier ones are tried again
                yield summary_of(each)
        for each in ledger.trajectories():
            if each.key in keys:
                yield summary_of(each)


def error_words(error: Exception) -> str:
    """Its kind and its last line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
