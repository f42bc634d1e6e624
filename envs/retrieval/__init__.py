"""Retrieval over a fixed set of passages: BM25, sentence embeddings, or both fused; what stands behind `web_search`.

    corpus -> index (bm25, dense, hybrid; index_store keeps them on disk) -> service (batches, cache) -> ray_service
           -> search_tool (formatting) -> the agent's `web_search(query)`

It is not a crawler and never touches the network, save to fetch an encoder that was asked for by its hub name.

Example::

    handle = start_retrieval_actor(RetrieverSpec(corpus_path="wiki.jsonl", index_folder="outputs/index"))
    tool = web_search_tool(RayRetrieverClient(handle).search, k=3, formatter="numbered")
"""

from envs.retrieval.bm25 import Bm25Retriever, Bm25Settings
from envs.retrieval.corpus import Corpus, CorpusError, Passage
from envs.retrieval.dense import DenseRetriever
from envs.retrieval.encoders import Encoder, EncoderError, TransformerEncoder, minilm_encoder
from envs.retrieval.formatting import FORMATTERS, format_hits
from envs.retrieval.hybrid import HybridRetriever
from envs.retrieval.index_store import IndexMismatch, build_or_load
from envs.retrieval.ray_service import RayRetrieverClient, RetrievalReady, start_retrieval_actor
from envs.retrieval.retriever import Hit, Retriever
from envs.retrieval.search_tool import web_search_tool
from envs.retrieval.service import RetrievalService, ServiceSettings, ServiceStats
from envs.retrieval.spec import RetrieverSpec

__all__ = [
    "FORMATTERS",
    "Bm25Retriever",
    "Bm25Settings",
    "Corpus",
    "CorpusError",
    "DenseRetriever",
    "Encoder",
    "EncoderError",
    "Hit",
    "HybridRetriever",
    "IndexMismatch",
    "Passage",
    "RayRetrieverClient",
    "Retriever",
    "RetrievalReady",
    "RetrievalService",
    "RetrieverSpec",
    "ServiceSettings",
    "ServiceStats",
    "TransformerEncoder",
    "build_or_load",
    "format_hits",
    "minilm_encoder",
    "start_retrieval_actor",
    "web_search_tool",
]
