"""`EndpointClient`: one request to an OpenAI-compatible endpoint, made to succeed within its limits. What is asked, and
what the answer means, is the business of `rollout.openai_policy` and `rollout.vllm_server_policy`.

Each request passes, in this order: the cache (`rollout.request_cache`), a free slot, the rate limits, the spend meter
(`rollout.spend`), the wire. Failures that pass (429, 5xx, timeouts, lost connections, answers that cannot be used) are
tried again with full jitter, at most `Retries.per_call` times and within the client's retry budget; a 429 that says how
long to wait holds the whole client that long, and counts as no retry. Every wait is cut by the caller's time limit.

An endpoint that answers nothing any more is found out by all calls together: they hold back, try now and then, and
after `Retries.window_s` all end with `EndpointGoneError`, so that no single task is blamed for it.

The key is read from the environment; neither it nor a prompt is part of an error or a log (`rollout.redaction`), which
is why errors here have no cause.

Example::

    client = EndpointClient("m", base_url="http://teacher:8000/v1", settings=EndpointSettings())
    answer = await client.ask(Request(path="/chat/completions", body=body, ...), read_chat)
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from envs.endpoints import asked_wait_s, delay_s, is_local
from rollout.endpoint_errors import EndpointGoneError, LateError, RequestRefused, passes, too_long
from rollout.endpoint_requests import Answer, EndpointSettings, Request
from rollout.policy import PolicyError
from rollout.rate_limits import RateLimiter, RetryBudget
from rollout.redaction import Redactor, quiet_clients
from rollout.replies import (
    ChatStream,
    Reply,
    ReplyUsage,
    UnusableAnswerError,
    WithheldError,
    parse_json,
)
from rollout.request_cache import RequestCache, request_hash
from rollout.spend import BudgetExceeded, Charge, Meter
from rollout.trajectory import FailureClass

OPENAI = "https://api.openai.com/v1"
_CHECK_TIMEOUT_S = 5.0
_LEASE_SLACK_S = 60.0
_FREE_WAIT_S, _FREE_WAITS = 0.5, 10
"""A wait that a server asks for is no retry; of short ones only so many, or it could keep a call busy for ever."""
Read = Callable[[Mapping[str, Any]], Reply]


class CallLimit:
    """A call's time limit; its error says what the call was waiting for."""

    def __init__(self) -> None:
        self.waiting_for = "an answer"
        self.last: Exception | None = None


class EndpointClient:
    """One model behind one endpoint. For one event loop.

    `base_url` None is OpenAI's own. Raises `PolicyError` (INPUT) for a missing key, and for a cache file that cannot
    be used.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        name: str,
        settings: EndpointSettings,
        meter: Meter | None = None,
    ) -> None:
        self.base_url = (base_url or OPENAI).rstrip("/")
        self._model, self._settings, self._meter = model, settings, meter
        self.where = f"{name} at {self.base_url}"
        self.counts: dict[str, float] = {
            name: 0
            for name in (
                "requests",
                "retries",
                "rate_limited",
                "cached",
                "prompt_tokens",
                "generated_tokens",
                "cost_usd",
                "running",
            )
        }
        key = os.environ.get(settings.api_key_env, "")
        if not key and not is_local(self.base_url):
            raise PolicyError(
                f"the endpoint {self.base_url} needs a key: set the environment variable {settings.api_key_env}",
                FailureClass.INPUT,
            )
        self._redact = Redactor(key)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._limiter = RateLimiter(settings.rate_limits)
        self._budget = RetryBudget(settings.retries)
        self._seen: dict[str, int] = {}
        self._failing_since_s: float | None = None
        """Nothing was answered since; None: the latest request was."""
        self._failed = 0
        try:
            self._cache = RequestCache(settings.cache_path) if settings.cache_path else None
        except ValueError as error:
            raise PolicyError(str(error), FailureClass.INPUT) from None
        quiet_clients()
        from openai import AsyncOpenAI

        # Retries are ours: an unusable answer is retried like a failed one, under the same limits.
        self._client = AsyncOpenAI(
            api_key=key or "EMPTY", base_url=self.base_url, max_retries=0, timeout=settings.timeout_s
        )

    @asynccontextmanager
    async def limited(self, timeout_s: float, prompts: tuple[str, ...] = ()) -> AsyncIterator[CallLimit]:
        """Everything inside together takes `timeout_s` at most. Raises `PolicyError` (ENGINE) when it took longer."""
        limit = CallLimit()
        late = False
        self.counts["running"] += 1
        try:
            async with asyncio.timeout(timeout_s):
                yield limit
        except TimeoutError:
            late = True
        finally:
            self.counts["running"] -= 1
        if late:
            last = f" (before: {self._describe(limit.last, prompts)})" if limit.last is not None else ""
            waited = f"; it waited for {limit.waiting_for}" if limit.waiting_for != "an answer" else ""
            raise PolicyError(f"{self.where}: no completion within timeout_s={timeout_s:g}{waited}{last}")

    async def ask(self, request: Request, read: Read, limit: CallLimit | None = None) -> Answer:
        """One answer, from the cache or the endpoint.

        Raises `RequestRefused`, `BudgetExceeded`, `PolicyError`: LIMIT when the prompt is too long, MODEL when the
        provider withholds the answer, INPUT when it refuses the key, ENGINE when it kept failing.
        """
        limit = limit or CallLimit()
        if self._cache is None:
            return await self._fetch(request, read, limit)
        key = request_hash(request.identity)
        async with self._cache.entry(key) as entry:
            if entry.reply is not None:
                self.counts["cached"] += 1
                return Answer(reply=entry.reply, cached=True)
            answer = await self._fetch(request, read, limit)
            await entry.store(answer.reply)
            return answer

    def occurrence(self, identity: Mapping[str, Any]) -> int:
        """How often this client has met this request before: what tells samples apart that have no seed."""
        if self._cache is None:
            return 0
        key = request_hash(identity)
        self._seen[key] = self._seen.get(key, -1) + 1
        return self._seen[key]

    async def models(self, *, checked: bool = False) -> list[dict[str, Any]]:
        """The endpoint's model list, empty where it has none. Tried again like any request, or `checked`: once and
        briefly, and then a refused key is an error. Raises `PolicyError` when it does not answer."""
        tried = 0
        while True:
            try:
                async with _within(_CHECK_TIMEOUT_S):
                    body = parse_json(await self._client.get("/models", cast_to=str))
                data = body.get("data")
                return [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []
            except Exception as error:
                failure = error
            status = getattr(failure, "status_code", None)
            if checked and status in (401, 403):
                raise self._failure(failure, ())
            if isinstance(failure, UnusableAnswerError) or (status is not None and status < 500 and status != 429):
                return []  # it answers, and has no model list
            if checked and status == 429:
                return []
            if checked or tried >= self._settings.retries.per_call:
                raise EndpointGoneError(f"teacher endpoint {self.base_url} does not answer: {self._describe(failure)}")
            await asyncio.sleep(delay_s(failure, tried))
            tried += 1

    async def check_meter(self) -> None:
        """Raises `PolicyError` (INPUT) where a cap in money meets a model without prices."""
        if self._meter is not None and self._settings.prices is None:
            cap = (await self._meter.snapshot()).cap
            if cap.usd is not None:
                raise PolicyError(
                    f"the spend cap is {cap.usd:g} USD, but model {self._model!r} has no prices: set them, "
                    "or cap tokens",
                    FailureClass.INPUT,
                )

    def stats(self) -> dict[str, float]:
        return dict(self.counts)

    async def close(self) -> None:
        await self._client.close()
        if self._cache is not None:
            self._cache.close()

    # -- one request, until it succeeds

    async def _fetch(self, request: Request, read: Read, limit: CallLimit) -> Answer:
        limit.waiting_for = f"one of {self._settings.concurrency} slots"
        tried = told = 0
        async with self._slots:
            while True:
                try:
                    return await self._attempt(request, read, limit)
                except PolicyError:
                    raise
                except Exception as error:
                    limit.last = failure = error
                # Out of the handler: an error that is raised there would carry the endpoint's own words as its context.
                if not passes(failure):
                    raise self._failure(failure, request.prompts, tried + 1)
                asked_s = asked_wait_s(failure) if getattr(failure, "status_code", None) == 429 else None
                if asked_s is not None:
                    self.counts["rate_limited"] += 1
                    self._limiter.pause(asked_s)
                    told += 1
                    if asked_s >= _FREE_WAIT_S or told <= _FREE_WAITS:
                        self.counts["retries"] += 1
                        continue  # `admit` holds us all, until the caller's time is up
                self._failed += 1
                dead_s = time.monotonic() - (self._failing_since_s or time.monotonic())
                if dead_s >= self._settings.retries.window_s and self._failed > self._settings.retries.spare:
                    raise EndpointGoneError(
                        f"{self.where} is given up: none of {self._failed} requests was answered in {dead_s:.0f} s; "
                        f"the last one: {self._describe(failure, request.prompts)}"
                    )
                if tried >= self._settings.retries.per_call:
                    raise self._failure(failure, request.prompts, tried + 1)
                if not self._budget.allow_retry():
                    if self._failed <= self._settings.retries.spare:  # others are answered
                        raise self._failure(failure, request.prompts, tried + 1, f"; given up, since {self._budget}")
                    if not self._limiter.paused_s:
                        # At most about ten probes until it is given up.
                        self._limiter.pause(max(dead_s / 4, self._settings.retries.window_s / 40))
                    self.counts["retries"] += 1
                    limit.waiting_for = "an endpoint that answers nothing"
                    continue
                self.counts["retries"] += 1
                limit.waiting_for = "its next try"
                await asyncio.sleep(delay_s(failure, tried))
                tried += 1

    async def _attempt(self, request: Request, read: Read, limit: CallLimit) -> Answer:
        most_tokens = request.most_prompt_tokens + request.most_completion_tokens
        paused_s = self._limiter.paused_s
        limit.waiting_for = f"the {paused_s:.1f} s that the endpoint asked for" if paused_s else "the rate limit"
        await self._limiter.admit(most_tokens)
        reservation = await self._reserve(request, limit)
        limit.waiting_for = "an answer"
        self.counts["requests"] += 1
        self._budget.request()
        reply: Reply | None = None
        usage: ReplyUsage | None = None
        failure: Exception | None = None
        try:
            reply = read(await (self._streamed(request) if request.stream else self._posted(request)))
            usage = reply.usage
            self._failing_since_s, self._failed = None, 0
        except (UnusableAnswerError, WithheldError) as error:
            failure, usage = error, error.usage
        except Exception as error:
            failure = error
        except BaseException:  # the caller gave up: what was asked for must not stay reserved
            await asyncio.shield(self._settle(reservation, None, lost=True))
            raise
        if failure is not None and self._failing_since_s is None:
            self._failing_since_s = time.monotonic()
        lost = getattr(failure, "status_code", None) is None
        if usage is not None and not usage.prompt_tokens + usage.completion_tokens:
            # It does not tell: a good answer is counted by its worst case, a bad one is lost.
            usage = None if reply is None else _most(request, reply)
        if usage is not None or not lost:
            self._limiter.used(most_tokens, usage.prompt_tokens + usage.completion_tokens if usage else 0)
        cost_usd = await asyncio.shield(self._settle(reservation, usage, lost=lost))
        if failure is not None:
            raise failure
        assert reply is not None
        return Answer(reply=reply, cost_usd=cost_usd)

    async def _reserve(self, request: Request, limit: CallLimit) -> str | None:
        if self._meter is None:
            return None
        limit.waiting_for = "room under the spend cap"
        prices = self._settings.prices
        most = Charge(
            model=self._model,
            prompt_tokens=request.most_prompt_tokens,
            completion_tokens=request.most_completion_tokens,
            usd=prices.most_usd(request.most_prompt_tokens, request.most_completion_tokens) if prices else None,
        )
        return await self._meter.reserve(most, lease_s=self._settings.timeout_s + _LEASE_SLACK_S)

    async def _settle(self, reservation: str | None, usage: ReplyUsage | None, *, lost: bool) -> float:
        prices = self._settings.prices
        cost_usd = 0.0
        if usage is not None:
            if prices is not None:
                cost_usd = prices.usd(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens)
            self.counts["prompt_tokens"] += usage.prompt_tokens
            self.counts["generated_tokens"] += usage.completion_tokens
            self.counts["cost_usd"] += cost_usd
        if self._meter is not None and reservation is not None:
            if usage is None:
                await self._meter.release(reservation, lost=lost)
            else:
                charge = Charge(
                    model=self._model,
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                    usd=cost_usd if prices is not None else None,
                )
                await self._meter.settle(reservation, charge)
        return cost_usd

    # -- the wire

    async def _posted(self, request: Request) -> dict[str, Any]:
        async with _within(self._settings.timeout_s):
            text = await self._client.post(request.path, cast_to=str, body=dict(request.body()))
        return parse_json(text)

    async def _streamed(self, request: Request) -> dict[str, Any]:
        from openai import AsyncStream

        body = {**request.body(), "stream": True, "stream_options": {"include_usage": True}}
        parts = ChatStream()
        async with _within(self._settings.timeout_s):
            stream = await self._client.post(
                request.path, cast_to=object, body=body, stream=True, stream_cls=AsyncStream[object]
            )
        async with stream:
            events = stream.__aiter__()
            while True:
                try:
                    async with _within(self._settings.timeout_s):
                        event = await anext(events)
                except StopAsyncIteration:
                    break
                if isinstance(event, Mapping):
                    parts.add(event)
        return parts.body()

    # -- failures

    def _failure(self, error: Exception, prompts: tuple[str, ...], attempts: int = 1, why: str = "") -> PolicyError:
        status, said = getattr(error, "status_code", None), self._describe(error, prompts)
        code = str(getattr(error, "code", None) or "")
        if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached"):
            return BudgetExceeded(f"{self.where} says that its quota is used up: {said}")
        flagged = status == 403 and re.search(r"moderation|flagged", str(error), re.IGNORECASE) is not None
        if isinstance(error, WithheldError) or flagged or code in ("content_filter", "content_policy_violation"):
            return PolicyError(f"{self.where} withholds the answer: {said}", FailureClass.MODEL)
        if status in (401, 403):
            message = f"{self.where} refuses the key in {self._settings.api_key_env}: {said}"
            return EndpointGoneError(message, FailureClass.INPUT)
        if status == 404:
            message = f"{self.where} refuses the request: {said}; is the model's name right, and base_url?"
            return EndpointGoneError(message, FailureClass.INPUT)
        if too_long(error):
            return PolicyError(f"{self.where}: the prompt is too long: {said}", FailureClass.LIMIT)
        if status is not None and 400 <= status < 500 and not passes(error):
            # The endpoint's words, too: they may repeat what was asked.
            parameter = self._redact(str(getattr(error, "param", None) or ""), prompts)
            return RequestRefused(
                f"{self.where} refuses the request: {said}",
                status=status,
                reason=said,
                parameter=parameter,
                code=self._redact(code, prompts),
            )
        times = "once" if attempts == 1 and why else f"{attempts} times"
        return PolicyError(f"{self.where} failed, tried {times}: {said}{why}")

    def _describe(self, error: Exception | None, prompts: tuple[str, ...] = ()) -> str:
        if error is None:
            return ""
        text = str(error)
        cause = error.__cause__ or error.__context__
        if getattr(error, "status_code", None) is None and cause is not None and str(cause):
            text += f" ({cause})"
        return self._redact(text or type(error).__name__, prompts)[:500]


@asynccontextmanager
async def _within(timeout_s: float) -> AsyncIterator[None]:
    """Raises `LateError`; the caller's own time limit stays a cancellation."""
    late = False
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        late = True
    if late:
        raise LateError(f"no answer within {timeout_s:g} s")


def _most(request: Request, reply: Reply) -> ReplyUsage:
    """Of an endpoint that does not tell what an answer cost: the prompt at its most, and a token for each character
    that was said, or all that it might have sampled."""
    said = sum(len(choice.text) for choice in reply.choices)
    return ReplyUsage(
        prompt_tokens=request.most_prompt_tokens, completion_tokens=min(said, request.most_completion_tokens)
    )
