"""`rollout.openai_policy` against a small server on a free loopback port that fails as it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from loopback_server import Answer, AnsweringHandler, LoopbackServer

from rollout.openai_policy import OpenAIPolicy
from rollout.policy import PolicyError, Sampling
from rollout.trajectory import Completion, FailureClass, Message

MESSAGES = [Message(role="system", content="You act."), Message(role="user", content="What is 6 * 7?")]
T = TypeVar("T")


def answer(body: Any, status: int = 200, **headers: str) -> Answer:
    return status, {"content-type": "application/json", **headers}, json.dumps(body).encode()


def choice(text: str | None, **more: Any) -> dict[str, Any]:
    return {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        **more,
    }


def chat(*choices: dict[str, Any]) -> Answer:
    usage = {"prompt_tokens": 11, "completion_tokens": 7 * len(choices), "total_tokens": 0}
    return answer(
        {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": list(choices), "usage": usage}
    )


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Answer:
    return answer({"error": {"message": message, "type": "t", "code": code}}, status, **headers)


def models(*names: str, owner: str) -> Answer:
    return answer({"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner} for name in names]})


class Endpoint(LoopbackServer):
    """What the server says: `script` in order, then `reply(request)` for ever."""

    def __init__(self) -> None:
        self.script: list[Answer | float] = []
        """Answers; a number is silence for that many seconds."""
        self.reply: Callable[[dict[str, Any]], Answer] = lambda request: chat(choice("Thought: 42"))
        self.models: Answer = models("m", owner="somebody")
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(AnsweringHandler):
            def do_GET(self) -> None:
                endpoint.keys.append(self.headers.get("authorization", ""))
                self.send(endpoint.models)

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.keys.append(self.headers.get("authorization", ""))
                with endpoint._lock:
                    endpoint.requests.append(request)
                    step = endpoint.script.pop(0) if endpoint.script else endpoint.reply(request)
                    endpoint._now += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._now)
                if isinstance(step, float):
                    time.sleep(step)
                    step = chat(choice("too late"))
                with endpoint._lock:
                    endpoint._now -= 1
                self.send(step)

        super().__init__(Handler)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


def run(policy: OpenAIPolicy, coroutine: Coroutine[Any, Any, T]) -> T:
    async def scenario() -> T:
        try:
            return await asyncio.wait_for(coroutine, 30)
        finally:
            await policy.close()

    return asyncio.run(scenario())


def complete(
    endpoint: Endpoint, sampling: Sampling | None = None, prefix: str = "", **settings: Any
) -> tuple[list[Completion], OpenAIPolicy]:
    policy = OpenAIPolicy("m", base_url=endpoint.url, **settings)
    return run(policy, policy.complete(MESSAGES, sampling or Sampling(), prefix=prefix)), policy


def refused(endpoint: Endpoint, sampling: Sampling | None = None, **settings: Any) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        complete(endpoint, sampling, **settings)
    return caught.value


# -- answers


def test_a_conversation_goes_out_and_a_turn_with_its_cost_comes_back(endpoint: Endpoint) -> None:
    [completion], policy = complete(endpoint, Sampling(max_tokens=9, temperature=0.5, top_p=0.9, top_k=20, seed=1))
    assert completion.text == "Thought: 42"
    assert (completion.prompt_tokens, completion.completion_tokens, completion.finish_reason) == (11, 7, "stop")
    assert completion.token_ids is None
    [request] = endpoint.requests
    assert request["messages"] == [
        {"role": "system", "content": "You act."},
        {"role": "user", "content": "What is 6 * 7?"},
    ]
    assert (request["max_tokens"], request["temperature"]) == (9, 0.5)
    assert (request["top_p"], request["top_k"]) == (0.9, 20)
    assert policy.stats() == {
        "requests": 1,
        "retries": 0,
        "rate_limited": 0,
        "cached": 0,
        "prompt_tokens": 11,
        "generated_tokens": 7,
        "cost_usd": 0,
        "left_out": 0,
        "running": 0,
    }


def test_n_candidates_come_from_one_request_where_the_server_takes_n(endpoint: Endpoint) -> None:
    endpoint.reply = lambda request: chat(*(choice(f"c{i}") for i in range(request.get("n", 1))))
    completions, _ = complete(endpoint, Sampling(n=3, temperature=1.0))
    assert [each.text for each in completions] == ["c0", "c1", "c2"]
    assert sum(each.completion_tokens for each in completions) == 21
    assert len(endpoint.requests) == 1


def test_a_server_that_returns_fewer_is_asked_again_with_other_seeds(endpoint: Endpoint) -> None:
    completions, _ = complete(endpoint, Sampling(n=3, temperature=1.0, seed=5))
    assert len(completions) == 3
    assert len(endpoint.requests) == 3
    assert len({request["seed"] for request in endpoint.requests}) == 3


def test_a_server_that_refuses_n_is_asked_for_one_at_a_time(endpoint: Endpoint) -> None:
    endpoint.reply = lambda request: error(400, "n must be 1") if "n" in request else chat(choice("one"))
    completions, _ = complete(endpoint, Sampling(n=3, temperature=1.0))
    assert [each.text for each in completions] == ["one"] * 3
    assert len(endpoint.requests) == 4


def test_greedy_candidates_cost_one_request(endpoint: Endpoint) -> None:
    completions, _ = complete(endpoint, Sampling(n=4, temperature=0.0))
    assert len(completions) == 4
    assert len(endpoint.requests) == 1


def test_the_stop_string_that_the_server_met_is_part_of_the_turn(endpoint: Endpoint) -> None:
    endpoint.script = [chat(choice("print(1)", stop_reason="<end>")), chat(choice("The end.", stop_reason=None))]
    met, _ = complete(endpoint, Sampling(stop=("</s>", "<end>")))
    by_itself, _ = complete(endpoint, Sampling(stop=("</s>", "<end>")))
    assert [met[0].text, by_itself[0].text] == ["print(1)<end>", "The end."]


def test_a_server_that_does_not_tell_gets_the_first_stop_string_put_back(endpoint: Endpoint) -> None:
    endpoint.script = [chat(choice("print(1)")), chat(choice("print(", finish_reason="length"))]
    stopped, _ = complete(endpoint, Sampling(stop=("<end>",)))
    cut, _ = complete(endpoint, Sampling(stop=("<end>",)))
    assert [stopped[0].text, cut[0].text] == ["print(1)<end>", "print("]
    assert cut[0].finish_reason == "length"


# -- prefixes


def test_vllm_is_told_to_continue_the_prefix(endpoint: Endpoint) -> None:
    endpoint.models = models("m", owner="vllm")
    endpoint.reply = lambda request: chat(choice(" is easy"))
    [completion], policy = complete(endpoint, prefix="Thought: this")
    assert completion.text == "Thought: this is easy"
    [request] = endpoint.requests
    assert request["messages"][-1] == {"role": "assistant", "content": "Thought: this"}
    assert (request["continue_final_message"], request["add_generation_prompt"]) == (True, False)
    assert policy.prefill_used == "continue"


@pytest.mark.parametrize(
    "reply", ["Thought: this is easy", " is easy", "\nThought: this is easy"], ids=["repeated", "continued", "spaced"]
)
def test_other_servers_are_asked_to_begin_with_the_prefix_and_it_is_there_once(endpoint: Endpoint, reply: str) -> None:
    endpoint.reply = lambda request: chat(choice(reply))
    [completion], policy = complete(endpoint, prefix="Thought: this")
    assert completion.text == "Thought: this is easy"
    [request] = endpoint.requests
    assert request["messages"][-1]["content"] == ("What is 6 * 7?\n\nBegin your answer exactly with: Thought: this")
    assert "continue_final_message" not in request
    assert policy.prefill_used == "none"


def test_a_last_assistant_message_carries_the_prefix_when_told_so(endpoint: Endpoint) -> None:
    endpoint.reply = lambda request: chat(choice(" is easy"))
    [completion], _ = complete(endpoint, prefix="Thought: this", prefill="message")
    assert completion.text == "Thought: this is easy"
    assert endpoint.requests[0]["messages"][-1] == {"role": "assistant", "content": "Thought: this"}


def test_an_endpoint_without_a_model_list_is_none_that_continues(endpoint: Endpoint) -> None:
    endpoint.models = error(404)
    endpoint.reply = lambda request: chat(choice("P and on"))
    [completion], policy = complete(endpoint, prefix="P")
    assert (completion.text, policy.prefill_used) == ("P and on", "none")


# -- failures that pass


FAILURES: dict[str, Answer] = {
    "overloaded": error(429),
    "broken": error(500),
    "unavailable": error(503),
    "no json": (200, {"content-type": "application/json"}, b"<html>{"),
    "a page": (200, {"content-type": "text/html"}, b"<html>Bad gateway</html>"),
    "no choices": chat(),
    "null choices": answer({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": None}),
    "no text": chat(choice(None)),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_that_passes_is_tried_again(endpoint: Endpoint, failure: Answer) -> None:
    endpoint.script = [failure]
    [completion], policy = complete(endpoint)
    assert completion.text == "Thought: 42"
    assert (policy.stats()["requests"], policy.stats()["retries"]) == (2, 1)


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_that_does_not_pass_is_an_engine_error_that_counts_the_attempts(
    endpoint: Endpoint, failure: Answer
) -> None:
    endpoint.reply = lambda request: failure
    caught = refused(endpoint, max_retries=1)
    assert "tried 2 times" in str(caught)
    assert caught.failure_class is FailureClass.ENGINE
    assert len(endpoint.requests) == 2


def test_the_wait_that_the_server_asks_for_is_kept(endpoint: Endpoint) -> None:
    endpoint.script = [error(429, retry_after="1.2")]
    began = time.monotonic()
    complete(endpoint)
    assert time.monotonic() - began >= 1.2


def test_an_attempt_that_hangs_is_given_up_and_tried_again(endpoint: Endpoint) -> None:
    endpoint.script = [3.0]
    [completion], policy = complete(endpoint, timeout_s=0.3)
    assert completion.text == "Thought: 42"
    assert policy.stats()["retries"] == 1


def test_a_call_has_a_limit_with_all_its_retries(endpoint: Endpoint) -> None:
    endpoint.reply = lambda request: error(429, retry_after="3600")
    began = time.monotonic()
    caught = refused(endpoint, Sampling(timeout_s=0.5))
    assert "timeout_s=0.5" in str(caught)
    assert time.monotonic() - began < 5


def test_no_more_calls_are_out_than_allowed(endpoint: Endpoint) -> None:
    endpoint.script = [0.05] * 12
    policy = OpenAIPolicy("m", base_url=endpoint.url, concurrency=3)

    async def scenario() -> None:
        await asyncio.gather(*(policy.complete(MESSAGES, Sampling()) for _ in range(12)))

    run(policy, scenario())
    assert endpoint.most_at_once == 3


# -- failures that stay


def test_a_prompt_that_is_too_long_is_a_limit(endpoint: Endpoint) -> None:
    endpoint.reply = lambda request: error(400, "This model's maximum context length is 4096 tokens")
    caught = refused(endpoint)
    assert caught.failure_class is FailureClass.LIMIT
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_the_endpoint_refuses_is_bad_input_and_not_tried_again(endpoint: Endpoint, status: int) -> None:
    endpoint.reply = lambda request: error(status, "no such model")
    caught = refused(endpoint)
    assert caught.failure_class is FailureClass.INPUT
    assert "no such model" in str(caught)
    assert len(endpoint.requests) == 1


def test_a_quota_that_is_used_up_is_not_tried_again(endpoint: Endpoint) -> None:
    endpoint.reply = lambda request: error(429, "pay first", code="insufficient_quota")
    assert "pay first" in str(refused(endpoint))
    assert len(endpoint.requests) == 1


# -- keys


def test_the_key_comes_from_the_named_variable(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    complete(endpoint, api_key_env="TEACHER_KEY")
    assert endpoint.keys == ["Bearer sesame"]


def test_an_endpoint_nearby_needs_no_key(endpoint: Endpoint) -> None:
    complete(endpoint)
    assert endpoint.keys == ["Bearer EMPTY"]
    OpenAIPolicy("m", base_url="http://teacher-0:8000/v1")
    OpenAIPolicy("m", base_url="http://10.0.0.7:8000/v1")


@pytest.mark.parametrize("base_url", [None, "https://api.example.com/v1", "http://8.8.8.8/v1"])
def test_a_missing_key_is_an_error_that_names_the_variable(
    base_url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(PolicyError, match="set the environment variable TEACHER_KEY") as caught:
        OpenAIPolicy("m", base_url=base_url, api_key_env="TEACHER_KEY")
    assert caught.value.failure_class is FailureClass.INPUT


def test_a_refused_key_is_an_error_that_names_the_variable_and_not_the_key(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    endpoint.reply = lambda request: error(401, "bad key")
    caught = refused(endpoint, api_key_env="TEACHER_KEY")
    assert "TEACHER_KEY" in str(caught)
    assert "sesame" not in str(caught)


# -- check


def check(endpoint_url: str) -> OpenAIPolicy:
    policy = OpenAIPolicy("m", base_url=endpoint_url)
    run(policy, policy.check())
    return policy


def test_check_finds_out_how_prefixes_are_given(endpoint: Endpoint) -> None:
    endpoint.models = models("m", owner="vllm")
    assert check(endpoint.url).prefill_used == "continue"


def test_check_passes_an_endpoint_without_a_model_list(endpoint: Endpoint) -> None:
    endpoint.models = error(404)
    check(endpoint.url)


@pytest.mark.parametrize("status", [500, 503])
def test_check_names_an_endpoint_that_is_not_well(endpoint: Endpoint, status: int) -> None:
    endpoint.models = error(status, "starting up")
    with pytest.raises(PolicyError, match=f"teacher endpoint {endpoint.url} does not answer: .*starting up"):
        check(endpoint.url)


def test_check_names_an_endpoint_that_is_not_there(endpoint: Endpoint) -> None:
    endpoint.close()
    began = time.monotonic()
    with pytest.raises(PolicyError, match=f"teacher endpoint {endpoint.url} does not answer: "):
        check(endpoint.url)
    assert time.monotonic() - began < 10


def test_check_names_the_models_that_vllm_serves_instead(endpoint: Endpoint) -> None:
    endpoint.models = models("other", owner="vllm")
    with pytest.raises(PolicyError, match="serves other, not 'm'"):
        check(endpoint.url)


def test_an_unknown_way_of_prefill_is_refused_by_value() -> None:
    with pytest.raises(ValueError, match="'magic' is unknown; there are auto, continue, message, none"):
        OpenAIPolicy("m", base_url="http://127.0.0.1:1/v1", prefill="magic")  # type: ignore[arg-type]
