"""Search-R1's protocol over HTTP: the server byte for byte, what it refuses, and the client."""

from __future__ import annotations

import http.client
import http.server
import json
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from envs.base import EnvError
from envs.retrieval import (
    Bm25Retriever,
    Corpus,
    Hit,
    HttpRetriever,
    IndexRecipe,
    Passage,
    RetrievalServer,
    Retriever,
    ServiceSettings,
    build_index,
    web_search_tool,
)

ROOT = Path(__file__).parents[1]
EXCERPT = Path(__file__).parent / "data" / "hotpot_excerpt" / "corpus.jsonl"


@pytest.fixture(scope="module")
def retriever() -> Bm25Retriever:
    return Bm25Retriever.build(Corpus.from_jsonl(EXCERPT))


@pytest.fixture(scope="module")
def url(retriever: Bm25Retriever) -> Iterator[str]:
    with RetrievalServer(retriever) as server:
        yield server.url


def ask(url: str, method: str, path: str, body: object = None) -> tuple[int, dict, dict]:
    """Status, headers and decoded body."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), json.loads(response.read())
    finally:
        connection.close()


class Held:
    """A retriever that waits until it is let go, or raises."""

    fingerprint = "held"

    def __init__(self, *, broken: bool = False) -> None:
        self.gate, self.entered, self._broken = threading.Event(), threading.Event(), broken

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        if self._broken:
            raise RuntimeError("the index burned down")
        self.entered.set()
        assert self.gate.wait(20)
        return [[] for _ in queries]


# --- the server


def test_an_answer_is_as_search_r1_has_it(url: str, retriever: Retriever) -> None:
    queries = ["demon Lilu", "film director", "?"]
    status, headers, answer = ask(url, "POST", "/retrieve", {"queries": queries, "topk": 2, "return_scores": True})
    assert status == 200 and headers["content-type"] == "application/json"
    lines = {line["id"]: line for line in map(json.loads, EXCERPT.read_text(encoding="utf-8").splitlines())}
    expected = [
        [
            {"document": {"id": hit.passage.id, "contents": lines[hit.passage.id]["contents"]}, "score": hit.score}
            for hit in hits
        ]
        for hits in retriever.search(queries, 2)
    ]
    assert answer == {"result": expected} and len(expected[0]) == 2 and expected[2] == []


def test_without_scores_the_documents_are_bare(url: str) -> None:
    scored = ask(url, "POST", "/retrieve", {"queries": ["demon"], "topk": 2, "return_scores": True})[2]["result"]
    bare = ask(url, "POST", "/retrieve", {"queries": ["demon"], "topk": 2, "return_scores": False})[2]["result"]
    assert bare == [[entry["document"] for entry in scored[0]]]
    assert ask(url, "POST", "/retrieve", {"queries": ["demon"], "topk": 2})[2]["result"] == bare, "that is the default"


def test_one_query_and_the_default_topk_are_taken(url: str) -> None:
    many = ask(url, "POST", "/retrieve", {"queries": ["demon"], "topk": 3})[2]
    assert ask(url, "POST", "/retrieve", {"query": "demon"})[2] == many
    for topk in (None, 0):
        assert ask(url, "POST", "/retrieve", {"queries": ["demon"], "topk": topk})[2] == many
    assert ask(url, "POST", "/retrieve", {"queries": []})[2] == {"result": []}


def test_health_names_what_is_served(url: str, retriever: Retriever) -> None:
    status, _, health = ask(url, "GET", "/health")
    assert (status, health["status"], health["fingerprint"]) == (200, "ok", retriever.fingerprint)
    assert health["stats"]["pending"] == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "complaint"),
    [
        ("POST", "/retrieve", b"{", 422, "not JSON"),
        ("POST", "/retrieve", b"\xff", 422, "not JSON"),
        ("POST", "/retrieve", ["demon"], 422, "must be an object, got list"),
        ("POST", "/retrieve", {}, 422, "exactly one of"),
        ("POST", "/retrieve", {"query": "a", "queries": ["a"]}, 422, "exactly one of"),
        ("POST", "/retrieve", {"queries": "demon"}, 422, "list of strings"),
        ("POST", "/retrieve", {"queries": ["a", 5]}, 422, "list of strings"),
        ("POST", "/retrieve", {"query": None}, 422, "query a string"),
        ("POST", "/retrieve", {"queries": ["a"] * 1025}, 422, "1024 queries, got 1025"),
        ("POST", "/retrieve", {"query": "a", "topk": -1}, 422, "topk must be a whole number from 1 to 1000, got -1"),
        ("POST", "/retrieve", {"query": "a", "topk": True}, 422, "topk must be"),
        ("POST", "/retrieve", {"query": "a", "topk": 2.0}, 422, "topk must be"),
        ("POST", "/retrieve", {"query": "a", "return_scores": "yes"}, 422, "return_scores must be true or false"),
        ("GET", "/retrieve", None, 405, "POST is needed, got GET"),
        ("POST", "/search", {"query": "a"}, 404, "there is no /search"),
        ("POST", "/retrieve", b" " * (9 << 20), 413, "8388608 bytes"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    url: str, method: str, path: str, body: object, status: int, complaint: str
) -> None:
    found, _, answer = ask(url, method, path, body)
    assert found == status and complaint in answer["detail"]


@pytest.mark.parametrize("query", ["\ud800", "a" * 100_000, "\x00", "狐 🦊"])
def test_an_odd_query_is_answered(url: str, query: str) -> None:
    assert ask(url, "POST", "/retrieve", {"query": query})[0] == 200


def test_overload_is_503_and_passes() -> None:
    held = Held()
    with RetrievalServer(held, settings=ServiceSettings(max_pending=1, max_wait_s=0, max_batch=1)) as server:
        answers: list[int] = []

        def client(query: str) -> None:
            answers.append(ask(server.url, "POST", "/retrieve", {"query": query})[0])

        first = threading.Thread(target=client, args=("first",))
        first.start()
        assert held.entered.wait(10)
        second = threading.Thread(target=client, args=("second",))
        second.start()
        deadline = time.monotonic() + 10
        while ask(server.url, "GET", "/health")[2]["stats"]["pending"] < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        status, headers, answer = ask(server.url, "POST", "/retrieve", {"query": "third"})
        assert (status, headers["retry-after"]) == (503, "1") and "queries wait already" in answer["detail"]
        held.gate.set()
        first.join(10)
        second.join(10)
        assert answers == [200, 200]


def test_a_slow_search_is_504_and_a_broken_one_500() -> None:
    held = Held()
    with RetrievalServer(held, settings=ServiceSettings(timeout_s=0.05)) as server:
        status, _, answer = ask(server.url, "POST", "/retrieve", {"query": "slow"})
        assert status == 504 and "within 0.05 s" in answer["detail"]
        held.gate.set()
    with RetrievalServer(Held(broken=True)) as server:
        status, _, answer = ask(server.url, "POST", "/retrieve", {"query": "broken"})
        assert status == 500 and "the index burned down" in answer["detail"]


def test_a_port_that_is_taken_is_said(url: str, retriever: Retriever) -> None:
    port = int(url.rpartition(":")[2])
    with pytest.raises(EnvError, match="could not start"), RetrievalServer(retriever, port=port):
        pass


def test_the_serve_command_answers_until_it_is_told_to_stop(retriever: Retriever, tmp_path: Path) -> None:
    build_index(EXCERPT, tmp_path / "i", IndexRecipe(kind="bm25"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "envs.retrieval", "serve", str(tmp_path / "i"), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        with HttpRetriever(f"http://127.0.0.1:{port}", timeout_s=60) as client:
            assert client.search(["demon Lilu"], 3) == retriever.search(["demon Lilu"], 3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate(timeout=20)


# --- the client


def test_the_client_finds_what_the_retriever_finds(url: str, retriever: Retriever) -> None:
    queries = ["demon Lilu", "...", "film director", "North Carolina"]
    with HttpRetriever(url + "/retrieve") as client:
        assert client.search(queries, 4) == retriever.search(queries, 4)
        assert client.search([], 4) == [] and client.search(["?"], 4) == [[]]
        assert client.health()["fingerprint"] == retriever.fingerprint
        again = pickle.loads(pickle.dumps(client))
        assert again.search(queries, 4) == retriever.search(queries, 4)
        again.close()
        assert isinstance(client, Retriever)


def test_many_threads_share_a_client(url: str, retriever: Retriever) -> None:
    queries = [passage.text[:40] for passage in Corpus.from_jsonl(EXCERPT)][:40]
    found: dict[str, list[Hit]] = {}
    with HttpRetriever(url) as client:

        def work(query: str) -> None:
            found[query] = client.search_one(query, 2)

        threads = [threading.Thread(target=work, args=(query,)) for query in queries]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert found == dict(zip(queries, retriever.search(queries, 2), strict=True))


def test_a_tool_may_search_over_http(url: str) -> None:
    with HttpRetriever(url) as client:
        shown = web_search_tool(client.search_one, k=1, formatter="paper").call(["demon Lilu"], {})
    assert str(shown).startswith("\nRetrieved documents:\n\n===== Document 0, similarity: ")


class Scripted:
    """An HTTP server that gives fixed answers, one a request; the last again and again. `asked` holds the bodies."""

    def __init__(self, *answers: tuple[int, object]) -> None:
        self.asked: list[dict] = []
        script = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                script.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, body = answers[min(len(script.asked), len(answers)) - 1]
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


GOOD = {"result": [[{"document": {"id": "7", "contents": '"Alû"\nA demon.'}, "score": 0.5}]]}


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_what_may_pass_is_asked_again(status: int) -> None:
    with Scripted((status, {"detail": "busy"}), (status, b"not json"), (200, GOOD)) as server:
        with HttpRetriever(server.url, timeout_s=20) as client:
            hits = client.search_one("demon", 1)
    assert hits == [Hit(passage=Passage(id="7", title="Alû", text="A demon."), score=0.5)]
    assert server.asked == [{"queries": ["demon"], "topk": 1, "return_scores": True}] * 3


@pytest.mark.parametrize("status", [400, 404, 422, 429])
def test_what_will_not_pass_is_told_at_once(status: int) -> None:
    with Scripted((status, {"detail": "no such thing"})) as server, HttpRetriever(server.url) as client:
        with pytest.raises(EnvError, match=rf"status {status}: .*no such thing"):
            client.search_one("demon", 1)
    assert len(server.asked) == 1


def test_asking_again_has_a_limit() -> None:
    with Scripted((503, {"detail": "busy"})) as server, HttpRetriever(server.url, timeout_s=1.5) as client:
        started = time.monotonic()
        with pytest.raises(EnvError, match=r"status 503: .*busy.*gave up after \d+ attempts in 1\.5 s"):
            client.search_one("demon", 1)
    assert time.monotonic() - started < 10


def test_a_server_that_is_not_there_or_silent_is_our_failure() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        with HttpRetriever(f"http://127.0.0.1:{port}", timeout_s=0.2) as client:
            with pytest.raises(EnvError, match="ConnectError"):
                client.search_one("demon", 1)
        listening.listen()  # connects, and says nothing
        with HttpRetriever(f"http://127.0.0.1:{port}", timeout_s=0.3, attempt_timeout_s=0.1) as client:
            with pytest.raises(EnvError, match="ReadTimeout"):
                client.search_one("demon", 1)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"<html>", "answered no JSON"),
        ([], '"result" must list 1 lists'),
        ({"result": []}, '"result" must list 1 lists'),
        ({"result": [["x"]]}, "a document with contents and a score are needed"),
        ({"result": [[{"document": {"id": "1"}, "score": 1}]]}, "text of passage '1'|title of passage '1'"),
        ({"result": [[{"document": {"id": "1", "contents": "x"}, "score": None}]]}, "a score are needed"),
    ],
)
def test_an_answer_of_another_shape_is_our_failure(answer: object, complaint: str) -> None:
    with Scripted((200, answer)) as server, HttpRetriever(server.url) as client:
        with pytest.raises(EnvError, match=complaint):
            client.search_one("demon", 1)


def test_documents_without_ids_get_one_and_no_more_than_k_are_kept() -> None:
    answer = {"result": [[{"document": {"contents": text}, "score": 1.0} for text in ("a", "b", "c")]]}
    with Scripted((200, answer)) as server, HttpRetriever(server.url) as client:
        hits = client.search_one("demon", 2)
    assert [hit.passage.contents for hit in hits] == ["a", "b"] and hits[0].passage.id != hits[1].passage.id


def test_wrong_settings_of_a_client_are_named() -> None:
    with pytest.raises(ValueError, match="url must begin with http:// or https://, got 'localhost:8000'"):
        HttpRetriever("localhost:8000")
    with pytest.raises(ValueError, match="must be more than 0, got 0, "):
        HttpRetriever("http://x", timeout_s=0)
