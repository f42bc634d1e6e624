"""The retrieval service, its Ray actor and client, the formatters and the web_search tool."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from envs.base import EnvError
from envs.retrieval import (
    Bm25Retriever,
    Corpus,
    Hit,
    IndexRecipe,
    Passage,
    RayRetrieverClient,
    ReplicaClient,
    RetrievalService,
    RetrieverSpec,
    ServiceSettings,
    build_index,
    format_hits,
    start_replicas,
    start_retrieval_actor,
    start_sharded,
    web_search_tool,
)
from envs.retrieval.service import RetrievalOverloaded, RetrievalTimeout
from envs.tools import ToolError

EXCERPT = Path(__file__).parent / "data" / "hotpot_excerpt"


class Echo:
    """A retriever that finds passages saying what was asked; it records its batches and can be held up or broken."""

    fingerprint = "echo"

    def __init__(self, *, held: bool = False, broken: bool = False) -> None:
        self.broken = broken
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self._entered, self._gate = threading.Event(), threading.Event()
        if not held:
            self.let_go()

    def let_go(self) -> None:
        """End every search that is held, and hold none from now on."""
        self._gate.set()

    async def entered(self) -> None:
        """Wait until a search has begun."""
        assert await asyncio.to_thread(self._entered.wait, 10)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        self.batches.append(list(queries))
        self.threads.add(threading.get_ident())
        self._entered.set()
        assert self._gate.wait(10)
        if self.broken:
            raise RuntimeError("the index burned down")
        return [[Hit(passage=Passage(id=query, title="", text=query), score=float(k))] * k for query in queries]


def texts(hits: list[Hit]) -> list[str]:
    return [hit.passage.text for hit in hits]


def serve(retriever, scenario, **settings):
    """Run `scenario(service)` with a fresh service and return its result."""

    async def main():
        async with RetrievalService(retriever, ServiceSettings(**settings)) as service:
            return await scenario(service)

    return asyncio.run(asyncio.wait_for(main(), 30))


# --- batching, joining, caching


def test_concurrent_queries_are_computed_in_batches_and_come_back_to_their_callers() -> None:
    echo = Echo()

    async def scenario(service: RetrievalService):
        results = await service.search_many([f"q{number}" for number in range(100)], 1)
        return results, service.stats()

    results, stats = serve(echo, scenario, max_batch=32, max_wait_s=0.3)
    assert [texts(hits) for hits in results] == [[f"q{number}"] for number in range(100)]
    assert [len(batch) for batch in echo.batches] == [32, 32, 32, 4]
    assert (stats.requests, stats.computed, stats.batches, stats.pending) == (100, 100, 4, 0)
    assert len(echo.threads) == 1 and threading.get_ident() not in echo.threads


def test_a_lone_query_waits_no_longer_than_the_window() -> None:
    async def scenario(service: RetrievalService):
        started = time.perf_counter()
        await service.search("alone", 1)
        return time.perf_counter() - started

    assert 0.05 <= serve(Echo(), scenario, max_wait_s=0.05) < 2


def test_queries_that_come_during_a_computation_form_the_next_batch() -> None:
    echo = Echo(held=True)

    async def scenario(service: RetrievalService):
        first = asyncio.create_task(service.search("first", 1))
        await echo.entered()
        late = [asyncio.create_task(service.search(f"late{number}", 1)) for number in range(5)]
        await asyncio.sleep(0.02)
        echo.let_go()
        await asyncio.gather(first, *late)

    serve(echo, scenario)
    assert [len(batch) for batch in echo.batches] == [1, 5]


def test_the_next_query_of_an_answered_caller_joins_those_that_waited() -> None:
    echo = Echo(held=True)

    async def scenario(service: RetrievalService):
        async def loop() -> None:
            await service.search("first", 1)
            await service.search("again", 1)

        caller = asyncio.create_task(loop())
        await echo.entered()
        late = [asyncio.create_task(service.search(f"late{number}", 1)) for number in range(3)]
        await asyncio.sleep(0.25)  # a computation worth waiting after
        echo.let_go()
        await asyncio.gather(caller, *late)

    serve(echo, scenario, max_wait_s=0)
    assert [len(batch) for batch in echo.batches] == [1, 4]


def test_identical_queries_in_flight_are_computed_once() -> None:
    echo = Echo()

    async def scenario(service: RetrievalService):
        results = await asyncio.gather(*(service.search(query, 2) for query in ["same", " same", "same  "] * 5))
        return results, service.stats()

    results, stats = serve(echo, scenario)
    assert echo.batches == [["same"]]
    assert all(texts(hits) == ["same", "same"] for hits in results)
    assert (stats.joined, stats.computed) == (14, 1)


def test_results_are_cached_by_query_and_k_and_the_least_recent_goes_first() -> None:
    echo = Echo()

    async def scenario(service: RetrievalService):
        for query, k in [("a", 1), ("b", 1), ("a", 1), ("a", 2), ("a", 1), ("b", 1)]:
            await service.search(query, k)
        return service.stats()

    stats = serve(echo, scenario, cache_entries=2)
    # ("b", 1) was the least recent when ("a", 2) came, so the last search computes it again
    assert echo.batches == [["a"], ["b"], ["a"], ["b"]]
    assert (stats.cached, stats.cache_entries) == (2, 2)


def test_no_cache_when_it_has_no_entries() -> None:
    echo = Echo()

    async def scenario(service: RetrievalService):
        await service.search("a", 1)
        await service.search("a", 1)

    serve(echo, scenario, cache_entries=0)
    assert len(echo.batches) == 2


def test_a_caller_owns_its_list() -> None:
    async def scenario(service: RetrievalService):
        (await service.search("a", 1)).clear()
        return await service.search("a", 1)

    assert texts(serve(Echo(), scenario)) == ["a"]


def test_the_service_finds_what_the_retriever_finds() -> None:
    corpus = Corpus.from_jsonl(EXCERPT / "corpus.jsonl")
    retriever = Bm25Retriever.build(corpus)
    queries = [passage.text[:40] for passage in corpus] + ["?", ""]

    async def scenario(service: RetrievalService):
        return await service.search_many(queries, 3), await service.search_many(queries, 3)

    first, again = serve(retriever, scenario)
    assert first == again == retriever.search(queries, 3)


# --- limits and failures


def test_a_caller_past_its_limit_is_told_and_the_others_are_served() -> None:
    echo = Echo(held=True)

    async def scenario(service: RetrievalService):
        patient = asyncio.create_task(service.search("slow", 1))
        with pytest.raises(RetrievalTimeout, match=r"'slow' within 0\.02 s"):
            await service.search("slow", 1, timeout_s=0.02)
        echo.let_go()
        return await patient, service.stats()

    hits, stats = serve(echo, scenario)
    assert texts(hits) == ["slow"]
    assert (stats.timeouts, stats.computed) == (1, 1)


def test_a_cancelled_caller_takes_nobody_with_it() -> None:
    echo = Echo(held=True)

    async def scenario(service: RetrievalService):
        leaving, staying = (asyncio.create_task(service.search("q", 1)) for _ in range(2))
        await echo.entered()
        leaving.cancel()
        echo.let_go()
        return await staying

    assert texts(serve(echo, scenario)) == ["q"]


def test_a_query_that_nobody_waits_for_is_not_computed() -> None:
    echo = Echo(held=True)

    async def scenario(service: RetrievalService):
        first = asyncio.create_task(service.search("first", 1))
        await echo.entered()
        with pytest.raises(RetrievalTimeout):
            await service.search("given up", 1, timeout_s=0.01)
        echo.let_go()
        await first
        await service.search("last", 1)
        return service.stats()

    stats = serve(echo, scenario)
    assert echo.batches == [["first"], ["last"]]
    assert stats.abandoned == 1


def test_too_many_waiting_queries_are_refused_at_once() -> None:
    echo = Echo(held=True)

    async def scenario(service: RetrievalService):
        running = asyncio.create_task(service.search("running", 1))
        await echo.entered()
        waiting = [asyncio.create_task(service.search(f"w{number}", 1)) for number in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(RetrievalOverloaded, match="3 queries wait"):
            await service.search("one more", 1)
        echo.let_go()
        await asyncio.gather(running, *waiting)
        return await service.search("one more", 1)

    assert texts(serve(echo, scenario, max_pending=3)) == ["one more"]


def test_a_broken_retriever_is_our_failure_and_is_not_cached() -> None:
    echo = Echo(broken=True)

    async def scenario(service: RetrievalService):
        with pytest.raises(EnvError, match="RuntimeError: the index burned down"):
            await service.search("q", 1)
        echo.broken = False
        return await service.search("q", 1)

    assert texts(serve(echo, scenario)) == ["q"]


def test_closing_fails_what_waits_and_refuses_what_comes() -> None:
    echo = Echo(held=True)

    async def scenario(service: RetrievalService):
        running = asyncio.create_task(service.search("running", 1))
        await echo.entered()
        waiting = asyncio.create_task(service.search("waiting", 1))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(service.aclose())
        await asyncio.sleep(0.01)
        echo.let_go()
        await closing
        results = await asyncio.gather(running, waiting, service.search("late", 1), return_exceptions=True)
        await service.aclose()
        return results

    running, waiting, late = serve(echo, scenario)
    assert texts(running) == ["running"]
    assert isinstance(waiting, EnvError) and isinstance(late, EnvError)


def test_wrong_arguments_are_named() -> None:
    async def scenario(service: RetrievalService):
        with pytest.raises(TypeError, match="query must be a string, got int 5"):
            await service.search(5, 1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="k is how many"):
            await service.search("q", 0)

    serve(Echo(), scenario)
    with pytest.raises(ValueError, match="timeout_s must be more than 0, got 0"):
        ServiceSettings(timeout_s=0)


# --- the Ray actor


@pytest.fixture(scope="module")
def actor(ray_cluster):
    spec = RetrieverSpec(kind="bm25", corpus_path=str(EXCERPT / "corpus.jsonl"))
    handle = start_retrieval_actor(spec)
    yield handle
    ray_cluster.kill(handle)


def failure_of(search: Callable[[], object]) -> str:
    """What `search` says once what it needs has died: Ray kills in its own time, and an actor may answer till then."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            search()
        except EnvError as error:
            return str(error)
        time.sleep(0.05)
    return "nothing failed"


def test_the_actor_finds_what_the_retriever_finds(ray_cluster, actor) -> None:
    client = pickle.loads(pickle.dumps(RayRetrieverClient(actor, timeout_s=30)))
    ready = client.wait_ready(60)
    retriever = Bm25Retriever.build(Corpus.from_jsonl(EXCERPT / "corpus.jsonl"))
    assert ready.fingerprint == retriever.fingerprint and ready.load_s < 60
    assert client.search("demon Lilu", 3) == retriever.search(["demon Lilu"], 3)[0]
    assert client.search("...", 3) == []


def test_the_actor_answers_awaits_and_many_threads(ray_cluster, actor) -> None:
    client = RayRetrieverClient(actor, timeout_s=30)
    before = client.stats()
    results: dict[int, list[Hit]] = {}
    queries = ["film director", "demon", "North Carolina"]

    def ask(number: int) -> None:
        results[number] = client.search(queries[number % 3], 2)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    async def awaited():
        return await actor.search_many.remote(queries, 2)

    expected = asyncio.run(awaited())
    assert [results[number] for number in range(12)] == expected * 4
    after = client.stats()
    assert after.requests - before.requests == 15 and after.computed - before.computed == 3


def test_a_crashed_actor_comes_back_and_a_killed_one_is_our_failure(ray_cluster) -> None:
    # 300 kB that do not compress: more than Ray takes as one inline argument of an actor.
    random_text = [random.Random(number).randbytes(512).hex() for number in range(600)]
    rest = [Passage(id=str(number), title="", text=text) for number, text in enumerate(random_text)]
    spec = RetrieverSpec(kind="bm25", passages=(Passage(id="fox", title="", text="a fox"), *rest))
    handle = start_retrieval_actor(spec)
    del spec
    client = RayRetrieverClient(handle, timeout_s=30)
    pid = client.wait_ready(30).pid
    os.kill(pid, signal.SIGKILL)
    assert texts(client.search("fox", 1)) == ["a fox"]
    assert client.wait_ready(30).pid != pid
    ray_cluster.kill(handle)
    assert "'fox': the retrieval actor is gone" in failure_of(lambda: client.search("fox", 1))


def test_an_actor_that_cannot_load_says_why(ray_cluster, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    handle = start_retrieval_actor(RetrieverSpec(kind="bm25", corpus_path=str(tmp_path / "broken.jsonl")))
    client = RayRetrieverClient(handle, timeout_s=30)
    with pytest.raises(EnvError, match=r"CorpusError: .*broken\.jsonl:1: not JSON"):
        client.wait_ready(30)
    with pytest.raises(EnvError, match="could not be loaded: CorpusError"):
        client.search("fox", 1)
    ray_cluster.kill(handle)


def test_a_silent_actor_is_our_failure_within_the_limit(ray_cluster) -> None:
    @ray_cluster.remote(num_cpus=0)
    class Silent:
        def search(self, query: str, k: int, timeout_s: float) -> list[Hit]:
            time.sleep(60)
            return []

    handle = Silent.remote()  # type: ignore[attr-defined]
    started = time.perf_counter()
    with pytest.raises(EnvError, match=r"no answer from the retrieval actor within 0\.3 s"):
        RayRetrieverClient(handle, timeout_s=0.3).search("fox", 1)
    assert time.perf_counter() - started < 5
    ray_cluster.kill(handle)


# --- replicas and shards


def test_replicas_answer_until_the_last_has_died(ray_cluster) -> None:
    spec = RetrieverSpec(kind="bm25", passages=(Passage(id="fox", title="", text="a fox"),))
    handles = start_replicas(spec, 2, max_restarts=0)
    client = pickle.loads(pickle.dumps(ReplicaClient(handles, timeout_s=30)))
    assert len({ready.pid for ready in client.wait_ready(60)}) == 2
    assert [texts(client.search("fox", 1)) for _ in range(8)] == [["a fox"]] * 8
    assert sum(RayRetrieverClient(handle).stats().requests for handle in handles) == 8
    ray_cluster.kill(handles[0])
    assert [texts(client.search("fox", 1)) for _ in range(4)] == [["a fox"]] * 4
    ray_cluster.kill(handles[1])
    assert "the retrieval actor is gone" in failure_of(lambda: client.search("fox", 1))


def test_shard_actors_find_what_one_index_finds_and_a_lost_one_is_our_failure(ray_cluster, tmp_path: Path) -> None:
    build_index(EXCERPT / "corpus.jsonl", tmp_path / "i", IndexRecipe(kind="bm25", shards=2))
    sharded = start_sharded(str(tmp_path / "i"), name="two-shards", max_restarts=0, max_task_retries=0)
    client = RayRetrieverClient(sharded.router, timeout_s=30)
    client.wait_ready(90)
    whole = Bm25Retriever.build(Corpus.from_jsonl(EXCERPT / "corpus.jsonl"))
    for query in ("demon Lilu", "film director", "North Carolina"):
        assert client.search(query, 5) == whole.search([query], 5)[0]
    ray_cluster.kill(sharded.shards[1])
    queries = (f"demon {number}" for number in range(10_000))  # new ones: what is cached needs no shard
    assert "two-shards-shard-1" in failure_of(lambda: client.search(next(queries), 5))
    for handle in (sharded.shards[0], sharded.router):
        ray_cluster.kill(handle)


# --- formatters and tool

HITS = [
    Hit(passage=Passage(id="1", title="Alû", text="Alû is a demon.\nIt has no mouth. "), score=0.625),
    Hit(passage=Passage(id="2", title="", text="A bare text"), score=12.0),
]


@pytest.mark.parametrize(
    ("name", "shown", "nothing"),
    [
        ("numbered", "[1] Alû: Alû is a demon.\nIt has no mouth. \n[2] A bare text", "No results found."),
        (
            "paper",
            '\nRetrieved documents:\n\n===== Document 0, similarity: 0.62 =====\n"Alû"\nAlû is a demon.\n'
            "It has no mouth. \n\n===== Document 1, similarity: 12.00 =====\nA bare text",
            "\nRetrieved documents:",
        ),
        (
            "verl",
            'Doc 1 (Title: "Alû")\nAlû is a demon.\nIt has no mouth. \n\nDoc 2 (Title: A bare text)',
            "",
        ),
        (
            "verl_json",
            '{"result": "Doc 1 (Title: \\"Alû\\")\\nAlû is a demon.\\nIt has no mouth. \\n\\n'
            'Doc 2 (Title: A bare text)"}',
            '{"result": ""}',
        ),
        (
            "search_r1",
            'Doc 1(Title: "Alû") Alû is a demon.\nIt has no mouth. \nDoc 2(Title: A bare text) \n',
            "",
        ),
        (
            "skyrl",
            '\n<information>Doc 1: "Alû"\nAlû is a demon.\nIt has no mouth.\nDoc 2: A bare text\n</information>\n',
            "\n<information></information>\n",
        ),
        (
            "skyrl_json",
            '\n<information>{"result": "Doc 1: \\"Al\\u00fb\\"\\nAl\\u00fb is a demon.\\nIt has no mouth.\\n'
            'Doc 2: A bare text\\n"}</information>\n',
            '\n<information>{"result": ""}</information>\n',
        ),
    ],
)
def test_formatters_byte_for_byte(name: str, shown: str, nothing: str) -> None:
    assert format_hits(name, HITS) == shown
    assert format_hits(name, []) == nothing


def test_an_unknown_formatter_is_named() -> None:
    with pytest.raises(ValueError, match="'json' does not exist; there are numbered, paper, search_r1"):
        web_search_tool(lambda query, k: [], k=3, formatter="json")


def test_web_search_shows_what_was_found() -> None:
    asked = []

    def search(query: str, k: int) -> list[Hit]:
        asked.append((query, k))
        return HITS[1:] if query == "bare" else []

    tool = web_search_tool(search, k=2, formatter="numbered")
    assert tool.name == "web_search"
    assert tool.parameters["properties"]["query"]["type"] == "string" and tool.parameters["required"] == ["query"]
    assert tool.call(["bare"], {}) == "[1] A bare text"
    assert tool.call([], {"query": ""}) == "No results found."
    assert asked == [("bare", 2), ("", 2)]


@pytest.mark.parametrize("query", [5, None, ["a"], True])
def test_a_query_that_is_no_string_is_the_models_mistake(query: object) -> None:
    tool = web_search_tool(lambda query, k: [], k=2, formatter="numbered")
    with pytest.raises(ToolError, match="web_search.*query"):
        tool.call([query], {})
    with pytest.raises(ToolError, match="web_search: query must be a string"):
        tool.function(query)


def test_a_failed_search_stays_our_failure() -> None:
    def search(query: str, k: int) -> list[Hit]:
        raise EnvError("down")

    with pytest.raises(EnvError, match="down"):
        web_search_tool(search, k=2, formatter="numbered").call(["fox"], {})
