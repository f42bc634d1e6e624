"""`OpenAIPolicy`: any endpoint that speaks OpenAI's chat completions (vLLM, SGLang, Ollama, hosted APIs) as a
`Policy`.

A call costs money and may fail, so failures that pass (429, 5xx, timeouts, broken connections, answers without a
usable choice) are tried again after the wait that the server asks for; all others are raised at once. No tokens are
seen here: `Completion.token_ids` is None. The key comes from the environment and nowhere else.

A prefix is given in one of three ways (`prefill`):

- "continue": the conversation ends with an assistant message that vLLM is told to go on with
  (`continue_final_message`); exact.
- "message": the same message without vLLM's flags, for endpoints that continue a last assistant message by themselves
  (Anthropic, DeepSeek, Mistral and others behind a compatible API).
- "none": for endpoints without prefill the last message asks for it ("Begin your answer exactly with: ..."). A reply
that
  does not begin so gets the prefix put in front. The request never becomes part of the trajectory.

"auto" asks once: "continue" for vLLM, "none" for all others; `prefill_used` says which.

Example::

    policy = OpenAIPolicy("Qwen/Qwen2.5-32B-Instruct", base_url="http://teacher:8000/v1")
    await policy.check()
    [completion] = await policy.complete(messages, Sampling(stop=("<end_code>",)))
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from envs.endpoints import delay_s, is_local, may_pass
from rollout.policy import PolicyError, Sampling
from rollout.trajectory import Completion, FailureClass, Message

Prefill = Literal["auto", "continue", "message", "none"]

_OPENAI = "https://api.openai.com/v1"
_CHECK_TIMEOUT_S = 5.0
_MAX_STOPS = 4
"""What the API allows, and vLLM's server too."""
_T = TypeVar("_T")


class _UnusableAnswerError(Exception):
    """An answer with status 200 and nothing in it to use."""


@dataclass(frozen=True, slots=True)
class _Choice:
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    logprobs: tuple[float, ...] | None
    completion_tokens: int


class OpenAIPolicy:
    """A chat model behind an endpoint. For one event loop.

    `base_url` None is OpenAI's own. `api_key_env` names the variable that holds the key; it may be unset for endpoints
    on this machine or its private network. `timeout_s` limits one attempt, `Sampling.timeout_s` a call with all its
    retries. At most `concurrency` calls are out at once. Raises `PolicyError` (INPUT) for a missing key.
    """

    weights_version = ""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        name: str | None = None,
        max_retries: int = 4,
        timeout_s: float = 60.0,
        concurrency: int = 32,
        prefill: Prefill = "auto",
    ) -> None:
        if prefill not in get_args(Prefill):
            raise ValueError(f"prefill {prefill!r} is unknown; there are {', '.join(get_args(Prefill))}")
        self.name = name or model
        self.base_url = (base_url or _OPENAI).rstrip("/")
        self._model, self._api_key_env = model, api_key_env
        self._max_retries, self._timeout_s = max_retries, timeout_s
        self._prefill: Prefill = prefill
        self._slots = asyncio.Semaphore(concurrency)
        self._detecting = asyncio.Lock()
        self._counts: dict[str, float] = {
            name: 0 for name in ("requests", "retries", "prompt_tokens", "generated_tokens", "running")
        }
        self._takes_n = True
        key = os.environ.get(api_key_env, "")
        if not key and not is_local(self.base_url):
            raise PolicyError(
                f"the endpoint {self.base_url} needs a key: set the environment variable {api_key_env}",
                FailureClass.INPUT,
            )
        from openai import AsyncOpenAI

        # Retries are ours: an unusable answer is retried like a failed one, under the same limits.
        self._client = AsyncOpenAI(
            api_key=key or "EMPTY", base_url=self.base_url, max_retries=0, timeout=self._timeout_s
        )

    @property
    def prefill_used(self) -> Prefill:
        """How prefixes are given; "auto" until the first one, or `check`, has found out."""
        return self._prefill

    async def check(self) -> None:
        """Ask for the model list, once and briefly. Raises `PolicyError`: no answer, key refused, model not served."""
        from openai import APIConnectionError, APIStatusError

        try:
            models = await self._models()
        except APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._failure(error) from error
            if error.status_code >= 500:
                raise PolicyError(f"teacher endpoint {self.base_url} does not answer: {_describe(error)}") from error
            return  # it answers, and has no model list
        except (APIConnectionError, TimeoutError) as error:
            raise PolicyError(f"teacher endpoint {self.base_url} does not answer: {_describe(error)}") from error
        self._decide_prefill(models)
        served = [str(model.get("id")) for model in models]
        if _is_vllm(models) and self._model not in served:
            raise PolicyError(
                f"teacher endpoint {self.base_url} serves {', '.join(served)}, not {self._model!r}", FailureClass.INPUT
            )

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        """`sampling.n` turns, by one request or, where a server does not take `n`, by n; greedy ones are copies of one.

        Where the server does not tell which stop string it met (vLLM does), a turn that ended with reason "stop" gets
        the first one put back, since stop strings are part of a turn. Raises `PolicyError`: LIMIT when the prompt is
        too long, INPUT for what the endpoint refuses, ENGINE when it kept failing.
        """
        wanted = 1 if sampling.temperature <= 0 else sampling.n
        async with self._slots:
            self._counts["running"] += 1
            try:
                async with asyncio.timeout(sampling.timeout_s):
                    if prefix and self._prefill == "auto":
                        await self._detect()
                    choices, prompt_tokens = await self._choices(messages, sampling, prefix, wanted)
            except TimeoutError as error:
                raise PolicyError(
                    f"{self.name} at {self.base_url}: no completion within timeout_s={sampling.timeout_s:g}"
                ) from error
            finally:
                self._counts["running"] -= 1
        completions = [
            Completion(
                text=choice.text,
                logprobs=choice.logprobs,
                finish_reason=choice.finish_reason,
                prompt_tokens=prompt_tokens,
                completion_tokens=choice.completion_tokens,
            )
            for choice in choices
        ]
        return completions * sampling.n if wanted < sampling.n else completions

    def stats(self) -> dict[str, float]:
        """Since the start: requests, retries, prompt_tokens, generated_tokens; now: running (calls)."""
        return dict(self._counts)

    async def close(self) -> None:
        await self._client.close()

    # -- one call

    async def _choices(
        self, messages: Sequence[Message], sampling: Sampling, prefix: str, wanted: int
    ) -> tuple[list[_Choice], int]:
        """Exactly `wanted` choices, and the prompt tokens of one request."""
        choices, prompt_tokens = await self._first(messages, sampling, prefix, wanted)
        missing = wanted - len(choices)
        if missing > 0:
            more = await asyncio.gather(
                *(self._ask(messages, sampling, prefix, n=1, index=len(choices) + i) for i in range(missing))
            )
            choices = choices + [choice for each, _ in more for choice in each[:1]]
        return choices[:wanted], prompt_tokens

    async def _first(
        self, messages: Sequence[Message], sampling: Sampling, prefix: str, wanted: int
    ) -> tuple[list[_Choice], int]:
        if wanted > 1 and self._takes_n:
            try:
                choices, prompt_tokens = await self._ask(messages, sampling, prefix, n=wanted)
            except PolicyError as error:
                if error.failure_class is not FailureClass.INPUT:
                    raise
            else:
                self._takes_n = len(choices) >= wanted
                return choices, prompt_tokens
        # Also after a refusal, which may be for the `n`; if one choice is refused as well, that error is shown.
        answer = await self._ask(messages, sampling, prefix, n=1)
        self._takes_n = self._takes_n and wanted == 1
        return answer

    async def _ask(
        self, messages: Sequence[Message], sampling: Sampling, prefix: str, *, n: int, index: int = 0
    ) -> tuple[list[_Choice], int]:
        request = self._request(messages, sampling, prefix, n, index)

        async def attempt() -> tuple[list[_Choice], int]:
            self._counts["requests"] += 1
            response = await self._client.chat.completions.create(**request)
            return self._read(response, sampling, prefix)

        choices, prompt_tokens = await self._retried(attempt)
        self._counts["prompt_tokens"] += prompt_tokens
        self._counts["generated_tokens"] += sum(choice.completion_tokens for choice in choices)
        return choices, prompt_tokens

    def _request(
        self, messages: Sequence[Message], sampling: Sampling, prefix: str, n: int, index: int
    ) -> dict[str, Any]:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        extra: dict[str, Any] = {}
        if prefix and self._prefill in ("continue", "message"):
            chat.append({"role": "assistant", "content": prefix})
        if prefix and self._prefill == "continue":
            extra = {"continue_final_message": True, "add_generation_prompt": False}
        if prefix and self._prefill == "none":
            chat[-1] = {**chat[-1], "content": f"{chat[-1]['content']}\n\nBegin your answer exactly with: {prefix}"}
        request: dict[str, Any] = {
            "model": self._model,
            "messages": chat,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # The newer name is refused by older servers, the older one by OpenAI's newer models.
            ("max_completion_tokens" if self.base_url == _OPENAI else "max_tokens"): sampling.max_tokens,
        }
        if n > 1:
            request["n"] = n
        if sampling.stop:
            request["stop"] = list(sampling.stop[:_MAX_STOPS])
        if sampling.seed is not None:
            request["seed"] = _spread(sampling.seed, index)
        if sampling.logprobs:
            request["logprobs"] = True
        if extra:
            request["extra_body"] = extra
        return request

    def _read(self, response: Any, sampling: Sampling, prefix: str) -> tuple[list[_Choice], int]:
        found = getattr(response, "choices", None)
        if not isinstance(found, list) or not found:
            raise _UnusableAnswerError(f"an answer without choices: {str(response)[:200]!r}")
        usage = getattr(response, "usage", None)
        tokens = getattr(usage, "completion_tokens", None) or 0
        share, rest = divmod(tokens, len(found))
        # The cost is told per request: it is shared out evenly.
        choices = [self._choice(each, sampling, prefix, share + (i < rest)) for i, each in enumerate(found)]
        return choices, getattr(usage, "prompt_tokens", None) or 0

    def _choice(self, choice: Any, sampling: Sampling, prefix: str, completion_tokens: int) -> _Choice:
        text = getattr(getattr(choice, "message", None), "content", None)
        reason = getattr(choice, "finish_reason", None)
        if text is None and reason == "length":
            text = ""  # everything went into hidden reasoning
        if not isinstance(text, str):
            raise _UnusableAnswerError(f"a choice without text: {str(choice)[:200]!r}")
        text = _with_prefix(text, prefix, exact=self._prefill == "continue")
        extra = getattr(choice, "model_extra", None) or {}
        if reason == "stop" and sampling.stop:
            met = extra["stop_reason"] if "stop_reason" in extra else sampling.stop[0]
            if isinstance(met, str) and not text.endswith(met):
                text += met
        logprobs = getattr(getattr(choice, "logprobs", None), "content", None) if sampling.logprobs else None
        return _Choice(
            text=text,
            finish_reason="length" if reason == "length" else "abort" if reason == "content_filter" else "stop",
            logprobs=tuple(float(each.logprob) for each in logprobs) if logprobs else None,
            completion_tokens=completion_tokens,
        )

    # -- failures

    async def _retried(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """`attempt`, again after failures that pass. Raises `PolicyError`; waits are cut by the caller's time limit."""
        for tried in range(self._max_retries + 1):
            try:
                return await attempt()
            except Exception as error:
                if not _passes(error) or tried == self._max_retries:
                    raise self._failure(error, tried + 1) from error
                self._counts["retries"] += 1
                await asyncio.sleep(delay_s(error, tried))
        raise AssertionError("the loop returns or raises")

    def _failure(self, error: Exception, attempts: int = 1) -> PolicyError:
        where, status = f"{self.name} at {self.base_url}", getattr(error, "status_code", None)
        if status in (401, 403):
            message = f"{where} refuses the key in {self._api_key_env}: {_describe(error)}"
            return PolicyError(message, FailureClass.INPUT)
        if _too_long(error):
            return PolicyError(f"{where}: the prompt is too long: {_describe(error)}", FailureClass.LIMIT)
        if status is not None and 400 <= status < 500 and not _passes(error) and status != 429:
            return PolicyError(f"{where} refuses the request: {_describe(error)}", FailureClass.INPUT)
        return PolicyError(f"{where} failed, tried {attempts} times: {_describe(error)}")

    # -- what the endpoint is

    async def _models(self) -> list[dict[str, Any]]:
        page = await self._client.with_options(timeout=_CHECK_TIMEOUT_S).models.list()
        return [model.model_dump() for model in getattr(page, "data", None) or []]

    async def _detect(self) -> None:
        async with self._detecting:
            if self._prefill != "auto":
                return
            from openai import APIStatusError

            try:
                self._decide_prefill(await self._retried(self._models))
            except PolicyError as error:
                if not isinstance(error.__cause__, APIStatusError):
                    raise
                self._decide_prefill([])  # it has no model list, so it is not vLLM

    def _decide_prefill(self, models: Sequence[dict[str, Any]]) -> None:
        if self._prefill == "auto":
            self._prefill = "continue" if _is_vllm(models) else "none"


def _is_vllm(models: Sequence[dict[str, Any]]) -> bool:
    return any(model.get("owned_by") == "vllm" for model in models)


def _with_prefix(text: str, prefix: str, *, exact: bool) -> str:
    """The turn with its prefix; a reply that repeats it (up to white space around it) does not get it twice."""
    if exact or not prefix:
        return prefix + text
    said, asked = text.lstrip(), prefix.strip()
    return prefix + (said[len(asked) :] if said.startswith(asked) else text)


def _passes(error: Exception) -> bool:
    return may_pass(error) or isinstance(error, _UnusableAnswerError)


def _too_long(error: Exception) -> bool:
    if getattr(error, "status_code", None) not in (400, 413, 422):
        return False
    text = str(error).lower()
    return getattr(error, "code", None) == "context_length_exceeded" or "context length" in text


def _describe(error: Exception) -> str:
    cause = error.__cause__ or error.__context__
    status = getattr(error, "status_code", None)
    text = str(error) or type(error).__name__
    if status is None and cause is not None and str(cause):
        text += f" ({cause})"
    return text[:500]


def _spread(seed: int, index: int) -> int:
    """31 bits of their own for each (seed, request): servers give candidate i the seed + i."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "big") >> 1
