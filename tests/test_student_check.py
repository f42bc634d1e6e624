"""learner.student_check: a student that cannot be trained exactly is refused with a line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from learner_samples import TOKENIZER, save_tiny_student
from tokenizer_samples import NAMES, make_tokenizer

from learner.config import ConfigError, LearnerConfig
from learner.student_check import check_student, student_tokenizer
from rollout.rendering import Renderer, RenderingError
from rollout.trajectory import Message


@pytest.mark.parametrize("name", NAMES)
def test_the_public_templates_are_taken(name: str) -> None:
    check_student(make_tokenizer(name), vocabulary=1000, name=name)


def test_the_starter_student_is_taken() -> None:
    assert student_tokenizer(str(TOKENIZER)).eos_token == "<|im_end|>"


def without_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None


def pad_is_stop(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token


def without_stop(tokenizer: Any) -> None:
    tokenizer.eos_token = None


def other_stop(tokenizer: Any) -> None:
    """As a base model's tokenizer has it, whose template is its chat sibling's."""
    tokenizer.pad_token, tokenizer.eos_token = "<|fim_prefix|>", "<|endoftext|>"


def old_turns_change(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_start|>' + message.role + '\\n'",
        "'<|im_start|>' + message.role + ('\\n<think>\\n' if loop.last and message.role == 'assistant' else '\\n')",
    )


def refuses_roles(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('only one user message, please') }}"


def changes_text(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("o", "0")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (without_template, r"has no chat template; give it one"),
        (pad_is_stop, r"pads with its stop token '<\|im_end\|>'; set another pad token"),
        (without_stop, "has no eos token"),
        (other_stop, r"does not end an assistant turn with the stop token '<\|endoftext\|>' but with '<\|im_end\|>"),
        (old_turns_change, "renders earlier turns differently"),
        (refuses_roles, "the chat template refuses the roles .*only one user message, please"),
        (changes_text, "tokens that decode to '0ne"),
    ],
)
def test_an_unfit_student_is_refused_with_a_clear_line(spoil: Callable[[Any], None], complaint: str) -> None:
    tokenizer = make_tokenizer("qwen2.5")
    spoil(tokenizer)
    with pytest.raises(ConfigError, match="student 'mine' cannot be trained exactly: .*" + complaint):
        check_student(tokenizer, vocabulary=1000, name="mine")


def test_another_models_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="token ids up to 382 and a model with 300 embeddings"):
        check_student(make_tokenizer("qwen2.5"), vocabulary=300, name="mine")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no student"):
        student_tokenizer(str(tmp_path))


def test_the_learner_refuses_it_before_anything_loads(tmp_path: Path) -> None:
    from learner_samples import ListSource

    from learner.trainer import Learner

    student = save_tiny_student(tmp_path / "student")
    make_tokenizer("qwen2.5").save_pretrained(student)
    (student / "chat_template.jinja").unlink()
    config = LearnerConfig(model_path=str(student), output_dir=str(tmp_path / "out"), epochs=1)
    with pytest.raises(ConfigError, match="has no chat template"):
        Learner(config, ListSource([]))


def test_what_a_template_refuses_is_a_rendering_error() -> None:
    """And so a refused row, not the end of the run."""
    renderer = Renderer(make_tokenizer("chatml"))
    late_system = [Message(role="user", content="q"), Message(role="system", content="s")]
    with pytest.raises(RenderingError, match="refuses the roles user, system: system prompt goes first"):
        renderer.prompt(late_system)
