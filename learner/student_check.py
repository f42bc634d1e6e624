"""Whether a student can be trained exactly, said before its weights load: `student_tokenizer`.

It looks at the tokenizer, its chat template and the model's configuration alone. What it refuses would else be refused
row by row (a template that cannot be proven), train nonsense (another model's tokenizer), or never end a turn (no stop
token of its own).

Example::

    tokenizer = student_tokenizer("learner/base_student/checkpoint")       # ConfigError: what is wrong, and what to do
"""

from __future__ import annotations

from typing import Any

from learner.config import ConfigError
from rollout.rendering import Renderer, RenderingError
from rollout.trajectory import Message


def student_tokenizer(model_path: str) -> Any:
    """The tokenizer of the student at `model_path` (a folder or a hub name). Raises `ConfigError`."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model_path)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model_path {model_path!r} is no student: {_first_line(error)}; it needs a model's config.json and a "
            "tokenizer with a chat template"
        ) from error
    check_student(tokenizer, vocabulary=config.get_text_config().vocab_size, name=model_path)
    return tokenizer


def check_student(tokenizer: Any, *, vocabulary: int, name: str) -> None:
    """`vocabulary`: rows of the model's embedding. Raises `ConfigError`."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"student {name!r} has a tokenizer written in Python ({type(tokenizer).__name__}), which does not tell "
            "where in the text its tokens are; use the fast one (tokenizer.json)"
        )
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        raise ConfigError(
            f"student {name!r} has a tokenizer with token ids up to {largest} and a model with {vocabulary} "
            "embeddings; they are not of one model: use the model's own tokenizer, or resize its embeddings"
        )
    try:
        renderer = Renderer(tokenizer)
        talk = [
            Message(role="user", content="question"),
            Message(role="assistant", content="one"),
            Message(role="user", content="observation"),
            Message(role="assistant", content="two"),
        ]
        row, prompt = renderer.row(talk), renderer.prompt(talk[:3])
    except RenderingError as error:
        raise ConfigError(f"student {name!r} cannot be trained exactly: {error}") from error
    said = "".join(message.content + renderer.stop_token for message in talk if message.role == "assistant")
    trained = [token for token, on in zip(row.token_ids, row.trained, strict=True) if on]
    decoded = tokenizer.decode(trained, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded != said or row.token_ids[: len(prompt)] != prompt:
        raise ConfigError(
            f"student {name!r} cannot be trained exactly: its tokenizer turns {said!r} into tokens that decode to "
            f"{decoded!r}; use one that keeps text as it is, such as byte-level BPE"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
