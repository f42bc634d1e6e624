"""A PEFT adapter and the model that it was trained on become one model, for an engine to load.

Merged on load, and not served as vLLM's LoRA: the engine then runs one plain model on CPU and GPU alike, takes new
weights in place, and is as fast as any. The price is a copy of the base on disk while it is loaded. It is no store of
merged models: `learner.export` writes one to keep.

Example::

    with merged_model("Qwen/Qwen2.5-1.5B-Instruct", "runs/a/learner/student/adapter") as folder:
        policy = VllmPolicy(str(folder))
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rollout.policy import PolicyError
from rollout.trajectory import FailureClass

CONFIG_FILE = "adapter_config.json"


def base_of(adapter: str | Path) -> str:
    """The model that an adapter says it was trained on, "" when it does not say. Raises `ValueError` for no adapter."""
    file = Path(adapter) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{str(adapter)!r} is no PEFT adapter: it holds no {CONFIG_FILE}")
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


@contextlib.contextmanager
def merged_model(base: str, adapter: str) -> Iterator[Path]:
    """The folder of the merged model, in the base's own precision, with the adapter's tokenizer where it has one; it is
    gone afterwards. The merge itself is done in fp32. Raises `PolicyError` (INPUT) when the two do not fit."""
    with tempfile.TemporaryDirectory(prefix="merged-") as place:
        folder = Path(place)
        try:
            _merge(base, adapter, folder)
        except Exception as error:  # of many kinds: shapes, names, files, precision
            message = f"the adapter {adapter!r} cannot be merged into {base!r}: {type(error).__name__}: {error}"
            raise PolicyError(message, FailureClass.INPUT) from error
        yield folder


def _merge(base: str, adapter: str, folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    precision = AutoConfig.from_pretrained(base).dtype or torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(model, adapter)
    merged = with_adapter.merge_and_unload()
    merged.to(precision).save_pretrained(folder)
    has_tokenizer = (Path(adapter) / "tokenizer_config.json").is_file()
    AutoTokenizer.from_pretrained(adapter if has_tokenizer else base).save_pretrained(folder)
