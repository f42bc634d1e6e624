"""`rollout.shared_decoding` on a small language with known probabilities: what it samples, and what it decodes."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter

import numpy as np
import pytest

from rollout.shared_decoding import Decoded, End, Ids, TurnEnds, probabilities, sample_shared

STOP, A, B, C = range(4)
LETTERS = "|abc"
CHANCES: dict[Ids, dict[int, float]] = {
    (): {A: 0.6, B: 0.3, C: 0.1},
    (A,): {A: 0.5, B: 0.25, STOP: 0.25},
    (B,): {C: 0.9, STOP: 0.1},
}
REST = {C: 0.2, B: 0.3, STOP: 0.5}
MAX_TOKENS = 4


def chances_after(so_far: Ids) -> dict[int, float]:
    return CHANCES.get(so_far, REST)


def text_of(ids: Ids) -> str:
    return "".join(LETTERS[i] for i in ids if i != STOP)


def ends_of(*stop: str) -> TurnEnds:
    return TurnEnds(decode=text_of, stop_token_ids=frozenset({STOP}), stop=stop, max_tokens=MAX_TOKENS)


class Engine:
    """Samples the language one token after the other, and sees stop strings in its own request's text alone."""

    def __init__(self, seed: int, stop: str = "") -> None:
        self._dice = random.Random(seed)
        self._stop = stop
        self.asked: list[tuple[Ids, str, bool]] = []
        self.tokens = 0

    async def decode(self, so_far: Ids, *, branch: str, top: bool) -> Decoded:
        self.asked.append((so_far, branch, top))
        await asyncio.sleep(0)
        said: list[int] = []
        tops = []
        while True:
            likely = chances_after(so_far + tuple(said))
            said.append(self._dice.choices(list(likely), list(likely.values()))[0])
            tops.append([(token, math.log(likely[token]) if token in likely else -math.inf) for token in range(4)])
            stopped = bool(self._stop) and self._stop in text_of(tuple(said))
            if said[-1] == STOP or stopped or len(so_far) + len(said) == MAX_TOKENS:
                break
        self.tokens += len(said)
        logprobs = tuple(dict(row)[token] for row, token in zip(tops, said, strict=True))
        return Decoded(
            token_ids=tuple(said),
            logprobs=logprobs,
            finish_reason="stop" if said[-1] == STOP or stopped else "length",
            stop=self._stop if stopped else None,
            top=(np.array([[t for t, _ in row] for row in tops]), np.array([[p for _, p in row] for row in tops]))
            if top
            else None,
        )


async def sampling(engine: Engine, n: int, seed: int, *, stop: tuple[str, ...] = ()) -> list[Decoded]:
    ends = ends_of(*stop)
    return await sample_shared(engine.decode, n=n, temperature=1.0, top_k=4, top_p=1.0, seed=seed, ends=ends)


def sample(engine: Engine, n: int, seed: int, *, stop: tuple[str, ...] = ()) -> list[Decoded]:
    return asyncio.run(sampling(engine, n, seed, stop=stop))


def chance_of(ids: Ids) -> float:
    return math.prod(chances_after(ids[:i])[token] for i, token in enumerate(ids))


def samples(rounds: int, n: int) -> list[list[Decoded]]:
    async def all_of_them() -> list[list[Decoded]]:
        return [await sampling(Engine(seed), n, seed) for seed in range(rounds)]

    return asyncio.run(all_of_them())


def test_every_candidate_has_the_distribution_of_a_request_of_its_own():
    rounds = 4_000
    counts: list[Counter[Ids]] = [Counter() for _ in range(3)]
    for candidates in samples(rounds, 3):
        for count, candidate in zip(counts, candidates, strict=True):
            count[candidate.token_ids] += 1
    for each in counts:
        for ids, count in each.items():
            p = chance_of(ids)
            assert abs(count - rounds * p) < 5 * math.sqrt(rounds * p * (1 - p)) + 1, (ids, count, rounds * p)


def test_candidates_are_independent_of_one_another():
    rounds, p = 4_000, 0.6 * 0.6
    both = sum(first.token_ids[0] == second.token_ids[0] == A for first, second in samples(rounds, 2))
    assert abs(both - rounds * p) < 5 * math.sqrt(rounds * p * (1 - p))


def test_each_token_of_the_tree_is_decoded_once():
    for seed in range(50):
        engine = Engine(seed)
        candidates = sample(engine, 8, seed)
        tree = {each.token_ids[: i + 1] for each in candidates for i in range(len(each.token_ids))}
        assert sum(len(each.token_ids) - each.shared for each in candidates) == len(tree)
        assert engine.tokens <= len(tree)  # the token at a fork is drawn here


def test_log_probabilities_are_those_of_the_tokens_on_both_sides_of_a_fork():
    for seed in range(20):
        for each in sample(Engine(seed), 8, seed):
            expected = [math.log(chances_after(each.token_ids[:i])[t]) for i, t in enumerate(each.token_ids)]
            assert each.logprobs == pytest.approx(expected)


def test_the_same_seed_gives_the_same_candidates():
    assert [each.token_ids for each in sample(Engine(5), 8, 9)] == [each.token_ids for each in sample(Engine(5), 8, 9)]


def test_a_stop_string_that_a_fork_cuts_in_two_still_ends_the_turn():
    met = 0
    for seed in range(300):
        for each in sample(Engine(seed, stop="bc"), 4, seed, stop=("bc",)):
            text = text_of(each.token_ids)
            assert "bc" not in text[:-1]
            assert (each.stop == "bc") == text.endswith("bc")
            met += text.endswith("bc") and each.shared > 0
    assert met > 50


def test_a_fork_whose_token_ends_the_turn_asks_the_engine_for_nothing():
    for seed in range(50):
        engine = Engine(seed)
        candidates = sample(engine, 8, seed)
        assert all(STOP not in so_far and len(so_far) < MAX_TOKENS for so_far, _, _ in engine.asked)
        assert {each.finish_reason for each in candidates if each.token_ids[-1] == STOP} <= {"stop"}


def test_a_failed_request_ends_the_others():
    class Failing(Engine):
        ended = 0

        async def decode(self, so_far: Ids, *, branch: str, top: bool) -> Decoded:
            if not branch:
                return await super().decode(so_far, branch=branch, top=top)
            if not self.asked[1:]:
                self.asked.append((so_far, branch, top))
                await asyncio.sleep(0)
                raise RuntimeError("the engine died")
            try:
                await asyncio.sleep(60)
            finally:
                self.ended += 1
            raise AssertionError

    engine = Failing(1)
    with pytest.raises(RuntimeError, match="the engine died"):
        sample(engine, 64, 1)
    assert engine.ended > 0


def test_probabilities_follow_temperature_and_top_p():
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]]))
    squared = np.array([0.25, 0.0625, 0.0225, 0.01])
    assert probabilities(logits, 0.5, 1.0)[0] == pytest.approx(squared / squared.sum())
    # 0.5 + 0.25 reach 0.7; what comes after is dropped.
    assert probabilities(logits, 1.0, 0.7)[0] == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probabilities(logits, 1.0, 0.1)[0] == pytest.approx([1, 0, 0, 0])


def test_a_turn_ends_where_its_first_end_is():
    ends = ends_of("bc")
    assert ends((A, A), 0) is None
    assert ends((A, B, C, A), 1) == (3, End("stop", "bc"))
    assert ends((A, STOP), 1) == (2, End("stop"))
    assert ends((A, A, A, A), 3) == (4, End("length"))
