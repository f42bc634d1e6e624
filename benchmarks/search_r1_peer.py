"""A retrieval server built the way Search-R1's is: what `benchmarks/retrieval.py` measures ours beside.

A synchronous FastAPI endpoint in its thread pool, each call encoding and searching its own queries, FAISS Flat with its
default settings. Kinder to it than the original: one thread a call and no progress bar on stderr.

Design: https://github.com/PeterGriffinJin/Search-R1, search_r1/search/retrieval_server.py.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import faiss
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModel, AutoTokenizer


class QueryRequest(BaseModel):
    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


class PeerEncoder:
    """Mean pooling over a BERT-like model, one padded batch a call."""

    def __init__(self, folder: str) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    @torch.no_grad()
    def encode(self, queries: list[str]) -> np.ndarray:
        inputs = self._tokenizer(queries, max_length=256, padding=True, truncation=True, return_tensors="pt")
        output = self._model(**inputs, return_dict=True)
        mask = inputs["attention_mask"]
        hidden = output.last_hidden_state.masked_fill(~mask[..., None].bool(), 0.0)
        pooled = hidden.sum(dim=1) / mask.sum(dim=1)[..., None]
        return torch.nn.functional.normalize(pooled, dim=-1).numpy().astype(np.float32, order="C")


def app_of(encoder: PeerEncoder, embeddings: np.ndarray, documents: list[dict[str, str]]) -> FastAPI:
    index: Any = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(np.ascontiguousarray(embeddings))
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/retrieve")
    def retrieve(request: QueryRequest) -> dict[str, Any]:
        scores, rows = index.search(encoder.encode(request.queries), request.topk or 3)
        found = []
        for of_query, of_scores in zip(rows.tolist(), scores.tolist(), strict=True):
            shown = [documents[row] for row in of_query]
            if request.return_scores:
                pairs = zip(shown, of_scores, strict=True)
                found.append([{"document": document, "score": score} for document, score in pairs])
            else:
                found.append(shown)
        return {"result": found}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--embeddings", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    with open(options.corpus, encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    app = app_of(PeerEncoder(options.model), np.load(options.embeddings), documents)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
