"""The likeliest tokens in each sampled token's place: from vLLM and through shared decoding, into records and back, and
to the learner as a teacher's scores."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_samples import TOKENIZER, trajectory
from test_shared_decoding import Engine, chances_after, ends_of

from learner.base_student import BASE_STUDENT_FOLDER
from learner.examples import Example, ExampleMaker
from rollout.episode import EpisodeSettings
from rollout.ledger import Ledger, LedgerWriter
from rollout.policy import Sampling
from rollout.records import from_table, to_table
from rollout.scoring import TransformersScorer
from rollout.shared_decoding import sample_shared
from rollout.trajectory import Message, Step, Trajectory
from rollout.vllm_policy import VllmPolicy

pytestmark = pytest.mark.timeout(180)
KEPT = 3


def test_candidates_that_share_their_decoding_have_the_likeliest_of_their_own_way():
    engine = Engine(seed=3)
    candidates = asyncio.run(
        sample_shared(
            engine.decode, n=12, temperature=1.0, top_k=4, top_p=1.0, seed=5, ends=ends_of("cc"), keep_top=KEPT
        )
    )
    assert len({each.token_ids for each in candidates}) > 4
    for candidate in candidates:
        assert candidate.top is not None
        ids, logprobs = candidate.top
        assert ids.shape == logprobs.shape == (len(candidate.token_ids), KEPT)
        for place, (row, values) in enumerate(zip(ids, logprobs, strict=True)):
            likely = chances_after(candidate.token_ids[:place])
            expected = [math.log(likely[token]) if token in likely else -math.inf for token in row.tolist()]
            assert values.tolist() == pytest.approx(expected)


def test_nothing_is_kept_that_was_not_asked_for():
    engine = Engine(seed=3)
    candidates = asyncio.run(
        sample_shared(engine.decode, n=4, temperature=1.0, top_k=4, top_p=1.0, seed=5, ends=ends_of())
    )
    assert all(candidate.top is None for candidate in candidates)


def test_more_than_the_engine_gives_is_refused():
    with pytest.raises(ValueError, match="top_logprobs is 21; vLLM gives 20 at most"):
        EpisodeSettings(top_logprobs=21)


def test_what_is_kept_changes_no_key():
    task = trajectory(0).task
    assert EpisodeSettings(top_logprobs=8).key(task, "t", 0) == EpisodeSettings().key(task, "t", 0)


# -- records


def sampled(one: Trajectory) -> Trajectory:
    """As a policy of the student's own family would have said it, with made-up likelihoods."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)

    def with_ids(step: Step) -> Step:
        ids = tokenizer(step.completion.text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        top = [(token, token + 1, token + 2) for token in ids]
        completion = replace(
            step.completion,
            token_ids=tuple(ids),
            logprobs=tuple(-0.25 for _ in ids),
            top_ids=tuple(token for place in top for token in place),
            top_logprobs=tuple(value for _ in ids for value in (-0.25, -2.0, -4.0)),
            completion_tokens=len(ids),
        )
        return replace(step, completion=completion)

    return replace(one, steps=tuple(with_ids(step) for step in one.steps))


def test_they_are_kept_in_a_ledger(tmp_path):
    one, other = sampled(trajectory(1)), trajectory(2)
    LedgerWriter(tmp_path, writer="w").append([one, other])
    assert list(Ledger(tmp_path).trajectories()) == [one, other]


def test_tables_of_before_come_without_them():
    """As schema 2 wrote them: the same columns but these two."""
    import pyarrow as pa

    one = sampled(trajectory(1))
    table = to_table([one])
    steps = table.column("steps").combine_chunks()
    step = steps.values
    said = step.field("completion")
    kept = [field for field in said.type if not field.name.startswith("top_")]
    old_said = pa.StructArray.from_arrays([said.field(field.name) for field in kept], fields=kept)
    fields = [pa.field("completion", old_said.type, nullable=False), *list(step.type)[1:]]
    old_step = pa.StructArray.from_arrays([old_said, *[step.field(i) for i in range(1, len(step.type))]], fields=fields)
    old = pa.ListArray.from_arrays(steps.offsets, old_step)
    at = table.schema.get_field_index("steps")
    table = table.set_column(at, pa.field("steps", old.type, nullable=False), old)
    table = table.replace_schema_metadata({b"trajectory_schema_version": b"2"})
    assert from_table(table) == [
        replace(
            one,
            steps=tuple(
                replace(step, completion=replace(step.completion, top_ids=None, top_logprobs=None))
                for step in one.steps
            ),
        )
    ]


# -- to the learner


@pytest.fixture(scope="module")
def maker() -> ExampleMaker:
    from transformers import AutoTokenizer

    return ExampleMaker(AutoTokenizer.from_pretrained(TOKENIZER), max_row_tokens=1024)


def test_they_are_the_teachers_scores_of_the_learners_row(maker):
    made = maker.make(sampled(trajectory(1)))
    assert isinstance(made, Example) and made.scores is not None
    scores = made.scores
    assert scores.teacher_ids is not None and scores.teacher_logprobs is not None
    trained = np.asarray(made.loss_weights) > 0
    rows = zip(scores.teacher_ids[trained].tolist(), np.asarray(made.token_ids)[trained].tolist(), strict=True)
    for place, token in rows:
        assert sorted(i for i in place if i >= 0) == [token, token + 1, token + 2]
    assert scores.teacher_own(made.token_ids)[trained] == pytest.approx(-0.25)
    assert (scores.teacher_ids[~trained] == -1).all()


def test_a_turn_that_another_tokenizer_wrote_has_none(maker):
    one = sampled(trajectory(1))
    first = replace(one.steps[0].completion, token_ids=tuple(range(one.steps[0].completion.completion_tokens)))
    made = maker.make(replace(one, steps=(replace(one.steps[0], completion=first), one.steps[1])))
    assert isinstance(made, Example) and made.scores is not None and made.scores.teacher_ids is not None
    known = {turn: set(row[row >= 0].tolist()) for turn, row in zip(made.turns, made.scores.teacher_ids, strict=True)}
    assert known[0] == set() and len(known[1]) == 3


def test_a_students_own_rollouts_are_no_teachers_scores(maker):
    own = ExampleMaker(maker.renderer.tokenizer, max_row_tokens=1024, successes_only=False)
    made = own.make(sampled(trajectory(1)))
    assert isinstance(made, Example) and made.scores is not None
    assert made.scores.has == {"behaviour"}


# -- from vLLM


@pytest.fixture(scope="module")
def policy() -> Iterator[VllmPolicy]:
    pytest.importorskip("vllm")
    folder: Path = BASE_STUDENT_FOLDER
    policy = VllmPolicy(str(folder), dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_bytes=16 << 20)
    yield policy
    asyncio.run(policy.close())


@pytest.mark.parametrize("n, top_k", [(1, 0), (4, 0), (4, 8)], ids=["one", "several", "shared"])
def test_vllm_tells_what_transformers_finds_likeliest(policy, n, top_k):
    sampling = Sampling(n=n, temperature=1.0, top_k=top_k, max_tokens=8, seed=1, logprobs=True, top_logprobs=KEPT)
    completions = asyncio.run(policy.complete([Message(role="user", content="Copy: silver 4")], sampling))
    scorer = TransformersScorer(str(BASE_STUDENT_FOLDER), dtype="float32")
    for completion in completions:
        assert completion.top_ids is not None and completion.top_logprobs is not None
        assert completion.prompt_ids is not None and completion.sampled_ids is not None
        count = completion.completion_tokens
        assert len(completion.top_ids) == len(completion.top_logprobs) == count * KEPT
        [expected] = asyncio.run(scorer.score([(*completion.prompt_ids, *completion.sampled_ids)], KEPT))
        for place in range(count):
            ids, values = expected.ids[len(completion.prompt_ids) + place], expected.logprobs[-count + place]
            known = dict(zip(ids.tolist(), values.tolist(), strict=True))
            told = slice(place * KEPT, (place + 1) * KEPT)
            pairs = zip(completion.top_ids[told], completion.top_logprobs[told], strict=True)
            assert all(value == pytest.approx(known[token], abs=1e-3) for token, value in pairs)
