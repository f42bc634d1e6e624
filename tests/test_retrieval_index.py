"""Index folders: corpora from files, encoders of any folder, every kind of index, shards, the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from envs.base import EnvError
from envs.retrieval import (
    Bm25Retriever,
    Corpus,
    CorpusError,
    EncoderError,
    IndexMismatch,
    IndexRecipe,
    Passage,
    RetrieverSpec,
    SearchSettings,
    TransformerEncoder,
    build_index,
    open_index,
)
from envs.retrieval.__main__ import main
from envs.retrieval.embedding_shards import SHARD_ROWS, encode_in_shards, shards_folder
from envs.retrieval.encoder_settings import settings_of
from envs.retrieval.faiss_index import GpuMissing, build_vector_index, factory_of, lists_for, on_device
from envs.retrieval.index_store import read_manifest
from envs.retrieval.passage_store import StoredCorpus, write_passages
from envs.retrieval.shards import Shard, ShardedRetriever

ROOT = Path(__file__).parents[1]
EXCERPT = Path(__file__).parent / "data" / "hotpot_excerpt" / "corpus.jsonl"
WORDS = "fox whale stone paint red blue grey river tower city film king song demon planet garden".split()


def make_bert(folder: Path, *, seed: int) -> str:
    """A random BERT of one layer that reads the words above; its weights are decided by `seed`."""
    import torch
    from transformers import BertConfig, BertModel
    from transformers.models.bert.tokenization_bert import BertTokenizer

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", "query", "passage", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bert(tmp_path_factory.mktemp("models") / "bert", seed=0)


def write_corpus(path: Path, count: int, *, seed: int = 0) -> Path:
    """`count` passages of eight words each."""
    random = np.random.default_rng(seed)
    lines = [
        json.dumps({"id": f"p{number}", "title": random.choice(WORDS), "text": " ".join(random.choice(WORDS, 8))})
        for number in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


QUERIES = ["red fox", "the demon of the river", "king king king", "?", "grey tower song planet"]


# --- corpora


@pytest.mark.parametrize("names", [("id", "title", "text"), ("id", "contents")])
def test_parquet_gives_the_same_corpus_as_json_lines(tmp_path: Path, names: tuple[str, ...]) -> None:
    expected = Corpus.from_jsonl(EXCERPT)
    rows = [{name: getattr(passage, name) for name in names} for passage in expected]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    found = Corpus.from_file(tmp_path / "c.parquet")
    assert list(found) == list(expected) and found.sha256 == expected.sha256


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"id": "1", "contents": "x"}, {"id": "2", "contents": None}], "row 2: contents of passage '2'.*None"),
        ([{"id": 1, "title": "t", "text": "x"}, {"id": None, "title": "t", "text": "x"}], "row 2: id must be"),
        ([{"id": "1", "body": "x"}], "columns id, title, text .*needed, got body, id"),
        ([{"id": "1", "contents": "x"}, {"id": "1", "contents": "y"}], "'1' of passage 2 is that of passage 1"),
    ],
)
def test_a_wrong_parquet_row_is_named(tmp_path: Path, rows: list[dict], complaint: str) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match=rf"c\.parquet: .*{complaint}"):
        Corpus.from_file(tmp_path / "c.parquet")


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.parquet").write_text('{"id": "1", "contents": "x"}\n')
    with pytest.raises(CorpusError, match=r"c\.parquet: cannot be read as Parquet"):
        Corpus.from_file(tmp_path / "c.parquet")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Corpus.from_file(tmp_path / "none.parquet")


def test_stored_passages_are_those_written(tmp_path: Path) -> None:
    texts = ["", "Ünïcödé 狐 🦊", "two\nlines"]
    many = [Passage(id=f"{number:x}", title=texts[number % 3], text=f"text {number}") for number in range(9_000)]
    expected = Corpus(many)
    sha256 = write_passages(iter(many), tmp_path / "p.arrow", source="many")
    stored = StoredCorpus(tmp_path / "p.arrow", sha256=sha256)
    assert sha256 == expected.sha256 and len(stored) == 9_000
    assert list(stored) == many and list(stored.slice(4_000, 8_500)) == many[4_000:8_500]
    assert [stored[row] for row in (0, 4095, 4096, 8_999)] == [many[row] for row in (0, 4095, 4096, 8_999)]
    assert (stored.tie_rank == expected.tie_rank).all()
    with pytest.raises(IndexError, match="passage 9000 of 9000"):
        stored[9_000]


# --- encoders


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_is_over_the_tokens_of_one_text(bert: str, pooling) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["red fox", "king", "a blue whale in the river city of stone"]
    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert)
    found = TransformerEncoder(bert, pooling=pooling).encode_passages(texts)
    for text, row in zip(texts, found, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        np.testing.assert_allclose(row, (vector / vector.norm()).numpy(), atol=2e-6)


def settings_in(folder: Path, name: str = "some/model", **given):
    wanted = dict.fromkeys(("pooling", "max_tokens", "query_prefix", "passage_prefix")) | given
    return settings_of(folder, name=name, **wanted)


def test_an_encoder_is_used_as_its_folder_says(bert: str, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(bert, folder)
    modules = [
        {"type": f"sentence_transformers.models.{name}", "path": path} for name, path in (("Pooling", "1_Pool"),)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pool").mkdir()
    (folder / "1_Pool" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    prompts = {"prompts": {"query": "query : ", "document": "passage : "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    encoder = TransformerEncoder(str(folder))
    assert (encoder.settings.pooling, encoder.settings.max_tokens) == ("cls", 40)
    plain = TransformerEncoder(bert, pooling="cls", max_tokens=40)
    np.testing.assert_allclose(encoder.encode_queries(["fox"]), plain.encode_queries(["query : fox"]), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_passages(["fox"]), plain.encode_passages(["passage : fox"]), atol=1e-6)
    told = settings_in(folder, pooling="mean", max_tokens=16, query_prefix="", passage_prefix="x")
    assert (told.pooling, told.max_tokens, told.query_prefix, told.passage_prefix) == ("mean", 16, "", "x")


def test_newer_pooling_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 8, "pooling_mode": "lasttoken"}')
    assert settings_in(tmp_path).pooling == "last"


def test_without_files_the_defaults_hold_and_e5_has_its_prefixes(bert: str, tmp_path: Path) -> None:
    assert settings_in(tmp_path).max_tokens == 256 and settings_in(tmp_path).pooling == "mean"
    assert settings_in(Path(bert)).max_tokens == 64, "no more than the model has positions for"
    for name in ("intfloat/e5-base-v2", "intfloat/multilingual-e5-large", "/models/e5-small"):
        assert settings_in(tmp_path, name).query_prefix == "query: "
        assert settings_in(tmp_path, name).passage_prefix == "passage: "
    for name in ("intfloat/e5-mistral-7b-instruct", "some/fe5-base", "all-MiniLM-L6-v2"):
        assert settings_in(tmp_path, name).query_prefix == ""


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("modules.json", '[{"type": "sentence_transformers.models.Dense"}]', "module 'Dense' is not supported"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "exactly one of mean, cls and last"),
        ("1_Pooling/config.json", '{"pooling_mode": "weightedmean"}', "exactly one of mean, cls and last"),
        ("modules.json", "[{", "not JSON"),
    ],
)
def test_an_encoder_that_needs_more_is_refused(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(EncoderError, match=complaint):
        settings_in(tmp_path)


# --- FAISS


def test_factories_and_lists_grow_with_the_corpus() -> None:
    assert [lists_for(count) for count in (10, 1_000, 100_000, 1_000_000)] == [1, 25, 512, 2048]
    assert factory_of("ivfpq", 100_000, 384) == "IVF512,PQ96x4fs,Refine(SQ8)"
    assert factory_of("ivfpq", 100_000, 30) == "IVF512,PQ6x4fs,Refine(SQ8)", "a divisor of the dimension"
    with pytest.raises(ValueError, match="must be one of flat, hnsw, ivfpq, sq8, sqfp16, got 'lsh'"):
        factory_of("lsh", 10, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 16 passages, got 5"):
        build_vector_index("ivfpq", np.eye(5, 8, dtype=np.float32))


def test_a_gpu_that_is_not_there_is_an_error_or_passed_over() -> None:
    import faiss

    if getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("this machine has a GPU and faiss-gpu")
    index = build_vector_index("flat", np.eye(8, dtype=np.float32))
    assert on_device(index, "auto") is index and on_device(index, "cpu") is index
    with pytest.raises(GpuMissing, match="needs faiss-gpu and a GPU"):
        on_device(index, "cuda")


# --- building and opening


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", 400)


@pytest.fixture(scope="module")
def flat(corpus_file: Path, bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "flat"
    build_index(corpus_file, folder, IndexRecipe(kind="flat", encoder=bert))
    return folder


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq", "sq8", "sqfp16"])
def test_an_approximate_index_finds_nearly_all_with_exact_scores(
    corpus_file: Path, flat: Path, bert: str, tmp_path: Path, kind
) -> None:
    manifest = build_index(corpus_file, tmp_path / "i", IndexRecipe(kind=kind, encoder=bert))
    assert manifest.facts["shards"][0]["recall_at_3"] >= 0.97
    queries = [passage.text for passage in Corpus.from_jsonl(corpus_file)][:100]
    exact = open_index(flat).search(queries, 3)
    found = open_index(tmp_path / "i").search(queries, 3)
    score = {(query, hit.passage.id): hit.score for query, hits in zip(queries, exact, strict=True) for hit in hits}
    shared = [
        (hit.score, score[query, hit.passage.id])
        for query, hits in zip(queries, found, strict=True)
        for hit in hits
        if (query, hit.passage.id) in score
    ]
    assert len(shared) >= 0.9 * len(score)
    assert all(ours == theirs for ours, theirs in shared)


def test_search_settings_are_kept_and_can_be_overridden(corpus_file: Path, bert: str, tmp_path: Path) -> None:
    manifest = build_index(corpus_file, tmp_path / "i", IndexRecipe(kind="ivfpq", encoder=bert))
    kept, told = open_index(tmp_path / "i"), open_index(tmp_path / "i", search=SearchSettings(nprobe=1, refine=2))
    from envs.retrieval.faiss_index import describe_search

    assert describe_search(kept.cpu_index) == manifest.facts["shards"][0]["search"]  # type: ignore[attr-defined]
    assert describe_search(told.cpu_index) == {"nprobe": 1, "k_factor": 2.0}  # type: ignore[attr-defined]
    assert kept.fingerprint != told.fingerprint
    with pytest.raises(ValueError, match="nprobe must be at least 1, got 0"):
        SearchSettings(nprobe=0)


@pytest.mark.parametrize("kind", ["bm25", "flat", "hybrid"])
def test_shards_find_what_one_index_finds(corpus_file: Path, bert: str, tmp_path: Path, kind) -> None:
    build_index(corpus_file, tmp_path / "one", IndexRecipe(kind=kind, encoder=bert), embeddings_cache=tmp_path)
    manifest = build_index(corpus_file, tmp_path / "three", IndexRecipe(kind=kind, encoder=bert, shards=3))
    assert [(shard["start"], shard["stop"]) for shard in manifest.facts["shards"]] == [(0, 133), (133, 266), (266, 400)]
    one, three = open_index(tmp_path / "one"), open_index(tmp_path / "three")
    for k in (1, 3, 60):
        found, expected = three.search(QUERIES, k), one.search(QUERIES, k)
        assert [[hit.passage for hit in hits] for hits in found] == [[hit.passage for hit in hits] for hits in expected]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose([hit.score for hit in ours], [hit.score for hit in theirs], atol=1.5e-6)


def test_a_shard_that_fails_fails_the_search() -> None:
    class Broken:
        def begin(self, queries, vectors, k):
            def wait(timeout_s: float):
                raise EnvError("shard 1 is gone")

            return wait

    whole = Shard(bm25=Bm25Retriever.build(Corpus([Passage(id="1", title="", text="a red fox")])))
    assert ShardedRetriever([whole], encoder=None, fuses=False, fingerprint="").search(["fox"], 1)[0]
    with pytest.raises(EnvError, match="shard 1 is gone"):
        ShardedRetriever([whole, Broken()], encoder=None, fuses=False, fingerprint="").search(["fox"], 1)


def test_the_manifest_says_what_made_the_index(flat: Path, corpus_file: Path, bert: str) -> None:
    manifest = read_manifest(flat)
    assert manifest is not None
    assert manifest.identity["corpus_sha256"] == Corpus.from_jsonl(corpus_file).sha256
    made_by, encoder = manifest.identity["encoder"], TransformerEncoder(bert)
    assert (made_by["dim"], made_by["dtype"], made_by["weights_sha256"]) == (32, "float32", encoder.weights_sha256)
    settings = {"pooling": "mean", "max_tokens": 64, "query_prefix": "", "passage_prefix": ""}
    assert made_by["settings"] == settings and made_by["fingerprint"] == encoder.fingerprint
    assert {"faiss-cpu", "torch", "transformers"} <= set(manifest.versions) or "faiss-gpu" in manifest.versions
    assert not (flat / ".work").exists(), "nothing of the building is left"


def test_the_same_index_is_not_built_again_and_another_is_an_error(
    flat: Path, corpus_file: Path, bert: str, tmp_path: Path
) -> None:
    before = read_manifest(flat)
    assert build_index(corpus_file, flat, IndexRecipe(kind="flat", encoder=bert)) == before
    with pytest.raises(IndexMismatch, match="kind 'flat', 'sq8' is needed"):
        build_index(corpus_file, flat, IndexRecipe(kind="sq8", encoder=bert))
    with pytest.raises(IndexMismatch, match="corpus_sha256"):
        build_index(write_corpus(tmp_path / "c", 50), flat, IndexRecipe(kind="flat", encoder=bert))
    with pytest.raises(IndexMismatch, match="encoder"):
        build_index(corpus_file, flat, IndexRecipe(kind="flat", encoder=bert, query_prefix="query: "))
    assert read_manifest(flat) == before


def test_an_index_of_something_else_is_replaced_when_asked(bert: str, tmp_path: Path) -> None:
    recipe = IndexRecipe(kind="bm25")
    build_index(write_corpus(tmp_path / "a", 20), tmp_path / "i", recipe)
    build_index(write_corpus(tmp_path / "b", 30), tmp_path / "i", recipe, replace=True)
    manifest = read_manifest(tmp_path / "i")
    assert manifest is not None and manifest.identity["count"] == 30
    assert len(list((tmp_path / "i").glob("data-*"))) == 1


def test_another_encoder_at_load_is_an_error(corpus_file: Path, bert: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(bert, model)
    build_index(corpus_file, tmp_path / "i", IndexRecipe(kind="flat", encoder=str(model)))
    other = make_bert(tmp_path / "other", seed=1)
    with pytest.raises(IndexMismatch, match="was made by .* with weights"):
        open_index(tmp_path / "i", encoder=other)
    expected = open_index(tmp_path / "i").search(QUERIES, 3)
    shutil.rmtree(model)
    with pytest.raises(EncoderError, match="was made by the encoder"):
        open_index(tmp_path / "i")
    assert open_index(tmp_path / "i", encoder=bert).search(QUERIES, 3) == expected, "the same model elsewhere"


def test_queries_may_be_encoded_in_another_dtype(flat: Path) -> None:
    full, half = open_index(flat), open_index(flat, dtype="bfloat16")
    assert full.fingerprint != half.fingerprint
    best, found = full.search(["red fox river"], 1)[0][0], half.search(["red fox river"], 1)[0][0]
    assert found.score == pytest.approx(best.score, abs=0.02)


@pytest.mark.parametrize("damage", ["swapped", "cut", "no manifest"])
def test_a_damaged_index_is_refused(corpus_file: Path, tmp_path: Path, damage: str) -> None:
    build_index(corpus_file, tmp_path / "i", IndexRecipe(kind="bm25"))
    (file,) = (tmp_path / "i").glob("data-*/shard-0000/passages.arrow")
    content = bytearray(file.read_bytes())
    if damage == "swapped":
        at = content.index(b"king")
        content[at : at + 4] = b"song"  # the same size
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        (tmp_path / "i" / "manifest.json").unlink()
    complaint = {"swapped": "checksum", "cut": "damaged", "no manifest": "holds no index"}[damage]
    with pytest.raises(IndexMismatch, match=complaint):
        open_index(tmp_path / "i")


def test_a_killed_build_goes_on_where_it_was(bert: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", SHARD_ROWS + 200)
    program = textwrap.dedent(f"""
        import os, signal
        from envs.retrieval import IndexRecipe, build_index
        def die(what, done, total):
            if what == "encoding passages":
                os.kill(os.getpid(), signal.SIGKILL)
        recipe = IndexRecipe(kind="flat", encoder={bert!r})
        build_index({str(corpus)!r}, {str(tmp_path / "i")!r}, recipe, on_progress=die)
    """)
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=90, check=False)
    assert killed.returncode == -signal.SIGKILL
    (shard,) = (tmp_path / "i").rglob("rows-*.npy")
    shard.write_bytes(shard.read_bytes()[:-128] + np.full(32, 7, np.float32).tobytes())  # marked: it must be used as is
    build_index(corpus, tmp_path / "i", IndexRecipe(kind="flat", encoder=bert))
    embeddings = np.load(next((tmp_path / "i").rglob("embeddings.npy")))
    assert (embeddings[SHARD_ROWS - 1] == 7).all() and len(embeddings) == SHARD_ROWS + 200
    expected = TransformerEncoder(bert).encode_passages([p.contents for p in list(Corpus.from_jsonl(corpus))[-200:]])
    np.testing.assert_allclose(embeddings[-200:], expected, atol=1e-5)
    assert len(list((tmp_path / "i").glob("data-*"))) == 1 and not list((tmp_path / "i").rglob("rows-*"))


def test_shards_of_embeddings_belong_to_corpus_and_encoder(bert: str, tmp_path: Path) -> None:
    corpus = Corpus([Passage(id="1", title="", text="fox")])
    first, other = TransformerEncoder(bert), TransformerEncoder(bert, pooling="cls")
    kept = encode_in_shards(corpus, first, tmp_path)
    assert shards_folder(corpus, first, tmp_path) != shards_folder(corpus, other, tmp_path)
    assert not np.allclose(kept, encode_in_shards(corpus, other, tmp_path))
    path = shards_folder(corpus, first, tmp_path) / "rows-0000000000.npy"
    path.write_bytes(path.read_bytes()[:-4])
    assert (encode_in_shards(corpus, first, tmp_path) == kept).all(), "a cut shard is encoded again"


def test_a_spec_of_a_folder_opens_its_index(corpus_file: Path, tmp_path: Path) -> None:
    build_index(corpus_file, tmp_path / "i", IndexRecipe(kind="bm25", shards=2))
    spec = RetrieverSpec(index_folder=str(tmp_path / "i"))
    assert spec.build().search(QUERIES, 3) == Bm25Retriever.build(Corpus.from_jsonl(corpus_file)).search(QUERIES, 3)


def test_wrong_recipes_are_refused(corpus_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be one of bm25, hybrid, .* got 'dense'"):
        IndexRecipe(kind="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="401 shards of 400 passages"):
        build_index(corpus_file, tmp_path / "i", IndexRecipe(kind="bm25", shards=401))
    assert IndexRecipe().vector_kind(200_000) == "flat" and IndexRecipe().vector_kind(200_001) == "ivfpq"


# --- the command line


def test_the_command_indexes_and_searches(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "i")
    corpus = str(write_corpus(tmp_path / "c.jsonl", 60))
    assert main(["index", corpus, "--out", out, "--kind", "hybrid", "--encoder", bert, "--threads", "1"]) == 0
    assert "60 passages, hybrid" in capsys.readouterr().out
    assert main(["search", out, "red", "fox", "-k", "2"]) == 0
    shown = capsys.readouterr().out
    assert "[1] " in shown and "[2] " in shown and "[3] " not in shown and "2 passages in" in shown


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["search", "{tmp}/none", "fox"], "holds no index; make one with: python -m envs.retrieval index"),
        (["index", "{tmp}/none.jsonl", "--out", "{tmp}/i"], "there is no such file of passages"),
        (["index", "{tmp}/bad.jsonl", "--out", "{tmp}/i", "--kind", "bm25"], "bad.jsonl:1: not JSON"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], complaint: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    assert main([part.format(tmp=tmp_path) for part in command]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert complaint in line
