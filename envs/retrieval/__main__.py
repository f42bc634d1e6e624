"""`python -m envs.retrieval index|search|serve`: make an index of a corpus, ask it, put it behind HTTP.

Example::

    python -m envs.retrieval index wiki.jsonl --out outputs/wiki --kind hybrid
    python -m envs.retrieval search outputs/wiki "first king of Norway"
    python -m envs.retrieval serve outputs/wiki --port 8000
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, get_args

from envs.base import EnvError
from envs.retrieval.corpus import CorpusError
from envs.retrieval.encoder_settings import EncoderError
from envs.retrieval.faiss_index import GpuMissing, SearchSettings, VectorKind
from envs.retrieval.index_folder import IndexKind, IndexRecipe, build_index, open_index


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what was asked, 2 when it could not, with one line on stderr that says why."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return options.run(options)
    except (CorpusError, EncoderError, EnvError, GpuMissing, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run it again to go on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m envs.retrieval", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="index|search|serve")

    index = commands.add_parser("index", help="index a corpus into a folder; a killed run goes on where it was")
    index.add_argument("corpus", help="passages: JSON lines or Parquet with id, title, text, or id, contents")
    index.add_argument("--out", required=True, help="the index's folder")
    index.add_argument("--kind", choices=get_args(IndexKind), default="hybrid", help="default: hybrid")
    index.add_argument(
        "--vectors", choices=["auto", *get_args(VectorKind)], default="auto", help="vector index of a hybrid"
    )
    index.add_argument("--encoder", default="minilm", help='"minilm" (packaged), a folder, or a Hugging Face name')
    index.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="what to encode passages in")
    index.add_argument("--query-prefix", help="default: as the encoder's folder says")
    index.add_argument("--passage-prefix", help="default: as the encoder's folder says")
    index.add_argument("--pooling", choices=["mean", "cls", "last"], help="default: as the encoder's folder says")
    index.add_argument("--max-tokens", type=int, help="longer texts are cut; default: as the encoder's folder says")
    index.add_argument("--shards", type=int, default=1, help="parts for processes of their own")
    index.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU; default: all")
    index.add_argument("--device", default="cpu", help="where to encode: cpu, cuda")
    index.add_argument("--embeddings-cache", help="keep embeddings here for further indexes of the same corpus")
    index.add_argument("--replace", action="store_true", help="replace an index of something else")
    index.set_defaults(run=_index)

    search = commands.add_parser("search", help="ask an index")
    _opening(search)
    search.add_argument("query", nargs="+")
    search.add_argument("-k", type=int, default=3, help="passages to show; default: 3")
    search.set_defaults(run=_search)

    serve = commands.add_parser("serve", help="answer Search-R1's POST /retrieve over HTTP")
    _opening(serve)
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--topk", type=int, default=3, help="passages for a request that names no topk")
    serve.add_argument("--max-batch", type=int, default=32)
    serve.add_argument("--max-pending", type=int, default=4096, help="waiting queries beyond which the answer is 503")
    serve.add_argument("--timeout-s", type=float, default=30.0)
    serve.add_argument("--cache", type=int, default=20_000, help="results kept; 0 for none")
    serve.set_defaults(run=_serve)
    return parser


def _opening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="what `index --out` made")
    parser.add_argument("--encoder", help="where the encoder's model is now, if it has moved")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="to encode queries in; default: as passages")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="for the vector index")
    for name in ("nprobe", "refine", "ef-search"):
        parser.add_argument(
            f"--{name}", type=int, help="of an approximate index; default: as measured when it was made"
        )


def _open(options: argparse.Namespace) -> Any:
    return open_index(
        options.folder,
        encoder=options.encoder,
        dtype=options.dtype,
        device=options.device,
        search=SearchSettings(nprobe=options.nprobe, refine=options.refine, ef_search=options.ef_search),
    )


def _index(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    recipe = IndexRecipe(
        kind=options.kind,
        vectors=options.vectors,
        encoder=options.encoder,
        dtype=options.dtype,
        query_prefix=options.query_prefix,
        passage_prefix=options.passage_prefix,
        pooling=options.pooling,
        max_tokens=options.max_tokens,
        shards=options.shards,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        manifest = build_index(
            options.corpus,
            options.out,
            recipe,
            replace=options.replace,
            threads=options.threads,
            device=options.device,
            embeddings_cache=options.embeddings_cache,
            on_progress=show,
        )
    identity = manifest.identity
    print(
        f"{options.out}: {identity['count']} passages, {identity['kind']}, {sum(manifest.files.values()) / 1e6:.1f} MB"
    )
    for number, facts in enumerate(manifest.facts["shards"]):
        if "recall_at_3" in facts:
            print(f"shard {number}: {identity['vectors']} finds {facts['recall_at_3']:.3f} of exact search's first 3")
    return 0


def _search(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    retriever = _open(options)
    query = " ".join(options.query)
    retriever.search(["warm up"], 1)
    started = time.perf_counter()
    hits = retriever.search([query], options.k)[0]
    seconds = time.perf_counter() - started
    console = Console()
    for number, hit in enumerate(hits, start=1):
        console.print(Text(f"[{number}] {hit.passage.title or hit.passage.id}", style="bold"), end="")
        console.print(Text(f"  {hit.score:.4f}  id {hit.passage.id}", style="dim"))
        console.print(Text(hit.passage.text))
    print(f"{len(hits)} passages in {1000 * seconds:.1f} ms")
    return 0


def _serve(options: argparse.Namespace) -> int:
    from envs.retrieval.http_server import serve
    from envs.retrieval.service import ServiceSettings

    settings = ServiceSettings(
        max_batch=options.max_batch,
        max_pending=options.max_pending,
        timeout_s=options.timeout_s,
        cache_entries=options.cache,
    )
    retriever = _open(options)
    retriever.search(["warm up"], 1)
    serve(retriever, host=options.host, port=options.port, settings=settings, default_topk=options.topk)
    return 0


if __name__ == "__main__":
    sys.exit(main())
