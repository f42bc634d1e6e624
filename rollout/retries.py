"""How often a failed episode is tried again, over all runs of a collection: `RetryRule`, `Attempts`, `settle`.

Every failure in a ledger's sidecar is one attempt. A key is done when it has a result. It is quarantined, which means
that a resumed run leaves it alone, when a class of failure that is tried again has used its attempts up, or when it
failed in a class that is not tried again at all. All else is missing and is run.

Example::

    settled = Ledger(folder).settled(RetryRule(engine=5))
    missing = [request for request in requests if request.key not in settled]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rollout.trajectory import FailureClass


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRule:
    """How many recorded attempts of each class a key may have; None: any number."""

    environment: int | None = 3
    engine: int | None = 3
    limit: int | None = None
    """A budget that was used up says nothing about the task, so this does not count."""
    model: int | None = 1
    input: int | None = 1

    def __post_init__(self) -> None:
        for each in FailureClass:
            allowed = self.of(each)
            if allowed is not None and allowed < 1:
                raise ValueError(f"{each.value}: {allowed} attempts; the first one counts too, so give 1 or more")

    def of(self, failure_class: FailureClass) -> int | None:
        return {
            FailureClass.ENVIRONMENT: self.environment,
            FailureClass.ENGINE: self.engine,
            FailureClass.LIMIT: self.limit,
            FailureClass.MODEL: self.model,
            FailureClass.INPUT: self.input,
        }[failure_class]

    def exhausted(self, attempts: Attempts) -> FailureClass | None:
        """The class that has used up its attempts, the last one seen first; None: it may be tried again."""
        ordered = [attempts.last_class, *(each for each in FailureClass if each is not attempts.last_class)]
        for each in ordered:
            allowed = self.of(each)
            if allowed is not None and attempts.by_class.get(each, 0) >= allowed:
                return each
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """The failures of one key."""

    by_class: Mapping[FailureClass, int]
    last_class: FailureClass
    last_message: str
    last_at_s: float = 0.0
    """Unix time at which the last one ended."""

    @property
    def total(self) -> int:
        return sum(self.by_class.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a resumed run leaves alone; `key in settled` asks for both."""

    done: frozenset[str] | set[str]
    """Keys that have a result."""
    quarantined: Mapping[str, FailureClass] = field(default_factory=dict)
    """Keys without one that are not tried again, with the class that decided it."""

    def __contains__(self, key: object) -> bool:
        return key in self.done or key in self.quarantined

    def __len__(self) -> int:
        return len(self.done) + len(self.quarantined)


def settle(
    done: set[str], attempts: Mapping[str, Attempts], rule: RetryRule, *, retry_quarantined: bool = False
) -> Settled:
    """`retry_quarantined` lets every failed key have one more attempt."""
    if retry_quarantined:
        return Settled(done=done)
    exhausted = {key: rule.exhausted(each) for key, each in attempts.items() if key not in done}
    return Settled(done=done, quarantined={key: each for key, each in exhausted.items() if each is not None})
