"""What API teachers cost: `Prices`, a `SpendCap`, and the `SpendMeter` that keeps a whole cluster under it.

A call reserves the most that it can cost before it is sent, and settles with what it did cost when the answer is
there, so that hundreds of calls in flight cannot exceed a cap between them. A reservation that does not fit beside the
others waits until some have settled; one that would not fit even alone raises `BudgetExceeded`: the budget is used up.
What was spent is written down as it is spent (`rollout.spend_log`), so a resumed job counts it.

It does no accounting of the provider's: prices are those of the configuration, tokens those that answers tell. A call
that failed is released; where it may have been billed all the same (no answer came: a timeout, a lost connection) it is
counted as lost, with the most that it can have cost, beside what was spent.

One `SpendMeter` serves a cluster: it is a plain class of plain methods, wrapped as a Ray actor where it is wired;
clients hold a `Meter` of `rollout.spend_meters`.

Example::

    meter = SpendMeter(SpendCap(usd=20.0), path="runs/r/spend.jsonl")
    meter.try_reserve("r1", Charge(model="m", prompt_tokens=900, completion_tokens=512, usd=0.01))
    meter.settle("r1", Charge(model="m", prompt_tokens=610, completion_tokens=80, usd=0.002))
    print(meter.snapshot())
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rollout.policy import PolicyError
from rollout.spend_log import Charge, SpendLog, open_spend_log
from rollout.trajectory import FailureClass

__all__ = [
    "BudgetExceeded",
    "Charge",
    "Meter",
    "ModelSpend",
    "Prices",
    "SpendCap",
    "SpendMeter",
    "SpendSnapshot",
]

LEASE_S = 900.0
_REMEMBERED = 100_000
_SLACK_USD = 1e-9
"""Far below a token's price, far above what adding up a million prices rounds."""


class BudgetExceeded(PolicyError):
    """The spend cap leaves no room for this call. Stop cleanly; a run with a higher cap goes on from here."""

    ends_collection = True

    def __init__(self, message: str) -> None:
        super().__init__(message, FailureClass.LIMIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """A model's price list, in US dollars per million tokens. Raises `ValueError` for a price below 0."""

    prompt_usd_per_million: float
    completion_usd_per_million: float
    cached_prompt_usd_per_million: float | None = None
    """For prompt tokens that the provider had in its own cache; None: the same as the others."""

    def __post_init__(self) -> None:
        for name in ("prompt_usd_per_million", "completion_usd_per_million", "cached_prompt_usd_per_million"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is no price; give US dollars, 0 or more")

    def usd(self, prompt_tokens: int, completion_tokens: int, cached_prompt_tokens: int = 0) -> float:
        """What a request costs; `cached_prompt_tokens` are among the `prompt_tokens`."""
        cached = min(max(cached_prompt_tokens, 0), prompt_tokens)
        cached_price = self.cached_prompt_usd_per_million
        if cached_price is None:
            cached_price = self.prompt_usd_per_million
        millionths = (
            (prompt_tokens - cached) * self.prompt_usd_per_million
            + cached * cached_price
            + completion_tokens * self.completion_usd_per_million
        )
        return millionths / 1e6

    def most_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The same, whichever part of the prompt turns out to be cached."""
        return max(
            self.usd(prompt_tokens, completion_tokens), self.usd(prompt_tokens, completion_tokens, prompt_tokens)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendCap:
    """What all workers together may spend, what was spent before a resume included; None: no limit of that kind."""

    usd: float | None = None
    tokens: int | None = None
    """Prompt and completion tokens together."""

    def __post_init__(self) -> None:
        for name in ("usd", "tokens"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"a spend cap of {name}={value} allows nothing; give more than 0, or None for no cap")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpend:
    """One model's part of what was spent."""

    usd: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0

    def __add__(self, charge: Charge) -> ModelSpend:
        return ModelSpend(
            usd=self.usd + (charge.usd or 0.0),
            prompt_tokens=self.prompt_tokens + charge.prompt_tokens,
            completion_tokens=self.completion_tokens + charge.completion_tokens,
            requests=self.requests + charge.requests,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendSnapshot:
    """Where a meter stands; `str` of it is a line for people."""

    spent_usd: float
    tokens: int
    requests: int
    """Calls that were answered, those before a resume included."""
    reserved_usd: float
    """The most that the calls in flight can cost."""
    reserved_tokens: int
    lost_requests: int
    """Calls without an answer, which the provider may have billed nevertheless."""
    lost_usd: float
    """The most that those can have cost; not part of `spent_usd`."""
    cap: SpendCap
    by_model: Mapping[str, ModelSpend]

    def __str__(self) -> str:
        usd = f"${self.spent_usd:.4f}" + ("" if self.cap.usd is None else f" of ${self.cap.usd:g}")
        tokens = f"{self.tokens:,}" + ("" if self.cap.tokens is None else f" of {self.cap.tokens:,}")
        line = f"{usd}, {tokens} tokens, {self.requests:,} requests"
        if self.lost_requests:
            line += f" ({self.lost_requests:,} more without an answer, at most ${self.lost_usd:.4f} if billed)"
        return line


class Meter(Protocol):
    """What a policy that pays for its calls needs of a meter."""

    async def reserve(self, most: Charge, *, lease_s: float = LEASE_S) -> str:
        """Hold `most` until `settle` or `release`, for at most `lease_s`; waits while only other calls in flight are in
        the way. Returns the reservation. Raises `BudgetExceeded`, and `PolicyError` (INPUT) where a cap in money meets
        a call without a price. The caller limits the wait."""
        ...

    async def settle(self, reservation: str, charge: Charge) -> None:
        """What the call did cost; counted once however often it is told."""
        ...

    async def release(self, reservation: str, *, lost: bool = False) -> None:
        """The call failed; `lost`: no answer came, so it may have been billed."""
        ...

    async def snapshot(self) -> SpendSnapshot: ...


@dataclass(frozen=True, slots=True)
class _Reservation:
    most: Charge
    expires_s: float


class SpendMeter:
    """The count itself. Not thread-safe: of one event loop, or a Ray actor of its own (one call at a time).

    `path` is where what was spent is kept: a local file (JSON lines) or an `s3://` URI of one; None keeps it in memory.
    Reservations are not kept: those of a meter that died are gone, those of a worker that died end with their lease and
    count as lost. Raises `ValueError` for a path that holds something else, or that another meter uses.
    """

    def __init__(
        self,
        cap: SpendCap | None = None,
        path: str | Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cap = cap or SpendCap()
        self._clock = clock
        self._reservations: dict[str, _Reservation] = {}
        self._by_model: dict[str, ModelSpend] = {}
        self._lost = ModelSpend()
        self._settled: dict[str, None] = {}
        """The latest of them, oldest first: what may still be told a second time."""
        self._log: SpendLog = open_spend_log(path)
        try:
            known = self._log.load()
        except BaseException:
            self._log.close()
            raise
        for reservation, charge in known:
            self._count(charge)
            self._remember(reservation)

    def try_reserve(self, reservation: str, most: Charge, lease_s: float = LEASE_S) -> bool:
        """False: there will be room when calls in flight have settled, or on the log's disk again.

        Raises as `Meter.reserve` does.
        """
        cap = self._cap
        if cap.usd is not None and most.usd is None:
            raise PolicyError(
                f"the spend cap is {cap.usd:g} USD, but model {most.model!r} has no prices: set them, or cap tokens",
                FailureClass.INPUT,
            )
        if reservation in self._reservations:
            return True  # told twice, since the first answer was lost on its way
        usd, tokens = self._spent()
        if cap.usd is not None and usd + (most.usd or 0.0) > cap.usd + _SLACK_USD:
            raise BudgetExceeded(
                f"the spend cap of {cap.usd:g} USD is used up: {usd:.4f} USD spent, "
                f"and the next call may cost up to {most.usd or 0.0:.4f}"
            )
        if cap.tokens is not None and tokens + most.tokens > cap.tokens:
            raise BudgetExceeded(
                f"the spend cap of {cap.tokens:,} tokens is used up: {tokens:,} spent, "
                f"and the next call may take up to {most.tokens:,}"
            )
        if not self._log.flush():
            return False  # its disk is full: nothing is spent that cannot be written down
        if not self._fits(most, usd, tokens):
            self._expire()
            if not self._fits(most, usd, tokens):
                return False
        self._reservations[reservation] = _Reservation(most, self._clock() + lease_s)
        return True

    def settle(self, reservation: str, charge: Charge) -> None:
        """See `Meter.settle`. A reservation that has expired, or that another meter gave, is counted too."""
        self._reservations.pop(reservation, None)
        if reservation in self._settled:
            return
        self._remember(reservation)
        self._count(charge)
        self._log.append(reservation, charge)

    def release(self, reservation: str, lost: bool = False) -> None:
        held = self._reservations.pop(reservation, None)
        if held is not None and lost:
            self._lose(reservation, held.most)

    def snapshot(self) -> SpendSnapshot:
        self._expire()
        usd, tokens = self._spent()
        held_usd, held_tokens = self._held()
        return SpendSnapshot(
            spent_usd=usd,
            tokens=tokens,
            requests=sum(spend.requests for spend in self._by_model.values()),
            reserved_usd=held_usd,
            reserved_tokens=held_tokens,
            lost_requests=self._lost.requests,
            lost_usd=self._lost.usd,
            cap=self._cap,
            by_model=dict(self._by_model),
        )

    def close(self) -> None:
        """Write down what is not yet; may be called twice."""
        self._log.close()

    def _spent(self) -> tuple[float, int]:
        spends = self._by_model.values()
        return sum(each.usd for each in spends), sum(each.prompt_tokens + each.completion_tokens for each in spends)

    def _held(self) -> tuple[float, int]:
        held = [reservation.most for reservation in self._reservations.values()]
        return sum(most.usd or 0.0 for most in held), sum(most.tokens for most in held)

    def _fits(self, most: Charge, usd: float, tokens: int) -> bool:
        if self._cap.usd is None and self._cap.tokens is None:
            return True
        held_usd, held_tokens = self._held()
        return (self._cap.usd is None or usd + held_usd + (most.usd or 0.0) <= self._cap.usd + _SLACK_USD) and (
            self._cap.tokens is None or tokens + held_tokens + most.tokens <= self._cap.tokens
        )

    def _count(self, charge: Charge) -> None:
        if charge.lost:
            self._lost = self._lost + charge
        else:
            self._by_model[charge.model] = self._by_model.get(charge.model, ModelSpend()) + charge

    def _remember(self, reservation: str) -> None:
        self._settled[reservation] = None
        if len(self._settled) > _REMEMBERED:
            del self._settled[next(iter(self._settled))]

    def _lose(self, reservation: str, most: Charge) -> None:
        charge = most.as_lost()
        self._count(charge)
        self._log.append(reservation, charge)

    def _expire(self) -> None:
        now = self._clock()
        for name in [name for name, held in self._reservations.items() if held.expires_s < now]:
            self._lose(name, self._reservations.pop(name).most)
