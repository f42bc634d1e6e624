"""Small tokenizers that behave like the public ones where it matters for rows: byte-level BPE with the same splitting
rules, normalisation, special tokens and chat templates, and a vocabulary of a few hundred tokens.

The templates in `data/chat_templates` are the public text of Qwen2.5-Instruct and Llama-3-Instruct; `chatml.jinja` is a
strict ChatML of our own, whose special tokens have other names.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")
CORPUS = [
    "Thought: I add the numbers.\nCode:\n```py\nx = 12 + 345\nprint(x)\nfinal_answer(x)\n```<end_code>",
    "Observation:\nExecution logs:\n357\nLast output from code snippet:\nNone",
    "<|im_start|>user\nHow many?<|im_end|>\n<|start_header_id|>assistant<|end_header_id|>\n\nYou are Qwen.",
]
NAMES = ("qwen2.5", "llama3", "chatml")


@functools.cache
def tokenizer(name: str) -> Any:
    """One of `NAMES`; shared, so do not change it."""
    return make_tokenizer(name)


def make_tokenizer(name: str) -> Any:
    """A fresh one."""
    match name:
        case "qwen2.5":
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]
            return _make(QWEN_SPLIT, special, "qwen2_5", nfc=True, eos="<|im_end|>", pad="<|endoftext|>")
        case "llama3":
            special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
            return _make(LLAMA_SPLIT, special, "llama3", nfc=False, eos="<|eot_id|>", bos="<|begin_of_text|>")
        case "chatml":
            special = ["[PAD]", "[TURN]", "[END]"]
            return _make(QWEN_SPLIT, special, "chatml", nfc=False, eos="[END]", pad="[PAD]")
    raise ValueError(f"no tokenizer {name!r}; use one of {', '.join(NAMES)}")


def _make(
    split: str,
    special: list[str],
    template: str,
    *,
    nfc: bool,
    eos: str,
    bos: str | None = None,
    pad: str | None = None,
) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    if nfc:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=eos,
        bos_token=bos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        chat_template=(TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8"),
    )
