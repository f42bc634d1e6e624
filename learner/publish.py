"""The student as a folder that transformers and vLLM load: weights, config, tokenizer, chat template, model card.

Written whole or not at all, readable by other users. Not a hub client: nothing is uploaded.

Example::

    export_student("runs/a/student", weights=backend.full_weights(), config=config, facts={"steps": 700})
    write_card("runs/a/student", scores={"arithmetic": 0.91})      # once it has been scored
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learner.config import LearnerConfig

FACTS_FILE = "training.json"


def export_student(
    folder: str | Path, *, weights: Mapping[str, Any], config: LearnerConfig, facts: Mapping[str, Any]
) -> Path:
    """Write the student to `folder`, replacing what is there. Returns it.

    `weights`: name -> tensor, whole, on the CPU, as the model at `config.model_path` names them (without a tied head).
    `facts`: what the card says about the training; JSON-able. Raises ValueError when the weights do not fit the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = Path(folder)
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = getattr(torch, config.export_dtype)
    tokenizer = AutoTokenizer.from_pretrained(config.model_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model_path), dtype=dtype)
    expected = set(model.state_dict())
    if model.config.tie_word_embeddings:
        expected.discard("lm_head.weight")
    if expected != set(weights):
        raise ValueError(
            f"the weights are not the model's: {sorted(expected.symmetric_difference(weights))[:4]} differ"
        )
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    # A clone per tensor: a view would drag its whole base into the file.
    model.save_pretrained(partial, state_dict={name: value.to(dtype, copy=True) for name, value in weights.items()})
    tokenizer.save_pretrained(partial)
    record = {"recipe": dataclasses.asdict(config), "facts": dict(facts), "scores": {}}
    (partial / FACTS_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    (partial / "README.md").write_text(_card(record))
    for path in partial.iterdir():
        path.chmod(0o644)  # save_pretrained leaves the weights readable by their owner alone
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, folder)
    return folder


def write_card(folder: str | Path, *, scores: Mapping[str, float]) -> None:
    """Put scores (name -> share in [0, 1]) into an exported student's card. Raises FileNotFoundError for no export."""
    folder = Path(folder)
    record = json.loads((folder / FACTS_FILE).read_text())
    record["scores"] = dict(scores)
    (folder / FACTS_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(_card(record))


def _card(record: Mapping[str, Any]) -> str:
    recipe, facts, scores = record["recipe"], record["facts"], record["scores"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, agent]",
        "---",
        "",
        "# A distilled agent",
        "",
        f"A student that was trained from `{Path(recipe['model_path']).name}` on a teacher's trajectories "
        f"with the objective `{recipe['objective']}`.",
        "It answers in the teacher's format and is meant to be run in the environments that it was trained for;",
        "it is no general assistant. The code that it writes must be run in a sandbox.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "## Training",
        "",
        *_table("fact", "value", facts),
        "",
        "## Recipe",
        "",
        *_table("setting", "value", {k: v for k, v in recipe.items() if k not in ("output_dir", "model_path")}),
    ]
    if scores:
        lines += ["", "## Scores", "", *_table("tasks", "success", {k: f"{v:.3f}" for k, v in scores.items()})]
    return "\n".join(lines) + "\n"


def _table(left: str, right: str, rows: Mapping[str, Any]) -> list[str]:
    shown = [f"| {name} | {_shown(value)} |" for name, value in rows.items()]
    return [f"| {left} | {right} |", "|---|---|", *shown]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
