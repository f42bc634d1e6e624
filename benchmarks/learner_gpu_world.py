"""Students of Qwen2.5's shapes with random weights, and long made-up trajectories for them; nothing is downloaded.

The shapes are those of the published configurations of Qwen2.5-0.5B and 1.5B, vocabulary included. The tokenizer is the
base student's, whose 3,072 tokens are the first of that vocabulary: the arithmetic is the same, only the rows of the
embedding that are looked up are fewer. What the students learn means nothing; how fast they do it is what is measured.

Example::

    save_student(folder, SHAPES["0.5B"], device="cuda")
    workload = long_workload(folder, rows=300, row_tokens=4096)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learner_world import BASE_STUDENT, Workload
from envs.base import ObservationKind, Task
from learner.examples import Example, ExampleMaker
from rollout.trajectory import Completion, Span, SpanType, Step, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a Qwen2 configuration needs."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 151_936


SHAPES: Mapping[str, Shape] = {
    "0.5B": Shape(hidden=896, feed_forward=4864, layers=24, heads=14, key_heads=2),
    "1.5B": Shape(hidden=1536, feed_forward=8960, layers=28, heads=12, key_heads=2),
    "tiny": Shape(hidden=64, feed_forward=128, layers=2, heads=2, key_heads=1, vocabulary=4096),
}


def save_student(folder: Path, shape: Shape, *, device: str) -> None:
    """Random weights in bf16, configuration and tokenizer, as transformers loads them."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(BASE_STUDENT)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def long_workload(student: Path, *, rows: int, row_tokens: int) -> Workload:
    """Rows of a quarter of `row_tokens` up to nearly all of it, half of whose words the student must produce.

    Raises `RuntimeError` when a row is refused.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(4000)]
    words_each = max(1, row_tokens // 128)  # of a thought, a piece of code, an observation
    tokens_a_word = len(tokenizer(" ".join(words[:400])).input_ids) / 400
    tokens_a_turn = 3 * words_each * tokens_a_word + 30
    asked = max(1, row_tokens // 256)
    maker = ExampleMaker(tokenizer, max_row_tokens=row_tokens)
    trajectories, made = [], []
    for i in range(rows):
        turns = max(1, int(rng.uniform(0.25, 0.95) * (row_tokens - asked * tokens_a_word) / tokens_a_turn))
        steps = [_turn(words, words_each, rng, last=turn == turns - 1) for turn in range(turns)]
        question = " ".join(rng.choices(words, k=asked))
        trajectories.append(_trajectory(f"made-up-{i:05d}", question, steps))
        row = maker.make(trajectories[-1])
        if not isinstance(row, Example):
            raise RuntimeError(f"a made-up row was refused: {row}")
        made.append(row)
    return Workload(
        trajectories=tuple(trajectories), rows=tuple(made), held_out=(), rows_per_step=0, trajectories_per_s=0.0
    )


def _trajectory(key: str, question: str, steps: Sequence[Step]) -> Trajectory:
    return Trajectory(
        key=key,
        task=Task(id=key, question=question, answer="", kind="made up"),
        dialect="code",
        system_prompt="",
        steps=tuple(steps),
        policy="made up",
        reward=1.0,
        success=True,
        prediction="",
    )


def _turn(words: list[str], words_each: int, rng: random.Random, *, last: bool) -> Step:
    spans, text = list[Span](), ""

    def some() -> str:
        return " ".join(rng.choices(words, k=words_each))

    pieces: list[tuple[Any, str]] = [
        (SpanType.THOUGHT, f"Thought: {some()}\n"),
        (SpanType.FORMAT, "Code:\n```py\n"),
        (SpanType.CODE, some()),
        (SpanType.FORMAT, "\n```"),
    ]
    for kind, piece in pieces:
        spans.append(Span(type=kind, start=len(text), end=len(text) + len(piece)))
        text += piece
    return Step(
        completion=Completion(text=text, completion_tokens=2 * words_each),
        spans=tuple(spans),
        action=text,
        observation=f"Observation:\n{some()}",
        observation_kind=ObservationKind.FINAL if last else ObservationKind.OK,
    )
