"""What goes wrong while the teacher acts and the student learns, as the job's loop sees it: ranks of the learner that
died, a ledger that cannot be written. Told to `launch.events` at once (this job may end before it is right again), and
again when it is.

Example::

    trouble = LearningTrouble(events)
    while not done:
        trouble.look(learner.progress(), collection.progress())
"""

from __future__ import annotations

import time

from launch.events import EventRecord
from learner.base import Progress
from rollout.task_feed import CollectProgress

_LEDGER = "the ledger cannot be written"


class LearningTrouble:
    """For one loop."""

    def __init__(self, events: EventRecord) -> None:
        self._events = events
        self._restarts = 0
        self._restarted_at_s: float | None = None
        self._silent = Progress()
        """What the learner told last before its ranks died."""
        self._full_since_s: float | None = None

    def look(self, learned: Progress, collected: CollectProgress) -> None:
        now_s = time.monotonic()
        if learned.restarts > self._restarts:
            self._restarts = learned.restarts
            self._restarted_at_s, self._silent = self._restarted_at_s or now_s, learned
            self._events.tell("learner", "a rank of the learner died; all of them start again from the last checkpoint")
        elif self._restarted_at_s is not None and _goes_on(self._silent, learned):
            self._back()
        notes = [each.note for each in collected.workers.values() if _LEDGER in each.note]
        if notes and self._full_since_s is None:
            self._full_since_s = now_s
            self._events.tell("disk", notes[0])
        elif not notes and self._full_since_s is not None:
            away_s = now_s - self._full_since_s
            self._events.tell("disk", "the ledger can be written again", away_s=away_s, returned=True)
            self._full_since_s = None

    def close(self) -> None:
        """Whatever has not been told."""
        if self._restarted_at_s is not None:
            self._back()

    def _back(self) -> None:
        assert self._restarted_at_s is not None
        away_s = time.monotonic() - self._restarted_at_s
        words = "the learner went on from its last checkpoint"
        self._events.tell("learner", words, away_s=away_s, returned=True)
        self._restarted_at_s = None


def _goes_on(before: Progress, now: Progress) -> bool:
    """These are not the same ranks' words: a new process has taken a step."""
    return now.first_step_unix_s is not None and now.first_step_unix_s != before.first_step_unix_s
