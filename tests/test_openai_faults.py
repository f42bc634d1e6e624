"""`rollout.openai_policy` against a server that fails at random: what is retried, what is given up, what is paid, and
that neither keys nor prompts are told to anybody."""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
import traceback
from collections.abc import Callable, Mapping
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fault_server import FAULTS, FaultServer

from envs.endpoints import asked_wait_s
from rollout.endpoint_errors import EndpointGoneError
from rollout.openai_policy import OpenAIPolicy
from rollout.policy import PolicyError, Sampling
from rollout.rate_limits import RateLimits, Retries
from rollout.redaction import Redactor
from rollout.spend import BudgetExceeded, Prices, SpendCap, SpendMeter, SpendSnapshot
from rollout.spend_meters import LocalMeter
from rollout.trajectory import Completion, FailureClass, Message

PRICES = Prices(prompt_usd_per_million=1.0, completion_usd_per_million=2.0)
KEY = "sk-secret-0123456789abcdef"
PROMPT = "The launch code of the lighthouse is PLOVER-7731; which bird is that?"


def question(i: int) -> list[Message]:
    return [Message(role="user", content=f"What is {i} * {i}?")]


def echo(request: Mapping[str, Any]) -> str:
    return f"You asked: {request['messages'][-1]['content']}"


def ask(
    server: FaultServer | str, calls: int, sampling: Sampling | None = None, **settings: Any
) -> tuple[list[list[Completion] | PolicyError], OpenAIPolicy]:
    """So many calls at once; what each gave."""
    base_url = server if isinstance(server, str) else server.base_url
    settings = {"timeout_s": 0.5, "concurrency": 64, **settings}
    policy = OpenAIPolicy("m", base_url=base_url, **settings)

    async def call(i: int) -> list[Completion] | PolicyError:
        try:
            return await policy.complete(question(i), sampling or Sampling(timeout_s=30))
        except PolicyError as error:
            return error

    async def scenario() -> list[list[Completion] | PolicyError]:
        try:
            async with asyncio.timeout(60):
                return await asyncio.gather(*(call(i) for i in range(calls)))
        finally:
            await policy.close()

    return asyncio.run(scenario()), policy


def good(results: list[list[Completion] | PolicyError]) -> list[list[Completion]]:
    for result in results:
        if isinstance(result, PolicyError):
            raise result
    return [result for result in results if isinstance(result, list)]


def only_error(results: list[list[Completion] | PolicyError]) -> PolicyError:
    [result] = results
    assert isinstance(result, PolicyError)
    return result


# -- faults


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_every_call_gets_its_own_answer_with_30_percent_faults(stream: bool) -> None:
    with FaultServer(echo, share=0.3, seed=1, slow_s=5.0) as server:
        meter = LocalMeter(SpendMeter(SpendCap(usd=1.0)))
        results, policy = ask(server, 100, stream=stream, meter=meter, prices=PRICES)
        assert server.faults_injected.total() > 20
    assert [result[0].text if isinstance(result, list) else result for result in results] == [
        f"You asked: What is {i} * {i}?" for i in range(100)
    ]
    spent = asyncio.run(meter.snapshot())
    assert spent.reserved_usd == 0.0
    # What the server billed, but for answers that came when nobody waited any more.
    assert policy.stats()["prompt_tokens"] + policy.stats()["generated_tokens"] == spent.tokens
    assert server.billed_tokens - 60 * server.faults_injected["slow"] <= spent.tokens <= server.billed_tokens + 60
    assert spent.lost_requests >= server.faults_injected["slow"] + server.faults_injected["drop"]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_is_an_engine_failure_in_the_end(fault: str) -> None:
    with FaultServer(echo, faults=[fault], share=1.0, slow_s=5.0, retry_after_s=0.001) as server:
        error = only_error(ask(server, 1, max_retries=1, timeout_s=0.2)[0])
        assert server.requests >= 2
    assert error.failure_class is FailureClass.ENGINE
    assert "tried 2 times" in str(error)


@pytest.mark.parametrize("fault", ["drop", "no_choices", "null_content", "500"])
def test_a_stream_that_fails_is_tried_again(fault: str) -> None:
    with FaultServer(echo, faults=[fault], share=0.5, seed=2) as server:
        results, policy = ask(server, 5, stream=True, timeout_s=20)
        assert server.faults_injected[fault] >= 1
    good(results)
    assert policy.stats()["retries"] == server.faults_injected[fault]


def test_a_stream_of_several_choices_is_put_together() -> None:
    with FaultServer(lambda request: ["first answer", "second answer"], share=0) as server:
        results, _ = ask(server, 1, Sampling(n=2, temperature=1.0), stream=True)
    assert [each.text for each in good(results)[0]] == ["first answer", "second answer"]


def test_a_dead_endpoint_is_given_up_soon_by_all_calls_and_no_task_is_blamed() -> None:
    with FaultServer(echo, faults=["503"], share=1.0) as server:
        results, policy = ask(server, 80, retries=Retries(per_call=50, share=0.2, spare=5, window_s=1.0))
        assert server.requests < 80 * 3  # each once, a share again, a few probes
    errors = [result for result in results if isinstance(result, PolicyError)]
    assert len(errors) == 80
    assert {type(error) for error in errors} == {EndpointGoneError}
    assert {(error.failure_class, error.ends_collection) for error in errors} == {(FailureClass.ENGINE, True)}
    assert "is given up: none of " in str(errors[0])
    assert "503" in str(errors[0])


def test_an_endpoint_that_comes_back_is_gone_on_with() -> None:
    class Restarting(FaultServer):
        async def _post(self, path: str, request: Any, authorization: str, writer: Any) -> bool:
            self._share = 1.0 if time.monotonic() - began < 1.0 else 0.0
            return await super()._post(path, request, authorization, writer)

    began = time.monotonic()
    with Restarting(echo, faults=["503"]) as server:
        results, _ = ask(server, 40, retries=Retries(per_call=50, share=0.1, spare=5, window_s=20.0))
    good(results)


def test_calls_beyond_the_retry_budget_end_while_others_are_answered() -> None:
    with FaultServer(echo, faults=["500"], share=0.5, seed=5) as server:
        results, _ = ask(server, 30, concurrency=1, retries=Retries(per_call=50, share=0.2, spare=4))
    errors = [str(result) for result in results if isinstance(result, PolicyError)]
    assert 0 < len(errors) < 30
    assert all("given up, since" in error and "retries.share=0.2" in error for error in errors)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_would_fail_every_call_blames_no_task(status: int) -> None:
    class Closed(FaultServer):
        async def _post(self, path: str, request: Any, authorization: str, writer: Any) -> bool:
            from fault_server import _send

            _send(writer, status, {"error": {"message": "no"}})
            return True

    with Closed() as server:
        error = only_error(ask(server, 1)[0])
        assert server.requests == 1
    assert (error.failure_class, error.ends_collection) == (FailureClass.INPUT, True)


def test_a_429_that_says_how_long_holds_the_whole_client() -> None:
    with FaultServer(echo, faults=["429"], share=0.2, seed=3, retry_after_s=0.1) as server:
        results, policy = ask(server, 40, concurrency=4, max_retries=0)
    good(results)  # no try was used up by a wait that was asked for
    assert policy.stats()["rate_limited"] == server.faults_injected["429"] >= 1
    # Calls that go out while others wait would be refused too: a few were under way, no more.
    assert server.requests <= 40 + 4 * server.faults_injected["429"]


def test_a_rate_limit_of_requests_is_kept() -> None:
    with FaultServer(echo, share=0) as server:
        results, _ = ask(server, 3, Sampling(timeout_s=0.5), rate_limits=RateLimits(requests_per_minute=6))
        assert server.requests == 1
    late = [str(result) for result in results if isinstance(result, PolicyError)]
    assert len(late) == 2
    assert all("timeout_s=0.5; it waited for the rate limit" in text for text in late)


class _Told(Exception):
    def __init__(self, retry_after: str) -> None:
        self.response = SimpleNamespace(headers={"retry-after": retry_after} if retry_after else {})


@pytest.mark.parametrize(
    ("said", "wait_s"),
    [("2.5", 2.5), ("-1", 0.0), ("", None), ("soon", None), ("nan", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)],
)
def test_a_wait_is_read_from_seconds_and_dates(said: str, wait_s: float | None) -> None:
    assert asked_wait_s(_Told(said)) == wait_s


def test_a_date_ahead_is_waited_for() -> None:
    wait_s = asked_wait_s(_Told(formatdate(time.time() + 100, usegmt=True)))
    assert wait_s is not None
    assert 90 < wait_s <= 100


# -- money


def test_a_spend_cap_stops_the_calls_and_is_not_exceeded(tmp_path: Path) -> None:
    path = tmp_path / "spend.jsonl"
    with FaultServer(echo, share=0.2, faults=["500", "drop"], seed=4) as server:
        meter = SpendMeter(SpendCap(tokens=3000), path)
        sampling = Sampling(max_tokens=64, timeout_s=30)
        results, _ = ask(server, 300, sampling, meter=LocalMeter(meter), prices=PRICES)
        spent = meter.snapshot()
        meter.close()
        stopped = [result for result in results if isinstance(result, PolicyError)]
        assert {type(error) for error in stopped} == {BudgetExceeded}
        assert 2700 < spent.tokens <= 3000
        assert spent.requests == sum(isinstance(result, list) for result in results)
        # A resumed job knows, and goes on where the cap is higher.
        resumed = SpendMeter(SpendCap(tokens=3000), path)
        too_long = Sampling(max_tokens=300, timeout_s=30)
        assert isinstance(only_error(ask(server, 1, too_long, meter=LocalMeter(resumed))[0]), BudgetExceeded)
        resumed.close()
        higher = SpendMeter(SpendCap(tokens=6000), path)
        results, _ = ask(server, 1, too_long, meter=LocalMeter(higher), prices=PRICES)
        higher.close()
    assert isinstance(results[0], list)


def test_candidates_share_what_their_request_cost() -> None:
    with FaultServer(lambda request: "four", share=0) as server:
        results, policy = ask(server, 1, Sampling(n=4, temperature=1.0), prices=PRICES)
        [sampled] = good(results)
        [greedy] = good(ask(server, 1, Sampling(n=4), prices=PRICES)[0])
    assert sum(each.cost_usd for each in sampled) == pytest.approx(policy.stats()["cost_usd"])
    assert PRICES.usd(sampled[0].prompt_tokens, sum(each.completion_tokens for each in sampled)) == pytest.approx(
        policy.stats()["cost_usd"]
    )
    assert sum(each.cost_usd for each in greedy) == pytest.approx(
        PRICES.usd(greedy[0].prompt_tokens, greedy[0].completion_tokens)
    )


def test_a_cap_in_money_without_prices_is_told_by_check() -> None:
    with FaultServer(share=0) as server:
        meter = LocalMeter(SpendMeter(SpendCap(usd=1.0)))
        policy = OpenAIPolicy("m", base_url=server.base_url, meter=meter)

        async def scenario() -> None:
            try:
                await policy.check()
            finally:
                await policy.close()

        with pytest.raises(PolicyError, match="the spend cap is 1 USD, but model 'm' has no prices"):
            asyncio.run(scenario())


class _SlowMeter:
    """Has no room, for ever."""

    async def reserve(self, most: Any, *, lease_s: float = 0) -> str:
        await asyncio.sleep(3600)
        return ""

    async def settle(self, reservation: str, charge: Any) -> None: ...

    async def release(self, reservation: str, *, lost: bool = False) -> None: ...

    async def snapshot(self) -> SpendSnapshot:
        raise AssertionError


def test_a_wait_for_the_meter_has_a_limit() -> None:
    with FaultServer(share=0) as server:
        error = only_error(ask(server, 1, Sampling(timeout_s=0.3), meter=_SlowMeter())[0])
    assert "timeout_s=0.3; it waited for room under the spend cap" in str(error)


# -- fields that a server refuses


REFUSED: dict[str, Sampling] = {
    "seed": Sampling(seed=1),
    "logprobs": Sampling(logprobs=True),
    "stop": Sampling(stop=("<end>",)),
    "temperature": Sampling(temperature=0.5),
    "top_p": Sampling(top_p=0.5),
    "top_k": Sampling(top_k=20),
    "n": Sampling(n=2, temperature=1.0),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_refused_is_left_out_from_then_on_and_said_once(
    field: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultServer(lambda r: "yes<end> and", share=0, refuse=lambda r: field if field in r else None) as server:
        results, policy = ask(server, 3, REFUSED[field], concurrency=1)
        assert sum(field in body for body in server.bodies) == 1
    good(results)
    [note] = policy.notes
    assert f"the field '{field}' is left out" in note
    assert [record.getMessage() for record in caplog.records if record.name == "rollout.openai_policy"] == [
        f"m at {policy.base_url}: {note}"
    ]
    assert policy.stats()["left_out"] == 1


def test_turns_are_cut_here_where_the_server_takes_no_stop_strings() -> None:
    with FaultServer(lambda r: "print(1)<end> tail", share=0, refuse=lambda r: "stop" if "stop" in r else None) as s:
        [result] = good(ask(s, 1, Sampling(stop=("</s>", "<end>")))[0])
    assert result[0].text == "print(1)<end>"
    assert result[0].finish_reason == "stop"


def test_stop_strings_beyond_what_the_api_takes_are_kept_too() -> None:
    with FaultServer(lambda r: "a E b", share=0) as server:
        [result] = good(ask(server, 1, Sampling(stop=("A", "B", "C", "D", "E")))[0])
        assert server.bodies[0]["stop"] == ["A", "B", "C", "D"]
    assert result[0].text == "a E"


@pytest.mark.parametrize("refused", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_tokens_is_never_left_out(refused: str) -> None:
    with FaultServer(share=0, refuse=lambda r: refused if refused in r else None) as server:
        results, _ = ask(server, 2, Sampling(max_tokens=9), concurrency=1)
        names = [sorted(set(body) & {"max_tokens", "max_completion_tokens"}) for body in server.bodies]
    good(results)
    sent = [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]
    assert names == (sent if refused == "max_tokens" else [["max_tokens"]] * 2)


def test_a_server_that_takes_neither_name_is_an_error() -> None:
    def refuse(request: Mapping[str, Any]) -> str:
        return "max_tokens" if "max_tokens" in request else "max_completion_tokens"

    with FaultServer(share=0, refuse=refuse) as server:
        error = only_error(ask(server, 1)[0])
        assert server.requests == 2
    assert error.failure_class is FailureClass.INPUT


def test_several_fields_are_left_out_one_after_the_other() -> None:
    def refuse(request: Mapping[str, Any]) -> str | None:
        return next((field for field in ("temperature", "top_p", "stop", "max_tokens") if field in request), None)

    with FaultServer(share=0, refuse=refuse) as server:
        results, policy = ask(server, 20, Sampling(stop=("x",), temperature=1.0))
    good(results)
    assert len(policy.notes) == 4  # once each, though 20 calls were refused at the same time


def test_a_server_that_says_vllm_and_continues_nothing_is_asked_in_words() -> None:
    def refuse(request: Mapping[str, Any]) -> str | None:
        return "continue_final_message" if "continue_final_message" in request else None

    with FaultServer(lambda r: "Thought: this is easy", share=0, vllm=True, refuse=refuse) as server:
        policy = OpenAIPolicy("m", base_url=server.base_url)

        async def scenario() -> list[Completion]:
            try:
                return await policy.complete(question(1), Sampling(), prefix="Thought: this")
            finally:
                await policy.close()

        [completion] = asyncio.run(scenario())
    assert (completion.text, completion.prefix_by) == ("Thought: this is easy", "asked")


def test_a_bad_value_of_a_good_field_is_an_error_and_not_left_out() -> None:
    class Strict(FaultServer):
        async def _post(self, path: str, request: Any, authorization: str, writer: Any) -> bool:
            from fault_server import _send

            _send(writer, 400, {"error": {"message": "temperature must be in [0, 2], got 7.0", "param": "temperature"}})
            return True

    with Strict() as server:
        results, policy = ask(server, 1, Sampling(temperature=7.0))
    assert only_error(results).failure_class is FailureClass.INPUT
    assert policy.notes == ()


REFUSALS = {
    "OpenAI": "Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) value is "
    "supported.",
    "Azure": "Unrecognized request argument supplied: temperature",
    "Mistral": "{'type': 'extra_forbidden', 'loc': ['body', 'temperature'], 'msg': 'Extra inputs are not permitted'}",
    "Groq": "property 'temperature' is unsupported",
}


@pytest.mark.parametrize("provider", REFUSALS)
def test_providers_say_in_many_ways_that_a_field_is_unwelcome(provider: str) -> None:
    class Provider(FaultServer):
        async def _post(self, path: str, request: Any, authorization: str, writer: Any) -> bool:
            from fault_server import _send

            if "temperature" not in request:
                return await super()._post(path, request, authorization, writer)
            _send(writer, 422 if provider == "Mistral" else 400, {"error": {"message": REFUSALS[provider]}})
            return True

    with Provider(share=0) as server:
        results, policy = ask(server, 1, Sampling(temperature=0.2))
    good(results)
    assert len(policy.notes) == 1


def test_extra_fields_go_out_with_each_request_and_are_not_left_out() -> None:
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda r: "seed" if r.get("seed") == 7 else None  # noqa: E731
    with FaultServer(share=0, refuse=refuse) as server:
        ask(server, 1, extra_body={"reasoning_effort": "low"})
        assert server.bodies[0]["reasoning_effort"] == "low"
        assert "refuses the request" in str(only_error(ask(server, 1, extra_body={"seed": 7})[0]))


# -- what is withheld, and what is used up


def test_a_provider_whose_quota_is_used_up_ends_the_collection() -> None:
    class Poor(FaultServer):
        async def _post(self, path: str, request: Any, authorization: str, writer: Any) -> bool:
            from fault_server import _send

            _send(writer, 402, {"error": {"message": "Insufficient Balance"}})
            return True

    with Poor() as server:
        error = only_error(ask(server, 1)[0])
    assert isinstance(error, BudgetExceeded)
    assert "its quota is used up: Error code: 402 - Insufficient Balance" in str(error)


def test_an_answer_that_its_provider_withholds_is_the_models_failure() -> None:
    class Prudish(FaultServer):
        def _choice(self, index: int, text: str, request: Mapping[str, Any], chat: bool) -> dict[str, Any]:
            return {"index": 0, "finish_reason": "content_filter", "message": {"role": "assistant", "content": None}}

    with Prudish(share=0) as server:
        error = only_error(ask(server, 1)[0])
        assert server.requests == 1
    assert error.failure_class is FailureClass.MODEL


# -- keys and prompts


def told(error: BaseException) -> str:
    """All that an error can tell: its text, its traceback, what it was caused by, and its pickle."""
    parts = ["".join(traceback.format_exception(error)), repr(error), str(vars(error)), repr(pickle.dumps(error))]
    seen: BaseException | None = error
    while seen is not None:
        parts.append(f"{seen!r} {seen.args} {vars(seen)}")
        seen = seen.__cause__ or seen.__context__
    return "\n".join(parts)


@pytest.mark.parametrize("fault", [*FAULTS, "refused", "unauthorized", "late"])
def test_neither_key_nor_prompt_is_told_to_anybody(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "openai._base_client", "httpx", "httpx2", "httpcore", "httpcore2", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    faults = [fault] if fault in FAULTS else ["503"]
    meter = SpendMeter(SpendCap(usd=1.0), tmp_path / "spend.jsonl")
    with FaultServer(
        lambda request: "a lapwing",
        faults=faults,
        share=0.0 if fault == "refused" else 1.0,
        slow_s=5.0,
        key="another" if fault == "unauthorized" else KEY,
        refuse=lambda request: "messages" if fault == "refused" else None,
    ) as server:
        policy = OpenAIPolicy(
            "m",
            base_url=server.base_url,
            api_key_env="TEACHER_KEY",
            timeout_s=0.2,
            retries=Retries(per_call=9 if fault == "late" else 1),
            meter=LocalMeter(meter),
            prices=PRICES,
            cache_path=str(tmp_path / "cache.sqlite"),
        )

        async def scenario() -> PolicyError:
            messages = [Message(role="system", content="Guard this."), Message(role="user", content=PROMPT)]
            try:
                await policy.complete(messages, Sampling(timeout_s=0.3 if fault == "late" else 20), prefix="I know: ")
            except PolicyError as error:
                return error
            finally:
                await policy.close()
            raise AssertionError("it must fail")

        error = asyncio.run(scenario())
    meter.close()
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    logs = "\n".join(f"{record.getMessage()} {record.args} {record.exc_text}" for record in caplog.records)
    for secret in (KEY, KEY[3:17], "PLOVER-7731", "lighthouse"):
        assert secret not in told(error)
        assert secret not in logs
        assert secret.encode() not in files


def test_an_error_keeps_its_own_words() -> None:
    redact = Redactor(KEY)
    assert redact("Error code: 400 - 'stop' must be short", [PROMPT]) == "Error code: 400 - 'stop' must be short"
    assert redact(f"bad input {PROMPT!r}, sorry", [PROMPT]) == "bad input [...], sorry"


@pytest.mark.parametrize(
    "text",
    [f"key {KEY} is bad", f"key {KEY[:9]}***{KEY[-4:]} is bad", "Bearer abc.def is bad", "sk-other-0123456 is bad"],
)
def test_keys_whole_and_shortened_are_taken_out(text: str) -> None:
    redacted = Redactor(KEY)(text)
    assert redacted.endswith("[...] is bad")
    assert "sk-" not in redacted


@pytest.mark.parametrize("prompt", ['say "hi" to\nthem all at once', "grüße an alle Vögel im Süden", "a" * 40, "short"])
def test_prompts_are_taken_out_also_escaped_and_in_part(prompt: str) -> None:
    import json

    redact = Redactor()
    for form in (prompt, json.dumps(prompt), repr(prompt), json.dumps(prompt, ensure_ascii=False)):
        redacted = redact(f"invalid: {form} end", [prompt])
        assert redacted.startswith("invalid: ")
        assert redacted.endswith(" end")
        assert prompt[:5] not in redacted
