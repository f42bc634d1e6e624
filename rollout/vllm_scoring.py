"""Scorers on vLLM: `VllmScorer` with an engine of its own, `VllmServerScorer` behind a server. See `rollout.scoring`.

Both ask for the log-probabilities of a prompt (`prompt_logprobs`) and let vLLM do no more: one token is sampled, since
it does no less, and thrown away. vLLM holds the vocabulary's log-probabilities of every prompt token that it computes
at once and does not count them among its memory (about 12 bytes x vocabulary a token: 1.8 MB with Qwen2.5's 151,936
tokens), so an engine of our own computes at most `chunk_tokens` at a time; start a server that scores with
--max-num-batched-tokens 2048. Its answers are Python objects, about 10 microseconds each: a small k is fast.

Example::

    scorer = VllmScorer("Qwen/Qwen2.5-32B-Instruct", max_row_tokens=4096, tensor_parallel_size=4)
    scores = await scorer.score(rows, top_k=8)
    await scorer.close()
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.endpoint_client import EndpointClient
from rollout.endpoint_requests import EndpointSettings, Request
from rollout.policy import PolicyError
from rollout.replies import Reply, UnusableAnswerError, read_completions
from rollout.scoring import Rows, RowScores
from rollout.spend import Meter, Prices
from rollout.trajectory import FailureClass
from rollout.vllm_policy import MOST_SCORED, VllmPolicy

CHUNK_TOKENS = 2048
"""3.7 GB of log-probabilities with 151,936 tokens."""
SERVED_TOP_K = 20
"""The most that a vLLM server gives, unless it was started with --max-logprobs."""


class VllmScorer:
    """A Hugging Face model (id or folder) on vLLM in this process; building it loads it. Raises `PolicyError`.

    `max_row_tokens`: of the longest row. `engine`: keywords of `VllmPolicy`, such as `tensor_parallel_size`.
    """

    def __init__(
        self,
        model: str,
        *,
        max_row_tokens: int,
        chunk_tokens: int = CHUNK_TOKENS,
        rows_at_once: int = 16,
        timeout_s: float = 600.0,
        **engine: Any,
    ) -> None:
        self._policy = VllmPolicy(
            model,
            max_model_len=max_row_tokens + 1,  # and the token that is thrown away
            max_num_seqs=rows_at_once,
            scoring_chunk_tokens=chunk_tokens,
            **engine,
        )
        self._rows, self._timeout_s = asyncio.Semaphore(rows_at_once), timeout_s

    @property
    def name(self) -> str:
        return self._policy.name

    @property
    def tokenizer(self) -> Any:
        return self._policy.tokenizer

    async def score(self, rows: Rows, top_k: int) -> list[RowScores]:
        if not 0 <= top_k <= MOST_SCORED:
            raise PolicyError(f"top_k={top_k}: vLLM scores 0 to {MOST_SCORED} tokens a place", FailureClass.INPUT)

        async def one(row: Sequence[int]) -> RowScores:
            async with self._rows:
                return RowScores.of(*await self._policy.score(row, top_k, timeout_s=self._timeout_s))

        return await _all(one(row) for row in rows)

    async def close(self) -> None:
        await self._policy.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScoredReply(Reply):
    """An answer with the log-probabilities of its prompt: token id -> value at each place, None at the first."""

    prompt_logprobs: tuple[Mapping[int, float] | None, ...]


class VllmServerScorer:
    """A model behind a vLLM server. For one event loop; building it loads the tokenizer, by default that of `model`.

    Raises `PolicyError` for a tokenizer that cannot be loaded, or a missing key. What calls cost goes to `meter`.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        tokenizer: str = "",
        settings: EndpointSettings | None = None,
        timeout_s: float = 600.0,
        meter: Meter | None = None,
    ) -> None:
        # What a server of one's own answers is counted, and costs nothing.
        free = Prices(prompt_usd_per_million=0.0, completion_usd_per_million=0.0)
        settings = settings or EndpointSettings(concurrency=16, prices=free)
        self.name, self._timeout_s = model, timeout_s
        self._client = EndpointClient(model, base_url=base_url, name=model, settings=settings, meter=meter)
        try:
            from transformers import AutoTokenizer

            self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer or model)
        except Exception as error:
            raise PolicyError(
                f"cannot load the tokenizer {tokenizer or model!r} of {self._client.where}: {error}", FailureClass.INPUT
            ) from error

    async def score(self, rows: Rows, top_k: int) -> list[RowScores]:
        """Raises `PolicyError` also for a server that gives no log-probabilities of its prompts."""
        return await _all(self._one(row, top_k) for row in rows)

    async def close(self) -> None:
        await self._client.close()

    async def _one(self, row: Sequence[int], top_k: int) -> RowScores:
        body = {
            "model": self.name,
            "prompt": list(row),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": top_k,
        }
        request = Request(
            path="/completions",
            body=lambda: body,
            identity=body,
            prompts=(),
            most_prompt_tokens=len(row),
            most_completion_tokens=1,
        )
        async with self._client.limited(self._timeout_s) as limit:
            reply = (await self._client.ask(request, _read_scored, limit)).reply
        assert isinstance(reply, _ScoredReply)  # no cache, which would keep a plain one
        places = reply.prompt_logprobs
        if len(places) != len(row):
            raise PolicyError(
                f"{self._client.where} was sent {len(row)} ids and scored {len(places)}: it does not serve ids as they "
                "are",
                FailureClass.INPUT,
            )
        return RowScores.of(*_arrays(places[1:], row[1:], top_k, self._client.where))


async def _all(calls: Iterable[Coroutine[Any, Any, RowScores]]) -> list[RowScores]:
    """Together; the first error ends them all and is raised as it is."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _arrays(
    places: Sequence[Mapping[int, float] | None], tokens: Sequence[int], top_k: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """[n - 1, 1 + top_k] as `VllmPolicy.score` has them; a place's own token comes first."""
    ids = np.repeat(np.asarray(tokens, np.int32)[:, None], 1 + top_k, axis=1)
    logprobs = np.full(ids.shape, np.nan, np.float32)
    for i, (place, token) in enumerate(zip(places, tokens, strict=True)):
        if place is None or token not in place:
            raise PolicyError(f"{where} gave no log-probability of its prompt's token {i + 1}", FailureClass.INPUT)
        logprobs[i, 0] = place[token]
        others = sorted((pair for pair in place.items() if pair[0] != token), key=lambda pair: -pair[1])[:top_k]
        for j, (other, value) in enumerate(others, start=1):
            ids[i, j], logprobs[i, j] = other, value
    return ids, logprobs


def _read_scored(body: Mapping[str, Any]) -> _ScoredReply:
    """Raises `UnusableAnswerError`."""
    reply = read_completions(body)
    found = body["choices"][0].get("prompt_logprobs")
    if not isinstance(found, list):
        raise UnusableAnswerError("an answer without prompt_logprobs: not a vLLM server, or one that gives none")
    try:
        places = tuple(
            None if place is None else {int(token): float(each["logprob"]) for token, each in place.items()}
            for place in found
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnusableAnswerError(f"prompt_logprobs of another form: {error!r}") from None
    return _ScoredReply(choices=reply.choices, usage=reply.usage, prompt_logprobs=places)
