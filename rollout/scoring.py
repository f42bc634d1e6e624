"""What a teacher would have said: its likeliest tokens at every place of given token rows. `Scorer`, and the simplest.

The inputs of objectives that compare distributions (span, opd, sod; arXiv 2505.13820, 2605.07725). A row is a student's
training row, token by token; the teacher reads the very same ids, which means something only where both have one
tokenizer: `check_same_tokenizer` refuses all others, and nothing is ever tokenised anew. Values are natural logarithms
at temperature 1, however the teacher samples.

`rollout.vllm_scoring` scores on vLLM, in process or behind a server; `TransformersScorer` needs no engine. None of them
keeps anything: `launch.score` writes what they say beside a ledger.

Example::

    check_same_tokenizer(scorer.tokenizer, student_tokenizer)
    [scores] = await scorer.score([example.token_ids], top_k=8)
    scores.logprobs[5, 0]       # log p(token 5 | tokens 0 to 4); [5, 1:] are those of the 8 likeliest in its place
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Rows = Sequence[Sequence[int]]


class ScoringError(ValueError):
    """These rows cannot be scored by this teacher; the message names what differs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowScores:
    """Of one row of n tokens: at each place its own token and, behind it, the k likeliest, itself left out.

    The first has none, since nothing comes before it.
    """

    ids: np.ndarray
    """[n, 1 + k] int32, distinct in each row of it; -1 where there is none."""
    logprobs: np.ndarray
    """[n, 1 + k] float32; NaN where there is none."""

    @property
    def own(self) -> np.ndarray:
        """[n] float32 of the row's own tokens; NaN for the first."""
        return self.logprobs[:, 0]

    @classmethod
    def of(cls, ids: np.ndarray, logprobs: np.ndarray) -> RowScores:
        """From [n - 1, 1 + k] arrays of the tokens behind the first, as `VllmPolicy.score` gives them: the token
        itself, then the k likeliest, which may be it again."""
        again = ids == ids[:, :1]
        again[:, 0] = False
        none = np.full((1, ids.shape[1]), -1, np.int32)
        return cls(
            ids=np.concatenate([none, np.where(again, -1, ids)]).astype(np.int32, copy=False),
            logprobs=np.concatenate([none * np.nan, np.where(again, np.nan, logprobs)]).astype(np.float32, copy=False),
        )


class Scorer(Protocol):
    """A teacher that scores rows."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Any:
        """The teacher's own."""
        ...

    async def score(self, rows: Rows, top_k: int) -> list[RowScores]:
        """In the order of `rows`. Raises `PolicyError`."""
        ...

    async def close(self) -> None:
        """Free the engine or the connections; may be called twice."""
        ...


def check_same_tokenizer(teacher: Any, student: Any) -> None:
    """Raises `ScoringError` unless every token of both tokenizers has the same id in the other."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs == ours:
        return
    differ = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    token = differ[0]
    raise ScoringError(
        f"teacher and student do not share a tokenizer: {len(differ):,} of {len(theirs.keys() | ours.keys()):,} tokens "
        f"differ, {token!r} for one is {theirs.get(token, 'unknown')} to the teacher ({len(theirs):,} tokens) and "
        f"{ours.get(token, 'unknown')} to the student ({len(ours):,}); take a teacher of the student's family, or an "
        "objective that needs no teacher, such as sft"
    )


def check_row(token_ids: Sequence[int], teacher: Any, student: Any) -> None:
    """Raises `ScoringError` for ids that are not of the vocabulary, or that the two tokenizers read differently."""
    wrong = next((token for token in token_ids if not 0 <= token < len(student)), None)
    if wrong is not None:
        raise ScoringError(f"token id {wrong} is not of the student's {len(student):,} tokens")
    read = [tokenizer.decode(list(token_ids), skip_special_tokens=False) for tokenizer in (teacher, student)]
    if read[0] != read[1]:
        at = next((i for i, (a, b) in enumerate(zip(*read, strict=False)) if a != b), min(map(len, read)))
        raise ScoringError(
            f"teacher and student read the same ids differently, from character {at}: "
            f"{read[0][at : at + 20]!r} and {read[1][at : at + 20]!r}"
        )


class TransformersScorer:
    """A Hugging Face model (id or folder) in this process, one row at a time: for tests, small teachers, and models
    that vLLM does not know. Loads it; raises what transformers raises.

    `logits_tokens`: of so many tokens the vocabulary's log-probabilities are computed at once.
    """

    def __init__(self, model: str, *, dtype: str = "auto", name: str | None = None, logits_tokens: int = 512) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = name or model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self._model = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._logits_tokens = logits_tokens

    async def score(self, rows: Rows, top_k: int) -> list[RowScores]:
        return [await asyncio.to_thread(self._score, list(row), top_k) for row in rows]

    async def close(self) -> None:
        pass

    def _score(self, row: list[int], top_k: int) -> RowScores:
        import torch

        tokens = torch.tensor(row, device=self._model.device)
        ids, logprobs = [], []
        with torch.inference_mode():
            # No mask and no cache: one row, from its beginning. The logits come in the model's own precision.
            logits = self._model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            for part, following in zip(
                logits.split(self._logits_tokens), tokens[1:].split(self._logits_tokens), strict=True
            ):
                values = part.float().log_softmax(-1)
                best = values.topk(top_k, dim=-1)
                ids.append(torch.cat([following[:, None], best.indices], 1).int().cpu().numpy())
                own = values.gather(1, following[:, None])
                logprobs.append(torch.cat([own, best.values], 1).cpu().numpy())
        return RowScores.of(np.concatenate(ids), np.concatenate(logprobs))
