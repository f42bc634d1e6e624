"""`VllmServerPolicy`: a vLLM server as a `Policy`, token-exactly: one engine shared by several machines.

The prompt is rendered here (`rollout.rendering.Renderer`, with the served model's tokenizer, loaded from a folder or
Hugging Face id) and sent as ids to /v1/completions; the ids that were sampled come back (`return_token_ids`) and are
kept as they came, with their log-probabilities. A prefix ends the prompt, as it does in process. How requests are made
to succeed is `rollout.endpoint_client`'s business, as for any endpoint.

It does not start the server (`vllm serve MODEL`, or `python -m vllm.entrypoints.openai.api_server --model MODEL`), nor
change its weights. Any other endpoint is for `rollout.openai_policy`.

Example::

    policy = VllmServerPolicy("Qwen/Qwen2.5-32B-Instruct", base_url="http://teacher:8000/v1")
    await policy.check()
    [completion] = await policy.complete(messages, Sampling(stop=("<end_code>",), logprobs=True), prefix="Thought: ")
    completion.prompt_ids, completion.token_ids, completion.logprobs
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from rollout.endpoint_client import EndpointClient
from rollout.endpoint_requests import Answer, EndpointSettings, Request
from rollout.policy import PolicyError, Sampling
from rollout.rate_limits import RateLimits, Retries
from rollout.rendering import Renderer, RenderingError
from rollout.replies import ReplyChoice, read_completions
from rollout.sampled_turn import sampled_turn
from rollout.spend import Meter, Prices
from rollout.trajectory import Completion, FailureClass, Message

_MAX_STOPS = 4
"""Of vLLM's server, unless it was started with VLLM_MAX_STOP_STRINGS."""


class VllmServerPolicy:
    """A model behind a vLLM server. For one event loop; building it loads the tokenizer.

    `tokenizer` is a folder or Hugging Face id, by default `model`. `weights_version` is what the server is known to
    serve: it does not tell. The other arguments are those of `rollout.policy_spec.PolicySpec`; what calls cost goes to
    `meter`. Raises `PolicyError` (INPUT) for a tokenizer that cannot be loaded or rendered exactly, a missing key, or a
    cache file that cannot be used.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        tokenizer: str = "",
        api_key_env: str = "OPENAI_API_KEY",
        name: str | None = None,
        timeout_s: float = 60.0,
        concurrency: int = 32,
        retries: Retries | None = None,
        rate_limits: RateLimits | None = None,
        prices: Prices | None = None,
        cache_path: str = "",
        weights_version: str = "",
        meter: Meter | None = None,
    ) -> None:
        self.name = name or model
        self.weights_version = weights_version
        self._model = model
        settings = EndpointSettings(
            api_key_env=api_key_env,
            timeout_s=timeout_s,
            concurrency=concurrency,
            retries=retries or Retries(),
            rate_limits=rate_limits or RateLimits(),
            # What a server of one's own answers is counted, and costs nothing.
            prices=prices or Prices(prompt_usd_per_million=0.0, completion_usd_per_million=0.0),
            cache_path=cache_path,
        )
        self._client = EndpointClient(model, base_url=base_url, name=self.name, settings=settings, meter=meter)
        self.base_url = self._client.base_url
        try:
            from transformers import AutoTokenizer

            self._renderer = Renderer(AutoTokenizer.from_pretrained(tokenizer or model))
        except Exception as error:
            raise PolicyError(
                f"cannot load the tokenizer {tokenizer or model!r} of {self._client.where}: {error}", FailureClass.INPUT
            ) from error
        self._max_model_len: int | None = None
        self._looking = asyncio.Lock()

    async def check(self) -> None:
        """Ask what is served, once and briefly. Raises `PolicyError`: no answer, refused key, other server or model."""
        self._look_at(await self._client.models(checked=True))
        await self._client.check_meter()

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        """`sampling.n` turns by one request, from one shared prefill; greedy candidates are copies of one.

        As `rollout.vllm_policy.VllmPolicy.complete`: `max_tokens` is cut to the room that the model has left, and a
        stop string that ends inside a token leaves `token_ids` None. Raises `PolicyError`: LIMIT when the prompt leaves
        no room, INPUT when it cannot be rendered or is refused, ENGINE when the server kept failing; and
        `BudgetExceeded` when the spend cap is reached.
        """
        try:
            prompt_ids = self._renderer.prompt(messages, prefix)
            prefix_ids = prompt_ids[len(self._renderer.prompt(messages)) :] if prefix else ()
        except RenderingError as error:
            raise PolicyError(str(error), FailureClass.INPUT) from error
        if len(sampling.stop) > _MAX_STOPS:
            raise PolicyError(
                f"vLLM's server takes {_MAX_STOPS} stop strings, not {len(sampling.stop)}", FailureClass.INPUT
            )
        greedy = sampling.temperature <= 0
        wanted = 1 if greedy else sampling.n
        prompts = (*(message.content for message in messages), prefix)
        async with self._client.limited(sampling.timeout_s, prompts) as limit:
            room = await self._room(len(prompt_ids))
            body = self._body(prompt_ids, sampling, wanted, room)
            request = Request(
                path="/completions",
                body=lambda: body,
                identity=self._identity(body, sampling),
                prompts=prompts,
                most_prompt_tokens=len(prompt_ids),
                most_completion_tokens=body["max_tokens"] * wanted,
            )
            answer = await self._client.ask(request, read_completions, limit)
        if len(answer.reply.choices) != wanted:
            raise PolicyError(
                f"{self._client.where} returned {len(answer.reply.choices)} choices, not {wanted}", FailureClass.INPUT
            )
        completions = [
            self._completion(choice, answer, sampling, prefix, prefix_ids, prompt_ids)
            for choice in answer.reply.choices
        ]
        if greedy and sampling.n > 1:
            return [replace(each, cost_usd=each.cost_usd / sampling.n) for each in completions] * sampling.n
        return completions

    def stats(self) -> dict[str, float]:
        """As `OpenAIPolicy.stats`."""
        return self._client.stats()

    async def close(self) -> None:
        await self._client.close()

    def _body(self, prompt_ids: tuple[int, ...], sampling: Sampling, n: int, room: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(prompt_ids),
            "n": n,
            "temperature": max(sampling.temperature, 0.0),
            "top_p": sampling.top_p,
            # A server takes what a request does not say from the model's generation_config.json.
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": min(sampling.max_tokens, room),
            "include_stop_str_in_output": True,
            "stop_token_ids": [self._renderer.stop_token_id],
            "return_token_ids": True,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            # vLLM gives candidate i the seed + i: neighbouring seeds must not share candidates.
            body["seed"] = _spread(sampling.seed)
        if sampling.logprobs:
            body["logprobs"] = 0  # of what was sampled, and no others
        return body

    def _identity(self, body: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
        identity: dict[str, Any] = {"endpoint": self.base_url, "weights": self.weights_version, **body}
        if sampling.seed is None and sampling.temperature > 0:
            identity["occurrence"] = self._client.occurrence(identity)
        return identity

    def _completion(
        self,
        choice: ReplyChoice,
        answer: Answer,
        sampling: Sampling,
        prefix: str,
        prefix_ids: tuple[int, ...],
        prompt_ids: tuple[int, ...],
    ) -> Completion:
        if choice.token_ids is None:
            raise PolicyError(
                f"{self._client.where} returns no token ids: it is no vLLM server, or one before 0.11; "
                "use a policy of kind 'openai'",
                FailureClass.INPUT,
            )
        if choice.prompt_ids is not None and choice.prompt_ids != prompt_ids:
            raise PolicyError(
                f"{self._client.where} was sent {len(prompt_ids)} prompt ids and used {len(choice.prompt_ids)} others",
                FailureClass.INPUT,
            )
        text, ids = sampled_turn(
            self._renderer.tokenizer,
            prefix=prefix,
            prefix_ids=prefix_ids,
            sampled=choice.token_ids,
            stop=choice.stop_reason if isinstance(choice.stop_reason, str) else None,
        )
        logprobs = choice.logprobs if sampling.logprobs else None
        if sampling.logprobs and (logprobs is None or len(logprobs) != len(choice.token_ids)):
            raise PolicyError(
                f"{self._client.where} returned {len(choice.token_ids)} token ids and "
                f"{len(logprobs or ())} log-probabilities",
                FailureClass.INPUT,
            )
        reasons: dict[str, Literal["stop", "length", "abort"]] = {"stop": "stop", "length": "length"}
        return Completion(
            text=text,
            token_ids=ids,
            logprobs=logprobs,
            finish_reason=reasons.get(choice.finish_reason, "abort"),
            weights_version=self.weights_version,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(choice.token_ids),
            prompt_ids=prompt_ids,
            prefix_by="tokens" if prefix else "",
            cost_usd=answer.cost_usd / len(answer.reply.choices),
            cached=answer.cached,
        )

    # -- what is served

    async def _room(self, prompt_tokens: int) -> int:
        async with self._looking:
            if self._max_model_len is None:
                self._look_at(await self._client.models())
        assert self._max_model_len is not None
        room = self._max_model_len - prompt_tokens
        if room < 1:
            raise PolicyError(
                f"a prompt of {prompt_tokens} tokens leaves no room in max_model_len={self._max_model_len} of "
                f"{self._client.where}",
                FailureClass.LIMIT,
            )
        return room

    def _look_at(self, models: Sequence[dict[str, Any]]) -> None:
        served = {str(model.get("id")): model for model in models}
        lengths = {name: model.get("max_model_len") for name, model in served.items()}
        if not any(isinstance(length, int) for length in lengths.values()):
            raise PolicyError(
                f"{self.base_url} is no vLLM server (its model list tells no max_model_len); "
                "use a policy of kind 'openai'",
                FailureClass.INPUT,
            )
        if self._model not in served:
            raise PolicyError(
                f"teacher endpoint {self.base_url} serves {', '.join(served)}, not {self._model!r}", FailureClass.INPUT
            )
        # An adapter's entry has no length of its own: it is that of the model below it.
        own = lengths[self._model]
        self._max_model_len = own if isinstance(own, int) else min(x for x in lengths.values() if isinstance(x, int))


def _spread(seed: int) -> int:
    """31 bits far from those of `seed + 1`; the same as in process."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big") >> 1
