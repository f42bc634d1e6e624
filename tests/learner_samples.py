"""What the learner's tests share: made-up trajectories, a source that is a list, and a student of 0.2 M parameters."""

from __future__ import annotations

import random
import time
from pathlib import Path

from envs.base import ObservationKind, Task
from learner.examples import Example, ExampleMaker
from rollout.trajectory import Completion, Span, SpanType, Step, Trajectory

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "learner" / "base_student" / "checkpoint"


def turn(thought: str, code: str, observation: str, kind: ObservationKind = ObservationKind.OK) -> Step:
    """A step with all spans that a code turn has."""
    pieces = [
        (SpanType.THOUGHT, f"Thought: {thought}\n"),
        (SpanType.FORMAT, "Code:\n```py\n"),
        (SpanType.CODE, code),
        (SpanType.FORMAT, "\n```"),
    ]
    spans, text = [], ""
    for span, piece in pieces:
        spans.append(Span(type=span, start=len(text), end=len(text) + len(piece)))
        text += piece
    return Step(
        completion=Completion(text=text, completion_tokens=len(text.split())),
        spans=tuple(spans),
        action=code,
        observation=observation,
        observation_kind=kind,
    )


def trajectory(i: int, *, system_prompt: str = "", success: bool = True) -> Trajectory:
    """The i-th one: two turns, 2 to 6 numbers, so rows differ in length."""
    rng = random.Random(i)
    numbers = [rng.randint(10, 9999) for _ in range(rng.randint(2, 6))]
    total = str(sum(numbers))
    lines = [f"x{j} = {number}  # {number} crates" for j, number in enumerate(numbers)]
    code = "\n".join([*lines, f"print({' + '.join(f'x{j}' for j in range(len(numbers)))})"])
    question = f"A farm has {', then '.join(f'{number} crates' for number in numbers)}. How many crates are there?"
    return Trajectory(
        key=f"task-{i:04d}|script|0|0",
        task=Task(id=f"task-{i:04d}", question=question, answer=total, kind="arithmetic"),
        dialect="code",
        system_prompt=system_prompt,
        steps=(
            turn("I add the numbers of crates.", code, f"Observation:\nExecution logs:\n{total}"),
            turn(f"The total is {total}.", f"final_answer({total})", total, ObservationKind.FINAL),
        ),
        policy="script",
        reward=1.0 if success else 0.0,
        success=success,
        prediction=total,
    )


class ListSource:
    """A `TrajectorySource` over a list; `pause_s` before each batch of `batch` after the first, like a slow rollout."""

    def __init__(self, trajectories: list[Trajectory], *, batch: int = 64, pause_s: float = 0.0) -> None:
        self._left = list(trajectories)
        self._batch = batch
        self._pause_s = pause_s
        self._begun = False

    def next(self, max_trajectories: int, timeout_s: float) -> list[Trajectory] | None:
        if self._begun and self._pause_s:
            time.sleep(min(self._pause_s, timeout_s))
        self._begun = True
        if not self._left:
            return None
        count = min(max_trajectories, self._batch)
        given, self._left = self._left[:count], self._left[count:]
        return given


class SilentSource:
    """Brings nothing and never ends."""

    def next(self, max_trajectories: int, timeout_s: float) -> list[Trajectory] | None:
        time.sleep(min(timeout_s, 0.1))
        return []


def example_of(maker: ExampleMaker, of: Trajectory) -> Example:
    """Its row; the test ends where there is none."""
    made = maker.make(of)
    assert isinstance(made, Example), made
    return made


def save_tiny_student(folder: Path) -> Path:
    """A Qwen2 of two layers with the starter student's tokenizer, written to `folder`."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=3072,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
