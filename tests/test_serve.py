"""A served agent, by the real openai client and by hand over loopback: answers, streams, limits, refusals, keys."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from openai import APIError, APIStatusError, AuthenticationError, NotFoundError, RateLimitError
from serving_samples import ASKED, MODEL, TWO_STEPS, GatedPolicy, code, in_order, run, serving

from envs.base import EnvError
from envs.pool import EnvHost, EnvSpec
from envs.retrieval.corpus import Passage
from envs.retrieval.retriever import Hit
from launch.serving import api_errors
from launch.serving.places import LineFull, Places
from launch.serving.recorder import Recorder
from launch.serving.search_log import SearchLog
from rollout.ledger import Ledger, LedgerWriter
from rollout.policy import EngineDiedError, PolicyError, ScriptedPolicy
from rollout.trajectory import FailureClass

pytestmark = pytest.mark.timeout(90)
QUESTION = {"role": "user", "content": ASKED}


@pytest.fixture(scope="module")
def host():
    host = EnvHost(EnvSpec(modules=("math",)))
    yield host
    host.close()


# -- answers


def test_an_answer_comes_with_its_steps_and_all_that_it_took(host):
    async def scenario():
        async with serving(host) as served:
            reply = await served.ask()
            assert reply.choices[0].message.content == "42" and reply.choices[0].finish_reason == "stop"
            thinking = reply.choices[0].message.reasoning_content
            assert thinking.index("Step 1") < thinking.index("print(6 * 7)") < thinking.index("Execution logs:\n42")
            assert thinking.index("Execution logs") < thinking.index("Step 2") < thinking.index("final_answer(42)")
            words = [len(TWO_STEPS([], 0).split()), len(code("final_answer(42)").split())]
            assert reply.usage.completion_tokens == sum(words) == reply.usage.total_tokens
            assert reply.model == MODEL and reply.id.startswith("chatcmpl-")

    run(scenario())


def test_steps_are_streamed_as_they_happen(host):
    async def scenario():
        policy = GatedPolicy()
        async with serving(host, policy) as served:
            policy.gates.release()
            stream = await served.ask(stream=True, stream_options={"include_usage": True})
            deltas, seen = [], ""
            async for chunk in stream:
                if not chunk.choices:
                    assert chunk.usage.completion_tokens > 0
                    break
                delta = chunk.choices[0].delta
                deltas.append(delta)
                seen += getattr(delta, "reasoning_content", None) or ""
                if "Execution logs:\n42" in seen and policy.asked == 2 and not policy.gates.locked():
                    raise AssertionError("the second step ran before its gate was opened")
                if "Step 1" in seen and "Step 2" not in seen:
                    policy.gates.release()  # only now may the second step be sampled
                last = chunk.choices[0].finish_reason
            assert deltas[0].role == "assistant"
            assert [delta.content for delta in deltas if delta.content] == ["42"]
            assert seen.index("Step 1") < seen.index("Step 2") and last == "stop"

    run(scenario())


def test_a_vote_is_told_and_its_losers_are_counted(host):
    def reply(messages, i):
        return code("final_answer(41)") if i == 2 else code("final_answer(42)")

    async def scenario():
        async with serving(host, reply) as served:
            answer = await served.ask(candidates=3, trajectory=True)
            assert answer.choices[0].message.content == "42"
            [step] = answer.agent["steps"]
            assert [candidate["votes"] for candidate in step["candidates"]] == [2, 2, 0]
            assert "2 of 3 candidates agree" in answer.choices[0].message.reasoning_content
            one = len(code("final_answer(42)").split())
            assert answer.usage.completion_tokens == 3 * one
            assert answer.agent["stop_reason"] == "final" and answer.agent["success"] is None

    run(scenario())


def test_the_trajectory_tells_what_each_step_found():
    pages = [Passage(id="p1", title="Paris", text="A city."), Passage(id="p2", title="Lyon", text="Another.")]
    log = SearchLog(lambda query, k: [Hit(passage=pages[len(query) % 2], score=0.5)], formatter="numbered")
    host = EnvHost(EnvSpec(modules=("math",)), log)
    found = "print(web_search('even'))\nhidden = web_search('odd')"

    async def scenario():
        async with serving(host, in_order(found, "print(1)", "final_answer(hidden)"), searches=log) as served:
            whole = await served.ask(trajectory=True)
            stream = await served.ask(trajectory=True, stream=True)
            told = [chunk.agent for chunk in [chunk async for chunk in stream] if hasattr(chunk, "agent")]
            return whole.agent["steps"], [agent["step"] for agent in told[:-1]]

    try:
        for steps in run(scenario()):
            hits = [{"id": "p1", "title": "Paris", "score": 0.5}]
            assert steps[0]["searches"] == [{"query": "even", "hits": hits}]  # the other one was not printed
            assert not any("searches" in step for step in steps[1:])
    finally:
        host.close()


def test_a_stream_tells_of_the_trajectory_when_asked(host):
    async def scenario():
        async with serving(host) as served:
            stream = await served.ask(stream=True, trajectory=True, steps="none")
            told = [chunk.agent for chunk in [chunk async for chunk in stream] if hasattr(chunk, "agent")]
            assert [agent["step"]["number"] for agent in told[:-1]] == [1, 2]
            assert told[0]["step"]["action"] == "print(6 * 7)" and told[-1]["answer"] == "42"
            plain = await served.ask()
            assert not hasattr(plain, "agent")

    run(scenario())


def test_steps_in_the_content_are_folded_and_can_neither_close_nor_open_anything(host):
    body = "print('</details>' + '`' * 4)"
    hostile = in_order(body, "final_answer(1)")

    async def scenario():
        policy = ScriptedPolicy(lambda m, i: hostile(m, i).replace("think", "</details><script>alert(1)</script>"))
        async with serving(host, policy) as served:
            content = (await served.ask(steps="content")).choices[0].message.content
            assert content.endswith("</details>\n\n1") and content.count("<details>") == 2
            outside = content.split("`````")[0]
            assert "<script>" not in content and "&lt;script&gt;" in outside
            assert "`````text\nExecution logs:\n</details>````\n" in content  # a longer fence than any inside

    run(scenario())


def test_an_agent_that_meets_a_limit_ends_with_length(host):
    async def scenario():
        async with serving(host, lambda messages, i: code("print(1)")) as served:
            reply = await served.ask(max_steps=2)
            assert reply.choices[0].finish_reason == "length" and reply.choices[0].message.content == ""
            assert "No answer" in reply.choices[0].message.reasoning_content
            assert reply.choices[0].message.reasoning_content.count("**Step") == 2

    run(scenario())


def test_max_tokens_bounds_all_that_is_sampled(host):
    first = len(code("print(6 * 7)").split())

    async def scenario():
        policy = ScriptedPolicy(TWO_STEPS)
        async with serving(host, policy) as served:
            reply = await served.ask(max_tokens=first + 3)
            assert [call[1].max_tokens for call in policy.calls] == [first + 3, 3]
            reply = await served.ask(max_completion_tokens=first)
            assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == first
            assert len(policy.calls) == 3

    run(scenario())


def test_stop_strings_cut_the_answer_and_not_the_steps(host):
    async def scenario():
        async with serving(host, in_order("print('a;b')", "final_answer('a;b;c')")) as served:
            reply = await served.ask(stop=[";", "zzz"])
            assert reply.choices[0].message.content == "a" and reply.choices[0].finish_reason == "stop"
            assert "a;b" in reply.choices[0].message.reasoning_content

    run(scenario())


def test_the_last_message_is_the_question_and_a_history_is_bounded(host):
    talk = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "x" * 5000, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
    ]

    async def scenario(history):
        policy = ScriptedPolicy(in_order("final_answer(1)"))
        async with serving(host, policy, history=history) as served:
            reply = (await served.post({"messages": talk, "trajectory": True})).json()
            assert reply["agent"]["messages_ignored"] == 3
        return policy.calls[0][0][1].content

    assert run(scenario(0)) == "second"
    shown = run(scenario(2))
    assert shown.startswith("Earlier in this conversation:\nUser: first\nAssistant: xxx")
    assert shown.endswith("[...]\n\nThe task:\nsecond") and len(shown) < 2200 and "pirate" not in shown


def test_the_same_seed_samples_the_same_and_none_samples_anew(host):
    async def scenario():
        policy = ScriptedPolicy(in_order("final_answer(1)"))
        async with serving(host, policy) as served:
            for seed in (7, 7, 8):
                await served.ask(seed=seed, temperature=0.5)
            await served.ask(temperature=0.5)
            await served.ask(temperature=0.5)
        one, again, other, *drawn = [call[1].seed for call in policy.calls]
        assert one == again and len({one, other, *drawn}) == 4
        assert policy.calls[0][1].temperature == 0.5

    run(scenario())


# -- places, and clients that leave


def test_a_place_is_held_until_its_env_is_closed():
    class SlowToClose:
        closed = asyncio.Event()

        async def close(self):
            await self.closed.wait()

    async def scenario():
        slow = SlowToClose()
        places = Places([slow], line=0, wait_s=1.0)
        assert places.running == 0
        taken = await places.take()
        assert places.running == 1
        places.give_back(taken)
        assert places.running == 1
        with pytest.raises(LineFull, match="all 1 places are taken and 0 requests wait"):
            await places.take()
        slow.closed.set()
        await places.settled()
        assert places.running == 0 and await places.take() is slow

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(host, stream):
    async def scenario():
        policy = GatedPolicy()
        async with serving(host, policy, places=1, line=0) as served:
            asked = asyncio.create_task(served.post({"messages": [QUESTION], "stream": stream}))
            await served.until(lambda: policy.asked == 1)
            asked.cancel()  # httpx closes the connection
            await served.until(lambda: policy.cancelled == 1 and served.service.running == 0)
            for _ in range(2):
                policy.gates.release()
            assert (await served.ask()).choices[0].message.content == "42"
            assert b"apprentice_serve_disconnects_total 1.0" in served.service.metrics.text()

    run(scenario())


def test_a_client_that_leaves_while_code_runs_frees_its_sandbox(host):
    async def scenario():
        async with serving(host, in_order("while True: pass"), places=1) as served:
            asked = asyncio.create_task(served.post({"messages": [QUESTION], "stream": True}))
            await served.until(lambda: served.service.running == 1)
            asked.cancel()
            await served.until(lambda: served.service.running == 0)
        # closing the service waited for the env to be closed

    run(scenario())


def test_who_finds_no_place_waits_in_line_and_who_finds_no_line_is_told_when_to_come_again(host):
    async def scenario():
        policy = GatedPolicy()
        async with serving(host, policy, places=1, line=1) as served:
            first = asyncio.create_task(served.ask())
            await served.until(lambda: served.service.running == 1)
            second = asyncio.create_task(served.ask())
            await served.until(lambda: served.service.waiting == 1)
            with pytest.raises(RateLimitError, match="all 1 places are taken and 1 requests wait") as refused:
                await served.ask()
            assert int(refused.value.response.headers["retry-after"]) >= 1
            for _ in range(4):
                policy.gates.release()
            answers = [(await each).choices[0].message.content for each in (first, second)]
            assert answers == ["42", "42"]

    run(scenario())


def test_nobody_waits_for_longer_than_told(host):
    async def scenario():
        policy = GatedPolicy()
        async with serving(host, policy, places=1, wait_s=0.05) as served:
            first = asyncio.create_task(served.ask())
            await served.until(lambda: served.service.running == 1)
            with pytest.raises(RateLimitError, match="no place became free within 0.05 s"):
                await served.ask(stream=True)
            first.cancel()

    run(scenario())


def test_a_silent_stream_is_kept_alive_by_comments(host):
    async def scenario():
        policy = GatedPolicy()
        async with serving(host, policy, keep_alive_s=0.02) as served:
            body = {"messages": [QUESTION], "stream": True}
            async with served.http.stream("POST", "/v1/chat/completions", json=body) as reply:
                assert reply.headers["content-type"].startswith("text/event-stream")
                lines, comments = [], 0
                async for line in reply.aiter_lines():
                    comments += line == ": keep-alive"
                    if comments == 2:
                        policy.gates.release()
                        policy.gates.release()
                    lines.append(line)
            assert comments >= 2 and lines[-2] == "data: [DONE]"
            assert all(line.startswith(("data: ", ":")) for line in lines if line)

    run(scenario())


# -- refusals


REFUSED = [
    ({"messages": []}, "messages: list should have at least 1 item"),
    ({}, "messages: field required"),
    ({"messages": "hello"}, "messages: input should be a valid list"),
    ({"messages": [3]}, "messages[0]: it must be an object"),
    ([QUESTION], "the request must be a JSON object"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role: input should be 'system'"),
    ({"messages": [QUESTION, {"role": "tool", "content": "x"}]}, "messages[1].role: tools run on the server"),
    ({"messages": [QUESTION, {"role": "assistant", "content": "x"}]}, "messages[1] must be of the role 'user'"),
    ({"messages": [{"role": "user", "content": "  "}]}, "messages[0] is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not a part of type 'image_url'"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content: it is no valid text"),
    ({"messages": [{"role": "user", "content": "x" * 500_000}]}, "400000 are the most that could fit"),
    ({"messages": [QUESTION], "n": 2}, "n: only n=1 is supported"),
    ({"messages": [QUESTION], "tools": [{"type": "function"}]}, "tools: this agent's tools run on the server"),
    ({"messages": [QUESTION], "response_format": {"type": "json_object"}}, "response_format: only"),
    ({"messages": [QUESTION], "logprobs": True}, "logprobs: log-probabilities are not given"),
    ({"messages": [QUESTION], "presence_penalty": 1.5}, "presence_penalty: only 0 is supported"),
    ({"messages": [QUESTION], "temperature": 3}, "temperature: input should be less than or equal to 2"),
    ({"messages": [QUESTION], "temperature": "hot"}, "temperature: input should be a valid number"),
    ({"messages": [QUESTION], "top_p": 0}, "top_p: input should be greater than 0"),
    ({"messages": [QUESTION], "max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
    ({"messages": [QUESTION], "stop": ["a", "b", "c", "d", "e"]}, "stop: list should have at most 4 items"),
    ({"messages": [QUESTION], "candidates": 65}, "candidates must be at most 64, not 65"),
    ({"messages": [QUESTION], "candidates": 4, "temperature": 0}, "candidates=4 need a temperature above 0"),
    ({"messages": [QUESTION], "max_steps": 99}, "max_steps: this agent takes 5 steps at most, not 99"),
    ({"messages": [QUESTION], "steps": "loud"}, "steps: input should be 'reasoning', 'content' or 'none'"),
    ({"messages": [QUESTION], "min_p": 0.1}, "unrecognized field 'min_p'"),
    ({"messages": [QUESTION], "seed": 2**70}, "seed: "),
]


def test_a_bad_request_is_told_what_is_wrong_with_it(host):
    async def scenario():
        policy = ScriptedPolicy(TWO_STEPS)
        async with serving(host, policy) as served:
            for body, message in REFUSED:
                reply = await served.http.post(
                    "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
                )
                error = reply.json()["error"]
                assert (reply.status_code, error["type"]) == (400, "invalid_request_error"), message
                assert message in error["message"], error
            assert policy.calls == []

    run(scenario())


def test_fields_that_ask_for_nothing_are_taken(host):
    async def scenario():
        harmless = {
            "n": 1, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False,
            "presence_penalty": 0, "user": "somebody", "metadata": {"a": "b"}, "reasoning_effort": "low",
            "stream_options": None, "stop": None,
        }  # fmt: skip
        async with serving(host) as served:
            reply = await served.post({"messages": [QUESTION], **harmless})
            assert reply.status_code == 200, reply.text

    run(scenario())


def test_other_models_and_other_paths_are_not_there(host):
    async def scenario():
        async with serving(host) as served:
            with pytest.raises(NotFoundError, match="'gpt-9' is not served here; there is 'small'"):
                await served.client.chat.completions.create(model="gpt-9", messages=[QUESTION])
            with pytest.raises(NotFoundError, match="not served here; there are POST /v1/chat/completions"):
                await served.client.responses.create(model=MODEL, input="x")
            assert [model.id for model in (await served.client.models.list()).data] == [MODEL]
            assert (await served.client.models.retrieve(MODEL)).owned_by == "apprentice"
            wrong = await served.http.get("/v1/chat/completions")
            assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"

    run(scenario())


def test_hostile_bodies_are_refused_before_they_cost_anything(host):
    async def pieces():
        for _ in range(64):
            yield b"x" * 1024

    async def scenario():
        json_type = {"content-type": "application/json"}
        async with serving(host, max_body_bytes=10_000, body_s=0.2) as served:
            path = "/v1/chat/completions"
            large = await served.http.post(path, content=b"x" * 20_000, headers=json_type)
            assert large.status_code == 413 and "larger than 10000 bytes" in large.json()["error"]["message"]
            unannounced = await served.http.post(path, content=pieces(), headers=json_type)
            assert unannounced.status_code == 413
            deep = await served.http.post(path, content=b"[" * 9000, headers=json_type)
            assert deep.status_code == 400 and "JSON" in deep.json()["error"]["message"]
            nested = b'{"messages": ' + b"[" * 4000 + b"]" * 4000 + b"}"
            assert (await served.http.post(path, content=nested, headers=json_type)).status_code == 400
            digits = b'{"seed": ' + b"9" * 9000 + b"}"
            assert (await served.http.post(path, content=digits, headers=json_type)).status_code == 400
            form = await served.http.post(path, content=b"{}", headers={"content-type": "text/plain"})
            assert form.status_code == 415
            reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rpartition(":")[2]))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n"
                         b"Content-Type: application/json\r\n\r\n{")  # fmt: skip
            assert b"408" in await asyncio.wait_for(reader.readline(), 10)
            writer.close()
            assert (await served.ask()).choices[0].message.content == "42"

    run(scenario())


def test_only_known_host_names_are_answered(host):
    async def scenario():
        async with serving(host, hosts=("127.0.0.1", "::1", "agent.example")) as served:
            for name, status in [
                ("evil.example", 421), ("127.0.0.1.evil.example:80", 421), ("", 421),
                ("agent.example:8000", 200), ("AGENT.example", 200), ("[::1]:8000", 200),
            ]:  # fmt: skip
                reply = await served.http.get("/v1/models", headers={"host": name})
                assert reply.status_code == status, name

    run(scenario())


def test_pages_of_other_origins_are_let_in_only_when_named(host):
    async def asked(origins):
        async with serving(host, origins=origins, key="secret") as served:
            headers = {"origin": "https://chat.example", "access-control-request-method": "POST"}
            reply = await served.http.options("/v1/chat/completions", headers=headers)
            return reply.headers.get("access-control-allow-origin")

    assert run(asked(())) is None
    assert run(asked(("https://other.example",))) is None
    assert run(asked(("https://chat.example",))) == "https://chat.example"


def test_a_key_is_wanted_where_one_was_set(host):
    async def scenario():
        async with serving(host, key="right-key") as served:
            with pytest.raises(AuthenticationError, match="the API key is not the right one"):
                await served.ask()
            assert (await served.http.get("/v1/models")).json()["error"]["code"] == "missing_api_key"
            assert (await served.http.get("/metrics")).status_code == 401
            assert (await served.http.get("/health")).status_code == 200
            right = served.client.with_options(api_key="right-key")
            reply = await right.chat.completions.create(model=MODEL, messages=[QUESTION])  # type: ignore[arg-type]
            assert reply.choices[0].message.content == "42"

    run(scenario())


# -- failures of ours


def raises(error):
    def reply(messages, i):
        raise error

    return reply


@pytest.mark.parametrize(
    ("error", "status", "code", "message"),
    [
        (PolicyError("it leaves no room", FailureClass.LIMIT), 400, "context_length_exceeded", "no room"),
        (PolicyError(f"bad: {ASKED}", FailureClass.INPUT), 400, "invalid_question", "cannot be given"),
        (PolicyError(f"bad: {ASKED}"), 503, "engine_failed", "may be tried again"),
        (EnvError(f"bad: {ASKED}"), 503, "environment_failed", "may be tried again"),
        (RuntimeError(f"bad: {ASKED}"), 500, "internal_error", "the server failed"),
    ],
)  # fmt: skip
def test_a_failure_has_the_status_that_fits_also_in_a_stream(host, error, status, code, message, caplog):
    async def scenario():
        async with serving(host, raises(error)) as served:
            for stream in (False, True):
                with pytest.raises(APIStatusError, match=message) as refused:
                    await served.ask(stream=stream)
                assert (refused.value.status_code, refused.value.code) == (status, code)
                assert ASKED not in str(refused.value)

    with caplog.at_level(logging.DEBUG, "launch"):
        run(scenario())
    assert ASKED not in caplog.text
    assert code == "context_length_exceeded" or "failed" in caplog.text  # whoever runs it learns of it


def test_what_fails_in_the_middle_of_a_stream_ends_it_with_an_error(host):
    def reply(messages, i):
        if len(messages) > 2:
            raise PolicyError("gone")
        return code("print(1)")

    async def scenario():
        async with serving(host, reply) as served:
            stream = await served.ask(stream=True)
            seen = ""
            with pytest.raises(APIError, match="the engine failed"):
                async for chunk in stream:
                    seen += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            assert "Step 1" in seen

    run(scenario())


def test_a_dead_engine_ends_the_service(host):
    async def scenario():
        async with serving(host, raises(EngineDiedError("it died"))) as served:
            for _ in range(2):
                with pytest.raises(APIStatusError, match="the engine has died"):
                    await served.ask()
            assert served.service.failed.is_set()
            health = await served.http.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "failed"

    run(scenario())


def test_while_it_loads_it_says_so(host):
    async def scenario():
        async with serving(host, ready=False) as served:
            with pytest.raises(APIStatusError, match="is being loaded") as refused:
                await served.ask()
            assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"] == "5"
            assert (await served.http.get("/health")).json()["status"] == "loading"
            assert [model.id for model in (await served.client.models.list()).data] == [MODEL]

    run(scenario())


def test_at_the_end_what_runs_may_finish_and_nothing_begins(host):
    async def scenario():
        policy = GatedPolicy()
        async with serving(host, policy) as served:
            running = asyncio.create_task(served.ask())
            await served.until(lambda: policy.asked == 1)
            draining = asyncio.create_task(served.service.drain(10))
            await asyncio.sleep(0)
            with pytest.raises(APIStatusError, match="shutting down"):
                await served.ask()
            assert not draining.done()
            policy.gates.release()
            policy.gates.release()
            assert (await running).choices[0].message.content == "42"
            assert await draining == 0

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_finish_in_time_at_the_end_is_told_so(host, stream):
    async def ask(served):
        reply = await served.ask(stream=stream)
        return [chunk async for chunk in reply] if stream else reply

    async def scenario():
        policy = GatedPolicy()
        policy.gates.release()
        async with serving(host, policy) as served:
            running = asyncio.create_task(ask(served))
            await served.until(lambda: policy.asked == 2)
            assert await served.service.drain(0.01) == 1
            with pytest.raises(APIError, match=str(api_errors.shutting_down())):
                await running

    run(scenario())


# -- what is left behind


def test_served_episodes_are_recorded_each_under_its_own_key_and_as_no_success(host, tmp_path):
    async def scenario():
        writer = LedgerWriter(tmp_path / "ledger", writer="serve")
        answers = in_order("final_answer('')")  # it would equal the answer that nobody knows
        async with serving(host, answers, record=lambda s: Recorder(writer, s.metrics, every_s=0.01)) as served:
            for _ in range(2):
                await served.ask()
            await served.until(lambda: b"recorded_total 2.0" in served.service.metrics.text())
            await served.ask("another")  # written when the service is closed

    run(scenario())
    recorded = list(Ledger(tmp_path / "ledger").trajectories())
    assert [trajectory.task.question for trajectory in recorded] == [ASKED, ASKED, "another"]
    assert len({trajectory.key for trajectory in recorded}) == 3 and len({t.task.id for t in recorded}) == 2
    assert not any(trajectory.success for trajectory in recorded)


def test_metrics_count_what_happened(host):
    async def scenario():
        async with serving(host) as served:
            await served.ask()
            await served.post({})
            text = (await served.http.get("/metrics")).text
            for line in [
                'apprentice_serve_requests_total{path="/v1/chat/completions",status="200"} 1.0',
                'apprentice_serve_requests_total{path="/v1/chat/completions",status="400"} 1.0',
                'apprentice_serve_episodes_total{stop_reason="final"} 1.0',
                "apprentice_serve_steps_total 2.0",
                "apprentice_serve_places 2.0",
                "apprentice_serve_ready 1.0",
                "apprentice_serve_running 0.0",
            ]:
                assert line in text.splitlines(), line

    run(scenario())
