"""`rollout.vllm_server_policy` against a small server that speaks vLLM's protocol, and, slowly, against vLLM's own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_server import Answer, AnsweringHandler, LoopbackServer

from rollout.openai_policy import OpenAIPolicy
from rollout.policy import Policy, PolicyError, Sampling
from rollout.policy_spec import PolicySpec
from rollout.rendering import Renderer
from rollout.spend import Prices
from rollout.spend_meters import LocalMeter
from rollout.trajectory import Completion, FailureClass, Message
from rollout.vllm_server_policy import VllmServerPolicy

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "learner" / "base_student" / "checkpoint"
MESSAGES = [
    Message(role="system", content="You copy."),
    Message(role="user", content="The box holds: silver 4, harbor 9. What does it hold?"),
]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(CHECKPOINT))


class TokenServer(LoopbackServer):
    """Samples what `says(candidate)` tells it to, as ids, up to a stop string, a stop id or `max_tokens`."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.says: Callable[[int], str] = lambda index: "Thought: it holds silver"
        self.card: dict[str, Any] = {"id": "student", "owned_by": "vllm", "max_model_len": 256}
        self.change: Callable[[dict[str, Any]], None] = lambda answer: None
        self.script: list[Answer] = []
        self.requests: list[dict[str, Any]] = []
        server = self

        class Handler(AnsweringHandler):
            def do_GET(self) -> None:
                self.send(_json({"object": "list", "data": [server.card]}))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.requests.append(request)
                if server.script:
                    return self.send(server.script.pop(0))
                assert self.path == "/v1/completions"
                choices = [server.choice(request, i) for i in range(request["n"])]
                sampled = sum(len(choice["token_ids"]) for choice in choices)
                usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": sampled}
                answer = {"object": "text_completion", "choices": choices, "usage": usage}
                server.change(answer)
                self.send(_json(answer))

        super().__init__(Handler)

    def choice(self, request: dict[str, Any], index: int) -> dict[str, Any]:
        tokenizer = self.renderer.tokenizer
        ids = [*self.renderer._content(self.says(index))[0], self.renderer.stop_token_id]
        reason, stop, text = "length", None, ""
        for end in range(1, min(len(ids), request["max_tokens"]) + 1):
            sampled = ids[:end]
            text = tokenizer.decode(sampled, skip_special_tokens=True)
            met = [each for each in request.get("stop", ()) if each in text]
            if met:
                reason, stop = "stop", met[0]
                text = text[: text.index(stop) + len(stop)]  # the ids stay as sampled
                break
            if sampled[-1] in request["stop_token_ids"]:
                reason = "stop"
                break
        choice = {"index": index, "text": text, "finish_reason": reason, "stop_reason": stop, "token_ids": sampled}
        if "logprobs" in request:
            choice["logprobs"] = {"token_logprobs": [-0.25 * (i + 1) for i in range(len(sampled))]}
        return {**choice, "prompt_token_ids": request["prompt"]}


def _json(body: Any, status: int = 200) -> Answer:
    return status, {"content-type": "application/json"}, json.dumps(body).encode()


@pytest.fixture
def server(renderer: Renderer) -> Iterator[TokenServer]:
    server = TokenServer(renderer)
    yield server
    server.close()


def run(policy: Policy, messages: list[Message], sampling: Sampling, prefix: str = "") -> list[Completion]:
    async def scenario() -> list[Completion]:
        try:
            async with asyncio.timeout(60):
                return await policy.complete(messages, sampling, prefix=prefix)
        finally:
            await policy.close()

    return asyncio.run(scenario())


def complete(server: TokenServer, sampling: Sampling, prefix: str = "", **settings: Any) -> list[Completion]:
    policy = VllmServerPolicy("student", base_url=server.url, tokenizer=str(CHECKPOINT), **settings)
    return run(policy, MESSAGES, sampling, prefix)


def test_ids_go_out_as_rendered_and_come_back_as_sampled(server: TokenServer, renderer: Renderer) -> None:
    [completion] = complete(server, Sampling(max_tokens=64, logprobs=True))
    [request] = server.requests
    assert tuple(request["prompt"]) == completion.prompt_ids == renderer.prompt(MESSAGES)
    assert completion.token_ids is not None
    assert completion.token_ids[-1] == renderer.stop_token_id
    assert completion.text == "Thought: it holds silver"
    assert completion.logprobs == tuple(-0.25 * (i + 1) for i in range(len(completion.token_ids)))
    assert completion.completion_tokens == len(completion.token_ids)
    assert (completion.finish_reason, completion.prefix_by) == ("stop", "")


def test_a_prefix_ends_the_prompt_and_begins_the_turn(server: TokenServer, renderer: Renderer) -> None:
    server.says = lambda index: " silver"
    [completion] = complete(server, Sampling(logprobs=True), prefix="Thought: it holds")
    assert completion.prompt_ids == renderer.prompt(MESSAGES, "Thought: it holds")
    assert completion.text == "Thought: it holds silver"
    assert completion.token_ids is not None
    prefix_ids = completion.prompt_ids[len(renderer.prompt(MESSAGES)) :]
    assert completion.token_ids[: len(prefix_ids)] == prefix_ids
    assert completion.sampled_ids == completion.token_ids[len(prefix_ids) :]
    assert len(completion.logprobs or ()) == completion.completion_tokens
    assert completion.prefix_by == "tokens"


def test_the_turn_is_a_prefix_of_the_next_prompt(server: TokenServer, renderer: Renderer) -> None:
    [completion] = complete(server, Sampling(), prefix="Thought:")
    turn = Message(role="assistant", content=completion.text, token_ids=completion.token_ids)
    longer = renderer.prompt([*MESSAGES, turn, Message(role="user", content="Go on.")])
    begun = renderer.prompt(MESSAGES) + (completion.token_ids or ())
    assert longer[: len(begun)] == begun


def test_candidates_come_from_one_request(server: TokenServer) -> None:
    server.says = lambda index: f"number {index}"
    completions = complete(server, Sampling(n=3, temperature=1.0, seed=1))
    assert [each.text for each in completions] == ["number 0", "number 1", "number 2"]
    [request] = server.requests
    assert (request["n"], request["return_token_ids"]) == (3, True)
    assert isinstance(request["seed"], int)


def test_greedy_candidates_are_copies_of_one(server: TokenServer) -> None:
    assert len(complete(server, Sampling(n=4))) == 4
    assert server.requests[0]["n"] == 1


def test_a_stop_string_stays_part_of_the_turn(server: TokenServer) -> None:
    server.says = lambda index: "Code:\nprint(1)\n<end_code> and more"
    [completion] = complete(server, Sampling(stop=("<end_code>",)))
    assert completion.text == "Code:\nprint(1)\n<end_code>"
    assert (server.requests[0]["stop"], server.requests[0]["include_stop_str_in_output"]) == (["<end_code>"], True)


def test_a_stop_string_that_ends_inside_a_token_leaves_no_ids(server: TokenServer, renderer: Renderer) -> None:
    word = next(
        text
        for i in range(600, 3000)
        if (text := renderer.tokenizer.decode([i])).strip().isalpha()
        and len(text.strip()) >= 6
        and renderer._content(text)[0] == (i,)
    )
    server.says = lambda index: word
    [completion] = complete(server, Sampling(stop=(word.strip()[:3],)))
    assert completion.text.strip() == word.strip()[:3]
    assert completion.token_ids is None
    assert completion.prompt_ids is not None


def test_max_tokens_is_cut_to_the_room_that_is_left(server: TokenServer, renderer: Renderer) -> None:
    server.card["max_model_len"] = len(renderer.prompt(MESSAGES)) + 3
    [completion] = complete(server, Sampling(max_tokens=500))
    assert server.requests[0]["max_tokens"] == 3
    assert completion.finish_reason == "length"


def test_a_prompt_without_room_is_a_limit_and_is_not_sent(server: TokenServer, renderer: Renderer) -> None:
    server.card["max_model_len"] = len(renderer.prompt(MESSAGES))
    with pytest.raises(PolicyError, match="leaves no room in max_model_len=") as caught:
        complete(server, Sampling())
    assert caught.value.failure_class is FailureClass.LIMIT
    assert server.requests == []


def test_sampling_does_not_depend_on_the_models_generation_config(server: TokenServer) -> None:
    complete(server, Sampling(temperature=0.7, top_p=0.9))
    complete(server, Sampling(temperature=0.7, top_k=20))
    request, narrow = server.requests
    assert (request["temperature"], request["top_p"]) == (0.7, 0.9)
    assert (request["top_k"], request["min_p"], request["repetition_penalty"]) == (0, 0.0, 1.0)
    assert narrow["top_k"] == 20


def test_a_failure_that_passes_is_tried_again_and_calls_are_counted(server: TokenServer) -> None:
    server.script = [_json({"error": {"message": "busy"}}, 503), (200, {}, b'{"choices": [')]
    meter = LocalMeter()
    prices = Prices(prompt_usd_per_million=1.0, completion_usd_per_million=1.0)
    [completion] = complete(server, Sampling(), meter=meter, prices=prices)
    spent = asyncio.run(meter.snapshot())
    assert spent.tokens == completion.prompt_tokens + completion.completion_tokens
    assert completion.cost_usd == pytest.approx(spent.tokens / 1e6)
    assert len(server.requests) == 3


def test_ids_and_logprobs_come_back_from_the_cache_too(server: TokenServer, tmp_path: Path) -> None:
    sampling = Sampling(n=2, temperature=1.0, seed=4, logprobs=True, stop=("silver",))
    first = complete(server, sampling, cache_path=str(tmp_path / "c.sqlite"))
    second = complete(server, sampling, cache_path=str(tmp_path / "c.sqlite"))
    assert len(server.requests) == 1
    assert [(each.token_ids, each.logprobs, each.text) for each in first] == [
        (each.token_ids, each.logprobs, each.text) for each in second
    ]
    assert all(each.cached for each in second)


# -- other servers


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no ids": (lambda a: a["choices"][0].pop("token_ids"), "returns no token ids: it is no vLLM server, or one before"),
    "another prompt": (lambda a: a["choices"][0].update(prompt_token_ids=[1, 2]), "used 2 others"),
    "no logprobs": (lambda a: a["choices"][0].pop("logprobs"), "token ids and 0 log-probabilities"),
    "more choices": (lambda a: a["choices"].append(a["choices"][0]), "returned 2 choices, not 1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_that_is_not_exact_is_refused(server: TokenServer, change: str) -> None:
    server.change, message = CHANGES[change]
    with pytest.raises(PolicyError, match=message) as caught:
        complete(server, Sampling(logprobs=True))
    assert caught.value.failure_class is FailureClass.INPUT


def test_an_endpoint_that_is_no_vllm_is_told_apart(server: TokenServer) -> None:
    del server.card["max_model_len"]
    with pytest.raises(PolicyError, match="is no vLLM server .*use a policy of kind 'openai'"):
        complete(server, Sampling())


def test_another_model_is_named(server: TokenServer) -> None:
    server.card["id"] = "teacher"
    with pytest.raises(PolicyError, match="serves teacher, not 'student'"):
        complete(server, Sampling())


def test_too_many_stop_strings_are_refused(server: TokenServer) -> None:
    with pytest.raises(PolicyError, match="takes 4 stop strings, not 5"):
        complete(server, Sampling(stop=tuple("abcde")))


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot load the tokenizer") as caught:
        VllmServerPolicy("student", base_url="http://127.0.0.1:1/v1", tokenizer=str(tmp_path / "nowhere"))
    assert caught.value.failure_class is FailureClass.INPUT


def test_a_spec_builds_it(server: TokenServer) -> None:
    spec = PolicySpec(kind="vllm_server", model="student", base_url=server.url, tokenizer=str(CHECKPOINT))
    policy = spec.build(meter=LocalMeter())
    assert isinstance(policy, VllmServerPolicy)
    [completion] = run(policy, MESSAGES, Sampling())
    assert completion.token_ids is not None


# -- vLLM's own server


@pytest.fixture
def real_server() -> Iterator[str]:
    """The base student behind vLLM's server; 20 s to start."""
    pytest.importorskip("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    options = [
        *("--model", str(CHECKPOINT), "--served-model-name", "student"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "1024", "--dtype", "float32", "--enforce-eager", "--block-size", "64"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"),
    ]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        _wait_for(url, process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 150
    while time.monotonic() < ends:
        assert process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start within 150 s")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ids_and_text_agree_on_vllms_own_server(real_server: str, renderer: Renderer) -> None:
    """Rendered here and sent as ids, or rendered there and continued: the same greedy turns, token for token."""
    exact = VllmServerPolicy("student", base_url=real_server, tokenizer=str(CHECKPOINT))
    chat = OpenAIPolicy("student", base_url=real_server)

    async def scenario() -> None:
        await exact.check()
        await chat.check()
        assert chat.prefill_used == "continue"
        for prefix in ("", "The box", "Thought: "):
            for stop in ((), ("holds", "silver")):
                sampling = Sampling(max_tokens=24, stop=stop, logprobs=True)
                [one] = await exact.complete(MESSAGES, sampling, prefix=prefix)
                [other] = await chat.complete(MESSAGES, sampling, prefix=prefix)
                assert one.text == other.text
                assert (one.prompt_tokens, one.completion_tokens) == (other.prompt_tokens, other.completion_tokens)
                assert one.finish_reason == other.finish_reason
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
                assert (one.prefix_by, other.prefix_by) == (("tokens", "continue") if prefix else ("", ""))
                assert one.token_ids is not None
                assert one.text == renderer.tokenizer.decode(one.token_ids, skip_special_tokens=True)
        sampling = Sampling(n=4, temperature=1.0, seed=7, max_tokens=16, logprobs=True)
        candidates = await exact.complete(MESSAGES, sampling, prefix="The")
        assert len({each.token_ids for each in candidates}) > 1
        assert [each.token_ids for each in await exact.complete(MESSAGES, sampling, prefix="The")] == [
            each.token_ids for each in candidates
        ]
        assert all(len(each.logprobs or ()) == each.completion_tokens for each in candidates)
        too_long = [Message(role="user", content="word " * 2000)]
        for policy in (exact, chat):
            with pytest.raises(PolicyError) as caught:
                await policy.complete(too_long, Sampling())
            assert caught.value.failure_class is FailureClass.LIMIT
            await policy.close()

    asyncio.run(scenario())
