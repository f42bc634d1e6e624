"""k candidates of one turn from one decoding: they part where their samples differ, and each token is decoded once.

Candidates of a confident model are mostly the same. So one is decoded; for each of the others it is then drawn, token
by token from the very distribution that the engine sampled from, whether it would have gone on like the first, and
where it would not, which other token it takes there. Those that took the same token go on together, in a request of
their own whose prompt the engine's prefix cache holds already. What is decoded is the tree of the k candidates, not
their sum.

The candidates are k independent samples, exactly as k requests would give them: the first follows the engine's own
sampling; each other takes token y with p(y | what came before): the first's token by its p, another one by the rest of
p. That takes all of p, hence a `top_k` that the engine gives log-probabilities for. Where a bf16 model has ties at the
k-th place, the engine keeps all of them and this one keeps k.

No engine in here: `decode` is one, and `ends` knows where a turn ends.

Example::

    candidates = await sample_shared(decode, n=8, temperature=0.7, top_k=20, top_p=1.0, seed=3, ends=ends)
    sum(len(each.token_ids) - each.shared for each in candidates)       # tokens that were decoded
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

Ids = tuple[int, ...]
FinishReason = Literal["stop", "length", "abort"]
Tops = tuple[tuple["np.ndarray", "np.ndarray"], ...]
"""Stretches of `Decoded.top`, one after the other."""
MOST_TOP_K = 20
"""The most log-probabilities a position that vLLM gives by default (its `max_logprobs`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What one request sampled."""

    token_ids: Ids
    """[n] with the stop token, when it was sampled."""
    logprobs: tuple[float, ...] | None
    """[n] of the sampled tokens, the model's own: before temperature, top-k and top-p; None when not asked for."""
    finish_reason: FinishReason
    stop: str | None = None
    """The stop string that ended it."""
    top: tuple[np.ndarray, np.ndarray] | None = None
    """Ids and log-probabilities, each [n, k], of the k likeliest tokens at each position."""
    shared: int = 0
    """How many of its first tokens were decoded for another candidate."""


@dataclass(frozen=True, slots=True)
class End:
    """Why a turn ends here."""

    finish_reason: FinishReason
    stop: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnds:
    """Where a turn ends, told from its ids as the engine tells it from what it samples."""

    decode: Callable[[Ids], str]
    stop_token_ids: frozenset[int]
    stop: tuple[str, ...]
    max_tokens: int

    def __call__(self, token_ids: Ids, start: int) -> tuple[int, End] | None:
        """How many of `token_ids` the turn has, when one from `start` on ends it, and why; else None."""
        token = next((i for i in range(start, len(token_ids)) if token_ids[i] in self.stop_token_ids), None)
        end = len(token_ids) if token is None else token + 1
        if self.stop and self._stop_string(token_ids[:end]):
            for n in range(start + 1, end + 1):
                if found := self._stop_string(token_ids[:n]):
                    return n, End("stop", found)
        if token is not None:
            return end, End("stop")
        return (self.max_tokens, End("length")) if len(token_ids) >= self.max_tokens else None

    def _stop_string(self, token_ids: Ids) -> str | None:
        text = self.decode(token_ids)
        return next((each for each in self.stop if each in text), None)


class Decode(Protocol):
    """The engine."""

    async def __call__(self, so_far: Ids, *, branch: str, top: bool) -> Decoded:
        """Sample on from the turn's tokens `so_far` (which are not repeated in what it returns) to the turn's end.

        `branch` names the request within the turn, for its seed; `top`: with `Decoded.top`.
        """
        ...


async def sample_shared(
    decode: Decode,
    *,
    n: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    ends: Callable[[Ids, int], tuple[int, End] | None],
    keep_top: int = 0,
) -> list[Decoded]:
    """`n` candidates, the first the engine's own. The same seed gives the same ones.

    `ends`: a `TurnEnds`. `keep_top`: the candidates get the so many likeliest tokens at each position, which `decode`
    then has to give. Raises what `decode` raises; the other requests are then cancelled.
    """
    candidates: list[Decoded | None] = [None] * n
    root = random.Random().getrandbits(64) if seed is None else seed

    async def grow(so_far: Ids, logprobs: tuple[float, ...], members: Sequence[int], branch: str, tops: Tops) -> None:
        first, *others = members
        said = await decode(so_far, branch=branch, top=bool(others or keep_top))
        whole = so_far + said.token_ids
        finish, stop = said.finish_reason, said.stop
        if so_far and (ended := ends(whole, len(so_far))) is not None:
            # The engine does not see a stop string that began before the fork.
            whole, finish, stop = whole[: ended[0]], ended[1].finish_reason, ended[1].stop
        known = logprobs + (said.logprobs or ())
        shared = max(0, len(so_far) - 1)
        if keep_top and said.top is not None:
            tops = (*tops, said.top)
        top = _joined(tops, len(whole), keep_top)
        leader = Decoded(
            token_ids=whole, logprobs=known[: len(whole)], finish_reason=finish, stop=stop, shared=shared, top=top
        )
        candidates[first] = leader
        if not others:
            return
        assert said.top is not None
        length = len(whole) - len(so_far)
        ids, chances = said.top[0][:length, :top_k], probabilities(said.top[1][:length, :top_k], temperature, top_p)
        own = chances_of(said.token_ids[:length], ids, chances).tolist()
        dice = random.Random(f"{root}/{branch}")
        forks: dict[tuple[int, int], list[int]] = {}
        places: dict[tuple[int, int], int] = {}
        for member in others:
            at = next((i for i, chance in enumerate(own) if dice.random() >= chance), None)
            if at is None:
                candidates[member] = replace(leader, shared=len(whole))
                continue
            place = _another(said.token_ids[at], ids[at].tolist(), chances[at].tolist(), dice)
            fork = (at, int(ids[at, place]))
            places[fork] = place
            forks.setdefault(fork, []).append(member)
        growing = []
        for (at, token), parted in forks.items():
            begun = (*whole[: len(so_far) + at], token)
            likely = (*known[: len(so_far) + at], float(said.top[1][at, places[at, token]]))
            if (ended := ends(begun, len(begun) - 1)) is not None:
                for i, member in enumerate(parted):
                    candidates[member] = Decoded(
                        token_ids=begun, logprobs=likely, finish_reason=ended[1].finish_reason, stop=ended[1].stop,
                        shared=len(begun) - (i == 0), top=_joined(tops, len(begun), keep_top),
                    )  # fmt: skip
            else:
                so_far_top = _joined(tops, len(begun), keep_top)
                known_tops = () if so_far_top is None else (so_far_top,)
                growing.append(grow(begun, likely, parted, f"{branch}/{at}:{token}", known_tops))
        await _all(growing)

    await grow((), (), range(n), "", ())
    return [candidate for candidate in candidates if candidate is not None]


def _joined(tops: Tops, length: int, keep: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The `keep` likeliest at each of the first `length` places."""
    if not keep or not tops:
        return None
    import numpy as np

    ids, logprobs = (np.concatenate([each[i][:, :keep] for each in tops])[:length] for i in (0, 1))
    return ids, logprobs


def probabilities(logprobs: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """What the engine samples from: `logprobs` [n, k] of the k likeliest tokens of each position, of any order, to
    probabilities [n, k] after temperature, top-k (these k) and top-p, as vLLM applies them."""
    import numpy as np

    scaled = logprobs.astype(np.float64) / temperature
    chances = np.exp(scaled - scaled.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    if top_p < 1.0:
        order = np.argsort(chances, axis=1, kind="stable")
        rising = np.take_along_axis(chances, order, 1)
        dropped = np.cumsum(rising, 1) <= 1.0 - top_p
        dropped[:, -1] = False  # the likeliest always stays
        np.put_along_axis(chances, order, np.where(dropped, 0.0, rising), 1)
        chances /= chances.sum(1, keepdims=True)
    return chances


def chances_of(token_ids: Sequence[int], ids: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """[n] the probability of each of `token_ids` [n] among `ids` [n, k], which have `chances` [n, k]; 0 for others."""
    import numpy as np

    return np.where(ids == np.asarray(token_ids)[:, None], chances, 0.0).sum(1)


def _another(token: int, ids: Sequence[int], chances: Sequence[float], dice: random.Random) -> int:
    """Index of a token that is not `token`, drawn by the chances of the others."""
    weights = [0.0 if each == token else chance for each, chance in zip(ids, chances, strict=True)]
    if not any(weights):  # the last bit of a certain token's chance: there is no other
        return list(ids).index(token)
    return dice.choices(range(len(weights)), cum_weights=list(itertools.accumulate(weights)))[0]


async def _all(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Await all; when one fails, or the caller is cancelled, the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
