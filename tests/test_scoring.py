"""A teacher's log-probabilities of given rows: vLLM, its server's protocol and transformers agree, and what the teacher
reads is what the student reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from loopback_server import AnsweringHandler, LoopbackServer

from learner.base_student import BASE_STUDENT_FOLDER
from rollout.policy import PolicyError
from rollout.scoring import RowScores, ScoringError, TransformersScorer, check_row, check_same_tokenizer

pytestmark = pytest.mark.timeout(180)
TOP_K = 4
T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(coroutine, 120)

    return asyncio.run(limited())


@pytest.fixture(scope="module")
def reference() -> TransformersScorer:
    return TransformersScorer(str(BASE_STUDENT_FOLDER), dtype="float32", logits_tokens=7)


@pytest.fixture(scope="module")
def rows(reference: TransformersScorer) -> list[list[int]]:
    """Of different lengths, the longest of more tokens than are computed at once."""
    texts = ["Copy: silver 4, harbor 9.", "A farm has 12 crates, then 7 crates. " * 8, "x = 3"]
    return [reference.tokenizer(text)["input_ids"] for text in texts]


def test_transformers_scores_are_the_models_log_probabilities(reference, rows):
    import torch
    from transformers import AutoModelForCausalLM

    row = rows[1]
    model: Any = AutoModelForCausalLM.from_pretrained(BASE_STUDENT_FOLDER, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([row]), use_cache=False).logits[0, :-1].log_softmax(-1).numpy()
    [scores] = run(reference.score([row], TOP_K))
    assert scores.own[1:] == pytest.approx(expected[np.arange(len(row) - 1), row[1:]], abs=1e-4)
    for place in range(1, len(row)):
        likeliest = set(np.argsort(-expected[place - 1])[:TOP_K].tolist()) | {row[place]}
        kept = scores.ids[place] >= 0
        assert set(scores.ids[place][kept].tolist()) == likeliest
        assert scores.logprobs[place][kept] == pytest.approx(expected[place - 1][scores.ids[place][kept]], abs=1e-4)


def test_nothing_scores_the_first_token_and_no_token_comes_twice(reference, rows):
    for scores in run(reference.score(rows, TOP_K)):
        assert (scores.ids[0] == -1).all() and np.isnan(scores.logprobs[0]).all()
        assert ((scores.ids >= 0) == ~np.isnan(scores.logprobs)).all()
        for place in scores.ids[1:]:
            kept = place[place >= 0].tolist()
            assert len(kept) == len(set(kept)) >= TOP_K


def same(one: RowScores, other: RowScores, tolerance: float) -> None:
    """Own tokens agree, and so do those among the likeliest that both name: the last may be either of two alike."""
    assert one.own == pytest.approx(other.own, abs=tolerance, nan_ok=True)
    for a_ids, a_values, b_ids, b_values in zip(one.ids, one.logprobs, other.ids, other.logprobs, strict=True):
        a, b = ({i: v for i, v in zip(x.tolist(), y, strict=True) if i >= 0} for x, y in
                ((a_ids, a_values), (b_ids, b_values)))  # fmt: skip
        shared = a.keys() & b.keys()
        assert len(shared) >= max(len(a), len(b)) - 1
        assert [a[i] for i in shared] == pytest.approx([b[i] for i in shared], abs=tolerance)


def test_vllm_scores_as_transformers_does_in_chunks(reference, rows):
    pytest.importorskip("vllm")
    from rollout.vllm_scoring import VllmScorer

    scorer = VllmScorer(str(BASE_STUDENT_FOLDER), max_row_tokens=128, chunk_tokens=32, rows_at_once=2, dtype="float32")
    try:
        assert max(map(len, rows)) > 64
        check_same_tokenizer(scorer.tokenizer, reference.tokenizer)
        scored = run(scorer.score(rows, TOP_K))
        for ours, theirs in zip(scored, run(reference.score(rows, TOP_K)), strict=True):
            same(ours, theirs, 1e-3)
        with pytest.raises(PolicyError, match="129 tokens cannot be scored"):
            run(scorer.score([[5] * 129, *rows], TOP_K))
        with pytest.raises(PolicyError, match="top_k=65"):
            run(scorer.score(rows, 65))
    finally:
        run(scorer.close())


class ScoringServer(LoopbackServer):
    """Answers as vLLM's server does, with what `reference` says; `places` may spoil it."""

    def __init__(self, reference: TransformersScorer) -> None:
        self.places = lambda places: places
        server = self

        class Handler(AnsweringHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                [scores] = run(reference.score([request["prompt"]], request["prompt_logprobs"]))
                places: list[Any] = [None]
                for ids, values in zip(scores.ids[1:], scores.logprobs[1:], strict=True):
                    pairs = [(i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True) if i >= 0]
                    places.append({str(i): {"logprob": v, "rank": 1, "decoded_token": ""} for i, v in sorted(pairs)})
                choice = {"text": "a", "finish_reason": "length", "prompt_logprobs": server.places(places)}
                usage = {"prompt_tokens": len(places), "completion_tokens": 1}
                body = json.dumps({"choices": [choice], "usage": usage}).encode()
                self.send((200, {"content_type": "application/json"}, body))

        super().__init__(Handler)


@pytest.fixture
def server(reference: TransformersScorer) -> Iterator[ScoringServer]:
    server = ScoringServer(reference)
    yield server
    server.close()


def served(server: ScoringServer, rows: list[list[int]]) -> list[RowScores]:
    from rollout.vllm_scoring import VllmServerScorer

    async def ask() -> list[RowScores]:
        scorer = VllmServerScorer("teacher", base_url=server.url, tokenizer=str(BASE_STUDENT_FOLDER))
        try:
            return await scorer.score(rows, TOP_K)
        finally:
            await scorer.close()

    return run(ask())


def test_a_server_scores_as_the_model_behind_it(reference, rows, server):
    for ours, theirs in zip(served(server, rows), run(reference.score(rows, TOP_K)), strict=True):
        same(ours, theirs, 1e-6)


def test_a_server_that_scored_other_tokens_is_refused(rows, server):
    server.places = lambda places: places[:-1]
    with pytest.raises(PolicyError, match="does not serve ids as they are"):
        served(server, rows[:1])


def tokenizer_of(folder: Path, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(folder / "t.json"))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "t.json"))


def test_a_teacher_with_another_vocabulary_is_refused_by_name(tmp_path):
    student, teacher = tokenizer_of(tmp_path / "s", ["a", "b", "c"]), tokenizer_of(tmp_path / "t", ["a", "c", "b", "d"])
    check_same_tokenizer(student, student)
    with pytest.raises(ScoringError, match=r"3 of 4 tokens differ, 'b' for one is 2 to the teacher .* 1 to the stud"):
        check_same_tokenizer(teacher, student)


def test_ids_that_the_two_read_differently_are_refused(tmp_path):
    student, teacher = tokenizer_of(tmp_path / "s", ["a", "b", "c"]), tokenizer_of(tmp_path / "t", ["a", "c", "b"])
    check_row([0, 0], teacher, student)
    with pytest.raises(ScoringError, match="read the same ids differently, from character 2"):
        check_row([0, 1], teacher, student)
    with pytest.raises(ScoringError, match="token id 3 is not of the student's 3 tokens"):
        check_row([0, 3], student, student)
