"""Retrieval over a fixed set of passages: BM25, sentence embeddings, or both fused; what stands behind `web_search`.

    corpus -> index (bm25, dense over any FAISS kind, hybrid; index_folder and index_store keep them on disk)
           -> service (batches, cache) -> ray_service, ray_shards, http_server
           -> search_tool (formatting) -> the agent's `web_search(query)`

It is not a crawler and never touches the network, save to fetch an encoder that was asked for by its hub name.

Example::

    handle = start_retrieval_actor(RetrieverSpec(corpus_path="wiki.jsonl", index_folder="outputs/index"))
    tool = web_search_tool(RayRetrieverClient(handle).search, k=3, formatter="numbered")
"""

from envs.retrieval.bm25 import Bm25Retriever, Bm25Settings
from envs.retrieval.corpus import Corpus, CorpusError, Passage
from envs.retrieval.dense import DenseRetriever
from envs.retrieval.encoder_settings import EncoderError
from envs.retrieval.encoders import Encoder, TransformerEncoder, minilm_encoder
from envs.retrieval.faiss_index import SearchSettings
from envs.retrieval.formatting import FORMATTERS, format_hits
from envs.retrieval.http_client import HttpRetriever
from envs.retrieval.http_server import RetrievalServer, serve
from envs.retrieval.hybrid import HybridRetriever
from envs.retrieval.index_folder import IndexRecipe, build_index, open_index
from envs.retrieval.index_store import IndexMismatch, build_or_load
from envs.retrieval.ray_service import RayRetrieverClient, RetrievalReady, start_retrieval_actor
from envs.retrieval.ray_shards import ReplicaClient, start_replicas, start_sharded
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
    "HttpRetriever",
    "HybridRetriever",
    "IndexMismatch",
    "IndexRecipe",
    "Passage",
    "RayRetrieverClient",
    "ReplicaClient",
    "RetrievalReady",
    "RetrievalServer",
    "RetrievalService",
    "Retriever",
    "RetrieverSpec",
    "SearchSettings",
    "ServiceSettings",
    "ServiceStats",
    "TransformerEncoder",
    "build_index",
    "build_or_load",
    "format_hits",
    "minilm_encoder",
    "open_index",
    "serve",
    "start_replicas",
    "start_retrieval_actor",
    "start_sharded",
    "web_search_tool",
]
