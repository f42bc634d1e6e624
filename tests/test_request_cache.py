"""`rollout.request_cache`: a run that is run again pays for nothing twice, and samples stay different."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer

from rollout.openai_policy import OpenAIPolicy
from rollout.policy import PolicyError, Sampling
from rollout.replies import Reply, ReplyChoice, ReplyUsage
from rollout.request_cache import RequestCache, request_hash
from rollout.spend import Prices
from rollout.spend_meters import LocalMeter
from rollout.trajectory import Completion, FailureClass, Message

MESSAGES = [Message(role="user", content="What is 6 * 7?")]
SAMPLED = Sampling(temperature=1.0, seed=1)
REPLY = Reply(
    choices=(ReplyChoice(text="Thought: 42", stop_reason="<end>", tells_stop=True, logprobs=(-0.5, -1.0)),),
    usage=ReplyUsage(prompt_tokens=11, completion_tokens=7),
)


def counting() -> Callable[[Mapping[str, Any]], str]:
    """Every answer is another one."""
    count = 0

    def reply(request: Mapping[str, Any]) -> str:
        nonlocal count
        count += 1
        return f"answer {count}"

    return reply


def ask(
    server: FaultServer, path: Path, *samplings: Sampling, at_once: bool = False, **settings: Any
) -> tuple[list[Completion], OpenAIPolicy]:
    """Completions of a fresh policy with this cache."""
    policy = OpenAIPolicy("m", base_url=server.base_url, cache_path=str(path), **settings)

    async def scenario() -> list[Completion]:
        calls: list[Coroutine[Any, Any, list[Completion]]] = [policy.complete(MESSAGES, each) for each in samplings]
        try:
            async with asyncio.timeout(30):
                lists = await asyncio.gather(*calls) if at_once else [await call for call in calls]
        finally:
            await policy.close()
        return [completion for each in lists for completion in each]

    return asyncio.run(scenario()), policy


def test_a_second_run_asks_nothing_costs_nothing_and_says_so(tmp_path: Path) -> None:
    prices = Prices(prompt_usd_per_million=1.0, completion_usd_per_million=1.0)
    with FaultServer(counting(), share=0) as server:
        [first], _ = ask(server, tmp_path / "c.sqlite", SAMPLED, prices=prices)
        meter = LocalMeter()
        [second], policy = ask(server, tmp_path / "c.sqlite", SAMPLED, prices=prices, meter=meter)
        assert server.requests == 1
    assert (first.text, first.cached) == (second.text, False)
    assert first.cost_usd > 0
    assert (second.cached, second.cost_usd) == (True, 0.0)
    assert second.completion_tokens == first.completion_tokens
    assert (policy.stats()["requests"], policy.stats()["cached"]) == (0, 1)
    assert asyncio.run(meter.snapshot()).requests == 0


@pytest.mark.parametrize(
    "other",
    [
        Sampling(temperature=1.0, seed=2),
        Sampling(temperature=0.9, seed=1),
        Sampling(temperature=1.0, seed=1, max_tokens=9),
        Sampling(temperature=1.0, seed=1, stop=("<end>",)),
        Sampling(temperature=1.0, seed=1, n=2),
    ],
    ids=["seed", "temperature", "max_tokens", "stop", "n"],
)
def test_another_sampling_is_another_request(tmp_path: Path, other: Sampling) -> None:
    with FaultServer(counting(), share=0) as server:
        [first, *others], _ = ask(server, tmp_path / "c.sqlite", SAMPLED, other)
    assert first.text not in {each.text for each in others}


def test_samples_differ_where_the_server_refuses_seeds(tmp_path: Path) -> None:
    def refuse(request: Mapping[str, Any]) -> str | None:
        return "seed" if "seed" in request else None

    samplings = [Sampling(temperature=1.0, seed=seed) for seed in (1, 2)]
    with FaultServer(counting(), share=0, refuse=refuse) as server:
        first, _ = ask(server, tmp_path / "c.sqlite", *samplings)
        again, _ = ask(server, tmp_path / "c.sqlite", *samplings)
    assert first[0].text != first[1].text
    assert [each.text for each in again] == [each.text for each in first]


def test_candidates_differ_where_the_server_takes_no_n(tmp_path: Path) -> None:
    def refuse(request: Mapping[str, Any]) -> str | None:
        return "n" if "n" in request else None

    with FaultServer(counting(), share=0, refuse=refuse) as server:
        first, _ = ask(server, tmp_path / "c.sqlite", Sampling(n=3, temperature=1.0, seed=1))
        again, _ = ask(server, tmp_path / "c.sqlite", Sampling(n=3, temperature=1.0, seed=1))
    assert len({each.text for each in first}) == 3
    assert [each.text for each in again] == [each.text for each in first]
    assert all(each.cached for each in again)


def test_samples_without_a_seed_are_told_apart_by_their_order(tmp_path: Path) -> None:
    with FaultServer(counting(), share=0) as server:
        first, _ = ask(server, tmp_path / "c.sqlite", *[Sampling(temperature=1.0)] * 3)
        again, _ = ask(server, tmp_path / "c.sqlite", *[Sampling(temperature=1.0)] * 3)
        assert server.requests == 3
    assert len({each.text for each in first}) == 3
    assert [each.text for each in again] == [each.text for each in first]


def test_equal_requests_that_are_out_at_once_are_asked_once(tmp_path: Path) -> None:
    with FaultServer(counting(), share=0, answer_s=0.1) as server:
        completions, _ = ask(server, tmp_path / "c.sqlite", *[Sampling()] * 20, at_once=True)
        assert server.requests == 1
    assert {each.text for each in completions} == {"answer 1"}


def test_a_failure_is_not_kept(tmp_path: Path) -> None:
    with FaultServer(counting(), share=1.0, faults=["500"]) as server, pytest.raises(PolicyError):
        ask(server, tmp_path / "c.sqlite", Sampling(), max_retries=0)
    assert rows(tmp_path / "c.sqlite") == []


def test_what_is_stored_is_a_hash_and_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sesame-open-now")
    with FaultServer(share=0, key="sesame-open-now") as server:
        ask(server, tmp_path / "c.sqlite", Sampling(), api_key_env="TEACHER_KEY")
    [(key, reply)] = rows(tmp_path / "c.sqlite")
    assert len(key) == 64
    assert "Thought: 42" in reply
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"What is 6" not in everything
    assert b"sesame" not in everything


def test_the_key_is_no_part_of_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer(counting(), share=0) as server:
        monkeypatch.setenv("TEACHER_KEY", "one-key-of-mine")
        [first], _ = ask(server, tmp_path / "c.sqlite", Sampling(), api_key_env="TEACHER_KEY")
        monkeypatch.setenv("TEACHER_KEY", "another-key-of-mine")
        [second], _ = ask(server, tmp_path / "c.sqlite", Sampling(), api_key_env="TEACHER_KEY")
    assert first.text == second.text


@pytest.mark.parametrize("broken", ["{", '{"choices":[]}', '{"choices":[{"txt":1}],"usage":{}}', "null", ""])
def test_a_row_that_cannot_be_read_is_a_miss(tmp_path: Path, broken: str) -> None:
    with FaultServer(counting(), share=0) as server:
        ask(server, tmp_path / "c.sqlite", Sampling())
        with sqlite3.connect(tmp_path / "c.sqlite") as connection:
            connection.execute("UPDATE replies SET reply = ?", (broken,))
        connection.close()
        [asked], _ = ask(server, tmp_path / "c.sqlite", Sampling())
        [kept], _ = ask(server, tmp_path / "c.sqlite", Sampling())
    assert (asked.text, asked.cached) == ("answer 2", False)
    assert (kept.text, kept.cached) == ("answer 2", True)


def test_a_reply_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path / "c.sqlite")
    cache.put("k", REPLY)
    assert cache.get("k") == REPLY
    cache.close()


def test_a_cache_that_breaks_underway_fails_no_call(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path / "c.sqlite")
    cache.put("k", REPLY)
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        connection.execute("DROP TABLE replies")
    connection.close()
    assert cache.get("k") is None
    cache.put("k", REPLY)
    assert cache.troubles == 2
    cache.close()


def test_several_processes_share_it(tmp_path: Path) -> None:
    script = (
        "import sys; from rollout.request_cache import *; from rollout.replies import *\n"
        f"cache = RequestCache({str(tmp_path / 'c.sqlite')!r})\n"
        "for i in range(100):\n"
        "    cache.put(f'{sys.argv[1]}-{i}', Reply(choices=(ReplyChoice(text=str(i)),), usage=ReplyUsage()))\n"
        "print(cache.troubles)\n"
    )
    command = [sys.executable, "-c", script]
    root = Path(__file__).parent.parent
    processes = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, cwd=root) for i in range(3)]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [b"0"] * 3
    assert len(rows(tmp_path / "c.sqlite")) == 300


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary " * 1000)
    with pytest.raises(PolicyError, match="cannot be used: .*name another file") as caught:
        OpenAIPolicy("m", base_url="http://127.0.0.1:1/v1", cache_path=str(path))
    assert caught.value.failure_class is FailureClass.INPUT


def test_the_hash_does_not_depend_on_the_order_of_fields() -> None:
    assert request_hash({"a": 1, "b": [2]}) == request_hash({"b": [2], "a": 1})
    assert request_hash({"a": 1}) != request_hash({"a": "1"})


def rows(path: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT key, reply FROM replies").fetchall()
    finally:
        connection.close()
