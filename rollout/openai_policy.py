"""`OpenAIPolicy`: any endpoint that speaks OpenAI's chat completions (vLLM, SGLang, Ollama, hosted APIs) as a
`Policy`.

A call costs money and may fail: what makes it succeed, or stop, within its limits is `rollout.endpoint_client`. No
tokens are seen here: `Completion.token_ids` is None (`rollout.vllm_server_policy` sees them). The key comes from the
environment and nowhere else.

A prefix is given in one of three ways (`prefill`), which `Completion.prefix_by` tells:

- "continue": the conversation ends with an assistant message that vLLM is told to go on with
  (`continue_final_message`); exact.
- "message": the same message without vLLM's flags, for endpoints that continue a last assistant message by themselves
  (Anthropic, DeepSeek, Mistral and others behind a compatible API).
- "none": for endpoints without prefill the last message asks for it ("Begin your answer exactly with: ..."). A reply
  that does not begin so gets the prefix put in front. The request never becomes part of the trajectory ("asked").

"auto" asks once: "continue" for vLLM, "none" for all others; `prefill_used` says which.

Fields that a server refuses (`seed`, `logprobs`, `n`, `stop`, `temperature` of reasoning models, the older of the two
names of `max_tokens`) are left out from then on; `notes` says which, and a warning says it once.

Example::

    policy = OpenAIPolicy("Qwen/Qwen2.5-32B-Instruct", base_url="http://teacher:8000/v1")
    await policy.check()
    [completion] = await policy.complete(messages, Sampling(stop=("<end_code>",)))
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from rollout.endpoint_client import OPENAI, CallLimit, EndpointClient
from rollout.endpoint_errors import RequestRefused
from rollout.endpoint_requests import Answer, EndpointSettings, Request
from rollout.policy import PolicyError, Sampling
from rollout.rate_limits import RateLimits, Retries
from rollout.replies import ReplyChoice, read_chat
from rollout.spend import Meter, Prices
from rollout.trajectory import Completion, FailureClass, Message, PrefixBy

Prefill = Literal["auto", "continue", "message", "none"]

_PREFIX_BY: dict[str, PrefixBy] = {"continue": "continue", "message": "message", "none": "asked"}
_MAX_STOPS = 4
"""What the API allows, and vLLM's server too."""
_DROPPABLE = ("logprobs", "seed", "stop", "temperature", "top_p", "top_k", "n")
_ASKED = "\n\nBegin your answer exactly with: "
_OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_NOT_SUPPORTED = re.compile(
    r"support|unrecogni[sz]ed|unknown|unexpected|not (?:permitted|allowed|available|implemented|valid for)|forbidden"
    r"|extra (?:inputs|fields)|additional propert|only the default|incompatible|deprecated|must be 1\b|at most 1\b",
    re.IGNORECASE,
)
"""A field that is unwelcome altogether; a bad value of a good field is our mistake, and stays an error."""
_TOKENS_OF_A_MESSAGE = 16
"""At most, for the template's own text around one."""

logger = logging.getLogger(__name__)


class OpenAIPolicy:
    """A chat model behind an endpoint. For one event loop.

    `base_url` None is OpenAI's own. `api_key_env` names the variable that holds the key; it may be unset for endpoints
    on this machine or its private network. `timeout_s` limits one attempt (with `stream`: the wait for each piece),
    `Sampling.timeout_s` a call with all its retries. At most `concurrency` requests are out at once. `retries`,
    `rate_limits`, `prices`, `cache_path` and `extra_body` are those of `rollout.policy_spec.PolicySpec`. What calls
    cost goes to `meter`. Raises `PolicyError` (INPUT) for a missing key or a cache file that cannot be used.
    """

    weights_version = ""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        name: str | None = None,
        max_retries: int | None = None,
        timeout_s: float = 60.0,
        concurrency: int = 32,
        prefill: Prefill = "auto",
        retries: Retries | None = None,
        rate_limits: RateLimits | None = None,
        prices: Prices | None = None,
        cache_path: str = "",
        stream: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        meter: Meter | None = None,
    ) -> None:
        if prefill not in get_args(Prefill):
            raise ValueError(f"prefill {prefill!r} is unknown; there are {', '.join(get_args(Prefill))}")
        self.name = name or model
        self._model, self._stream = model, stream
        self._prefill: Prefill = prefill
        self._extra_body = dict(extra_body or {})
        retries = retries or Retries()
        settings = EndpointSettings(
            api_key_env=api_key_env,
            timeout_s=timeout_s,
            concurrency=concurrency,
            retries=retries if max_retries is None else replace(retries, per_call=max_retries),
            rate_limits=rate_limits or RateLimits(),
            prices=prices,
            cache_path=cache_path,
        )
        self._client = EndpointClient(model, base_url=base_url, name=self.name, settings=settings, meter=meter)
        self.base_url = self._client.base_url
        # The newer name is refused by older servers, the older one by OpenAI's newer models.
        self._max_tokens_name = "max_completion_tokens" if self.base_url == OPENAI else "max_tokens"
        self._renamed = False
        self._left_out: set[str] = set()
        self._notes: list[str] = []
        self._detecting = asyncio.Lock()
        self._takes_n = True

    @property
    def prefill_used(self) -> Prefill:
        """How prefixes are given; "auto" until the first one, or `check`, has found out."""
        return self._prefill

    @property
    def notes(self) -> tuple[str, ...]:
        """What the endpoint would not take, each said once."""
        return tuple(self._notes)

    async def check(self) -> None:
        """Ask for the model list, once and briefly. Raises `PolicyError`: no answer, key refused, model not served, or
        a spend cap in money without prices."""
        models = await self._client.models(checked=True)
        self._decide_prefill(models)
        served = [str(model.get("id")) for model in models]
        if _is_vllm(models) and self._model not in served:
            raise PolicyError(
                f"teacher endpoint {self.base_url} serves {', '.join(served)}, not {self._model!r}", FailureClass.INPUT
            )
        await self._client.check_meter()

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        """`sampling.n` turns, by one request or, where a server does not take `n`, by n; greedy ones are copies of one.

        Where the server does not tell which stop string it met (vLLM does), a turn that ended with reason "stop" gets
        the first one put back, since stop strings are part of a turn. Raises `PolicyError`: LIMIT when the prompt is
        too long, INPUT for what the endpoint refuses, MODEL for an answer that its provider withholds, ENGINE when it
        kept failing; and `BudgetExceeded` when the spend cap is reached.
        """
        wanted = 1 if sampling.temperature <= 0 else sampling.n
        prompts = (*(message.content for message in messages), prefix)
        async with self._client.limited(sampling.timeout_s, prompts) as limit:
            if prefix and self._prefill == "auto":
                await self._detect()
            answers = await self._answers(messages, sampling, prefix, wanted, limit)
        completions = [
            self._completion(choice, answer, sampling, prefix, i)
            for answer in answers
            for i, choice in enumerate(answer.reply.choices)
        ][:wanted]
        if wanted < sampling.n:
            shared = [replace(each, cost_usd=each.cost_usd / sampling.n) for each in completions]
            return shared * sampling.n
        return completions

    def stats(self) -> dict[str, float]:
        """Since the start: requests (repeated ones too), retries, rate_limited (429s with a wait), cached (answers that
        cost nothing), prompt_tokens, generated_tokens, cost_usd, left_out (fields); now: running (calls)."""
        return {**self._client.stats(), "left_out": len(self._left_out) + self._renamed}

    async def close(self) -> None:
        await self._client.close()

    # -- one call

    async def _answers(
        self, messages: Sequence[Message], sampling: Sampling, prefix: str, wanted: int, limit: CallLimit
    ) -> list[Answer]:
        """Of at least `wanted` choices together."""
        first = await self._first(messages, sampling, prefix, wanted, limit)
        got = len(first.reply.choices)
        more = (self._ask(messages, sampling, prefix, 1, got + i, limit) for i in range(wanted - got))
        return [first, *await _all(more)]

    async def _first(
        self, messages: Sequence[Message], sampling: Sampling, prefix: str, wanted: int, limit: CallLimit
    ) -> Answer:
        if wanted > 1 and self._takes_n:
            refused: RequestRefused | None = None
            try:
                answer = await self._ask(messages, sampling, prefix, wanted, 0, limit)
            except RequestRefused as error:
                refused = error
            else:
                if len(answer.reply.choices) < wanted:
                    self._leave_out("n", "fewer choices came than were asked for")
                return answer
            if "n" not in self._left_out:
                # The refusal did not say what it was for; if one choice is refused as well, that error is shown.
                answer = await self._ask(messages, sampling, prefix, 1, 0, limit)
                self._leave_out("n", refused.reason)
                return answer
        return await self._ask(messages, sampling, prefix, 1, 0, limit)

    async def _ask(
        self, messages: Sequence[Message], sampling: Sampling, prefix: str, n: int, index: int, limit: CallLimit
    ) -> Answer:
        """One request, asked again without what the endpoint refuses."""
        occurrence = 0
        if sampling.seed is None and sampling.temperature > 0:
            # Nothing else tells two samples apart.
            occurrence = self._client.occurrence(self._identity(messages, sampling, prefix, n, index))
        sent: dict[str, Any] = {}

        def body() -> dict[str, Any]:
            nonlocal sent
            sent = self._body(messages, sampling, prefix, n, index)
            return sent

        while True:
            request = Request(
                path="/chat/completions",
                body=body,
                identity={**self._identity(messages, sampling, prefix, n, index), "occurrence": occurrence},
                prompts=(*(message.content for message in messages), prefix),
                most_prompt_tokens=_most_tokens(messages, prefix),
                most_completion_tokens=sampling.max_tokens * n,
                stream=self._stream,
            )
            try:
                return await self._client.ask(request, read_chat, limit)
            except RequestRefused as error:
                refused = error
            if not self._adapt(refused, sent):
                raise refused
            if "n" in self._left_out and n > 1:
                raise refused  # for `_first`, which then asks for one

    def _identity(
        self, messages: Sequence[Message], sampling: Sampling, prefix: str, n: int, index: int
    ) -> dict[str, Any]:
        return {
            "endpoint": self.base_url,
            "model": self._model,
            "messages": [[message.role, message.content] for message in messages],
            "prefix": [self._prefill, prefix] if prefix else None,
            "n": n,
            "index": index,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop),
            "seed": sampling.seed,
            "logprobs": sampling.logprobs,
            "extra_body": self._extra_body,
        } | ({"top_k": sampling.top_k} if sampling.top_k else {})

    def _body(self, messages: Sequence[Message], sampling: Sampling, prefix: str, n: int, index: int) -> dict[str, Any]:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        body: dict[str, Any] = {"model": self._model, "messages": chat}
        if prefix and self._prefill in ("continue", "message"):
            chat.append({"role": "assistant", "content": prefix})
        if prefix and self._prefill == "continue":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if prefix and self._prefill == "none":
            chat[-1] = {**chat[-1], "content": chat[-1]["content"] + _ASKED + prefix}
        optional: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.top_k:
            optional["top_k"] = sampling.top_k  # not OpenAI's own API, but vLLM's, SGLang's and many others'
        if n > 1:
            optional["n"] = n
        if sampling.stop:
            optional["stop"] = list(sampling.stop[:_MAX_STOPS])
        if sampling.seed is not None:
            optional["seed"] = _spread(sampling.seed, index)
        if sampling.logprobs:
            optional["logprobs"] = True
        body |= {name: value for name, value in optional.items() if name not in self._left_out}
        body[self._max_tokens_name] = sampling.max_tokens
        return body | self._extra_body

    def _completion(
        self, choice: ReplyChoice, answer: Answer, sampling: Sampling, prefix: str, index: int
    ) -> Completion:
        text = _with_prefix(choice.text, prefix, exact=self._prefill == "continue")
        reason = choice.finish_reason
        if reason == "stop" and sampling.stop and "stop" not in self._left_out:
            met = choice.stop_reason if choice.tells_stop else sampling.stop[0]
            if isinstance(met, str) and not text.endswith(met):
                text += met
        ended = _cut(text, sampling.stop, len(prefix))
        if ended is not None:
            text, reason = ended, "stop"
        usage, count = answer.reply.usage, len(answer.reply.choices)
        share, rest = divmod(usage.completion_tokens, count)
        return Completion(
            text=text,
            logprobs=choice.logprobs if sampling.logprobs else None,
            finish_reason="length" if reason == "length" else "abort" if reason == "content_filter" else "stop",
            prompt_tokens=usage.prompt_tokens,
            # What it took is told per request: it is shared out evenly.
            completion_tokens=share + (index < rest),
            prefix_by=_PREFIX_BY[self._prefill] if prefix else "",
            cost_usd=answer.cost_usd / count,
            cached=answer.cached,
        )

    # -- what the endpoint is

    def _adapt(self, refused: RequestRefused, body: Mapping[str, Any]) -> bool:
        """Leave out what the endpoint named in its refusal; False when it named nothing that can be."""
        sent = next(name for name in _OTHER_NAME if name in body)
        if _names(refused, sent) and sent not in self._extra_body:
            if sent == self._max_tokens_name and self._renamed:
                return False  # it takes neither
            if sent == self._max_tokens_name:
                self._renamed, self._max_tokens_name = True, _OTHER_NAME[sent]
                self._note(f"{self._max_tokens_name} is sent in place of {sent}, which is refused: {refused.reason}")
            return True
        if self._prefill == "continue" and "continue_final_message" in body:
            if any(_names(refused, field) for field in ("continue_final_message", "add_generation_prompt")):
                self._prefill = "none"
                self._note(f"prefixes are asked for in words, since the endpoint continues none: {refused.reason}")
                return True
        for field in _DROPPABLE:
            if field in body and field not in self._extra_body and _names(refused, field):
                self._leave_out(field, refused.reason)
                return True
        return False

    def _leave_out(self, field: str, reason: str) -> None:
        if field == "n":
            self._takes_n = False
        if field not in self._left_out:
            self._left_out.add(field)
            effect = {
                "n": "candidates are asked for one at a time",
                "stop": "turns are cut here",
                "logprobs": "likelihoods are unknown",
                "seed": "samples cannot be had again",
                "temperature": "the endpoint's own is used",
                "top_p": "the endpoint's own is used",
                "top_k": "the endpoint's own is used",
            }[field]
            self._note(f"the field {field!r} is left out, so {effect}: {reason}")

    def _note(self, text: str) -> None:
        self._notes.append(text)
        logger.warning("%s at %s: %s", self.name, self.base_url, text)

    async def _detect(self) -> None:
        async with self._detecting:
            if self._prefill == "auto":
                self._decide_prefill(await self._client.models())

    def _decide_prefill(self, models: Sequence[dict[str, Any]]) -> None:
        if self._prefill == "auto":
            self._prefill = "continue" if _is_vllm(models) else "none"


async def _all(calls: Any) -> list[Answer]:
    """All answers, or the first error, after which none is left running."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _is_vllm(models: Sequence[dict[str, Any]]) -> bool:
    return any(model.get("owned_by") == "vllm" for model in models)


def _with_prefix(text: str, prefix: str, *, exact: bool) -> str:
    """The turn with its prefix; a reply that repeats it (up to white space around it) does not get it twice."""
    if exact or not prefix:
        return prefix + text
    said, asked = text.lstrip(), prefix.strip()
    return prefix + (said[len(asked) :] if said.startswith(asked) else text)


def _cut(text: str, stops: Sequence[str], start: int) -> str | None:
    """The turn up to its first stop string, that included, where it goes on behind it: a server that takes no stop
    strings, or not so many. None where it does not."""
    ends = [at + len(stop) for stop in stops if (at := text.find(stop, start)) >= 0]
    return text[: min(ends)] if ends and min(ends) < len(text) else None


def _names(refused: RequestRefused, field: str) -> bool:
    """Whether a refusal is of this field: by its `param`, or in its text, where a short name must look like one."""
    if not _NOT_SUPPORTED.search(f"{refused.reason} {refused.code}"):
        return False
    if refused.parameter and refused.parameter.rpartition(".")[2] == field:
        return True
    if refused.parameter and refused.parameter.rpartition(".")[2] in (*_DROPPABLE, *_OTHER_NAME):
        return False
    if field in ("n", "stop"):
        pattern = (
            rf"['\"`]{field}['\"`]|\b{field} (?:must|is|should|cannot|>)|(?:parameter|argument|field)s?:? {field}\b"
        )
    else:
        pattern = rf"(?<![\w]){field}(?![\w])"
    return re.search(pattern, refused.reason, re.IGNORECASE) is not None


def _most_tokens(messages: Sequence[Message], prefix: str) -> int:
    """No tokenizer makes more tokens of a text than it has bytes."""
    texts = [message.content for message in messages] + [prefix, _ASKED]
    return sum(len(text.encode()) + _TOKENS_OF_A_MESSAGE for text in texts)


def _spread(seed: int, index: int) -> int:
    """31 bits of their own for each (seed, request): servers give candidate i the seed + i."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "big") >> 1
