"""The student as a folder that transformers, PEFT and vLLM load: weights, tokenizer, chat template, model card.

Whole weights (`export_student`), or adapters alone as PEFT writes them (`export_adapter`). Written whole or not at all,
readable by other users. Not a hub client: nothing is uploaded.

Example::

    export_student("runs/a/student", weights=backend.full_weights(), config=config, facts={"steps": 700})
    write_card("runs/a/student", scores={"arithmetic": 0.91})      # once it has been scored
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from learner.config import LearnerConfig

FACTS_FILE = "training.json"
ADAPTER_FOLDER = "adapter"
"""Inside the student's folder, where both are exported."""


def export_student(
    folder: str | Path,
    *,
    weights: Mapping[str, Any],
    config: LearnerConfig,
    facts: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> Path:
    """Write the student to `folder`, replacing what is there. Returns it.

    `weights`: name -> tensor, whole, on the CPU, as the model at `config.model_path` names them (without a tied head).
    `facts`, `data`: what the card says about the training and about what it was trained on; JSON-able. `adapters`: also
    written, to `adapter/` in it. Raises ValueError when the weights do not fit the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, config.export_dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model_path), dtype=dtype)
    expected = set(model.state_dict())
    if model.config.tie_word_embeddings:
        expected.discard("lm_head.weight")
    if expected != set(weights):
        raise ValueError(
            f"the weights are not the model's: {sorted(expected.symmetric_difference(weights))[:4]} differ"
        )
    with _replacing(Path(folder)) as partial:
        model.config.use_cache = True
        _write_surroundings(partial, config, facts, data)
        # A clone per tensor: a view would drag its whole base into the file.
        model.save_pretrained(partial, state_dict={name: value.to(dtype, copy=True) for name, value in weights.items()})
        if adapters is not None:
            from learner.adapters import write_adapter

            write_adapter(partial / ADAPTER_FOLDER, adapters, config, dtype)
            _write_card(partial / ADAPTER_FOLDER, _record(config, facts, data))
    return Path(folder)


def export_adapter(
    folder: str | Path,
    *,
    adapters: Mapping[str, Any],
    config: LearnerConfig,
    facts: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapters alone, with the tokenizer and a card: what `PeftModel.from_pretrained` and vLLM's LoRA load on
    top of the model at `config.model_path`. `adapters`: name -> tensor on the CPU, as the PEFT model names them."""
    import torch

    from learner.adapters import write_adapter

    with _replacing(Path(folder)) as partial:
        write_adapter(partial, adapters, config, getattr(torch, config.export_dtype))
        _write_surroundings(partial, config, facts, data)
    return Path(folder)


def write_card(folder: str | Path, *, scores: Mapping[str, float]) -> None:
    """Put scores (name -> share in [0, 1]) into an exported student's card. Raises FileNotFoundError for no export."""
    folder = Path(folder)
    record = json.loads((folder / FACTS_FILE).read_text())
    record["scores"] = dict(scores)
    _write_card(folder, record)


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the other's place when all went well."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in partial.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # save_pretrained leaves weights readable by their owner alone
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, folder)


def _write_surroundings(
    folder: Path, config: LearnerConfig, facts: Mapping[str, Any], data: Mapping[str, Any] | None
) -> None:
    """All but the weights: tokenizer with chat template, generation config, card."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(config.model_path)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    ).save_pretrained(folder)
    _write_card(folder, _record(config, facts, data))


def _record(config: LearnerConfig, facts: Mapping[str, Any], data: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"recipe": dataclasses.asdict(config), "facts": dict(facts), "data": dict(data or {}), "scores": {}}


def _write_card(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / FACTS_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(_card(record, adapter=(folder / "adapter_config.json").exists()))


def _card(record: Mapping[str, Any], *, adapter: bool) -> str:
    recipe, facts, scores = record["recipe"], record["facts"], record["scores"]
    base = Path(recipe["model_path"]).name
    lines = [
        "---",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [distillation, agent]",
        "---",
        "",
        "# A distilled agent",
        "",
        f"A student that was trained from `{base}` on a teacher's trajectories "
        f"with the objective `{recipe['objective']}`.",
        "It answers in the teacher's format and is meant to be run in the environments that it was trained for;",
        "it is no general assistant. The code that it writes must be run in a sandbox.",
        "",
        "```python",
        *(_adapter_usage(base) if adapter else _USAGE),
        "```",
        "",
        "## Training",
        "",
        *_table("fact", "value", facts),
        "",
    ]
    if record.get("data"):
        lines += ["## Data", "", *_table("fact", "value", record["data"]), ""]
    lines += [
        "## Recipe",
        "",
        *_table("setting", "value", {k: v for k, v in recipe.items() if k not in ("output_dir", "model_path")}),
    ]
    if scores:
        lines += ["", "## Scores", "", *_table("tasks", "success", {k: f"{v:.3f}" for k, v in scores.items()})]
    return "\n".join(lines) + "\n"


_USAGE = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
    'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
)


def _adapter_usage(base: str) -> tuple[str, ...]:
    return (
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        f'base = AutoModelForCausalLM.from_pretrained("path/to/{base}")',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    )


def _table(left: str, right: str, rows: Mapping[str, Any]) -> list[str]:
    shown = [f"| {name} | {_shown(value)} |" for name, value in rows.items()]
    return [f"| {left} | {right} |", "|---|---|", *shown]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
