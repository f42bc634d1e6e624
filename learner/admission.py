"""`Admission`: where each arrival goes, on rank 0: to the curriculum, to the rows held out for validation, or to the
count of what was refused.

Example::

    admission = Admission(config, objective, curriculum)
    admission.fill(intake)                       # what is there, without waiting
    admission.take(intake, timeout_s=0.5)        # one more, or nothing
    admission.figures()                          # what `Progress` shows of it
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from learner.base import LearnerError
from learner.config import LearnerConfig
from learner.curriculum import Curriculum, held_out
from learner.examples import Example, RefusedRow
from learner.intake import END, Intake

if TYPE_CHECKING:
    from learner.objectives import Objective


class Admission:
    """Counts what it has been given; a resumed run is given everything again, in the same order."""

    def __init__(self, config: LearnerConfig, objective: Objective, curriculum: Curriculum) -> None:
        self._config, self._objective, self._curriculum = config, objective, curriculum
        self.arrived = 0
        """Trajectories."""
        self.validation: list[Example] = []
        self._refused: Counter[str] = Counter()
        self._first_refused: dict[str, str] = {}

    def fill(self, intake: Intake) -> None:
        """What is there, up to `ahead_rows`: the rest stays in the queue, whose producers then wait for us."""
        curriculum = self._curriculum
        while not curriculum.stream_ended and curriculum.waiting < self._config.ahead_rows:
            if not self.take(intake, timeout_s=0.0):
                return

    def take(self, intake: Intake, *, timeout_s: float) -> bool:
        """Put one arrival where it belongs; False when there was none. Raises `LearnerError` when the stream ends
        and a resumed run was not given what it had before."""
        arrival = intake.next(timeout_s)
        if arrival is None:
            return False
        if not isinstance(arrival, (Example, RefusedRow)):
            assert arrival is END
            try:
                self._curriculum.end_stream()
            except ValueError as error:
                raise LearnerError(str(error)) from error
            return True
        self.arrived += 1
        if isinstance(arrival, Example):
            arrival = self._objective.fit(arrival)  # it may lack what the objective needs
        if isinstance(arrival, RefusedRow):
            reason = arrival.reason.value
            self._refused[reason] += 1
            self._first_refused.setdefault(reason, f"{arrival.key}: {arrival.detail}")
        elif held_out(arrival.task_id, self._config.validation_share):
            self.validation.append(arrival)
        elif not self._curriculum.add(arrival, self.arrived):
            self._refused["duplicate"] += 1
        return True

    def figures(self) -> dict[str, Any]:
        """Fields of `Progress`."""
        return {
            "trajectories": self.arrived,
            "examples": len(self._curriculum.examples),
            "held_out": len(self.validation),
            "refused": dict(self._refused),
        }

    def in_words(self) -> str:
        """What became of all, with the first refusal of each reason."""
        told = "; ".join(f"{reason}: {detail}" for reason, detail in self._first_refused.items() if detail)
        return (
            f"{self.arrived} trajectories arrived, refused {dict(self._refused)}, held out {len(self.validation)}"
            + (f" (the first of each: {told})" if told else "")
        )
