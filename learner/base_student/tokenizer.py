"""The base student's tokenizer: byte-level BPE with single digits, from common words and syllables of made-up names.

Byte fallback means that any text encodes and decodes to itself. It is also shown the marks of agent formats and of
Markdown, because a pretrained model's tokenizer knows those strings; the model itself never sees them in pretraining.

    >>> build_tokenizer(seed=0).tokenize("x = 4821")     # ['x', 'Ġ=', 'Ġ', '4', '8', '2', '1']
"""

import random
from typing import TYPE_CHECKING, Any

from learner.base_student.generic_text import END_OF_TEXT, TURN_END, TURN_START
from learner.base_student.made_up import name_syllables
from learner.base_student.word_lists import (
    ADJECTIVES,
    FIELD_NAMES,
    FUNCTION_WORDS,
    NOUNS,
    OTHER_VERBS,
    PYTHON_WORDS,
    UNITS,
    VERBS_PAST,
)

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

VOCABULARY_SIZE = 3072
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Finer than Qwen2's own split, for learning merges alone: a capital starts a piece, so that no merge joins a name to
# the mark before it and a name is the same tokens everywhere.
_MERGES_WITHIN = r"[A-Z][a-z]*| ?[a-z]+|_[a-z]+|[^A-Za-z]+"

# What a tokenizer of a pretrained model knows besides words: marks of Markdown, of code and of agent formats.
_FORMAT_STRINGS = (
    "Thought:",
    "Code:\n```py\n",
    "```python\n",
    "\n```<end_code>",
    "<end_code>",
    "Observation:\n",
    "Execution logs:\n",
    "Last output from code snippet:\nNone",
    'print(web_search("Name"))',
    'web_search(query="Name")',
    "final_answer(4821)",
    'final_answer("Name")',
    '<tool_call>\n{"name": "web_search", "arguments": {"query": "Name"}}\n</tool_call>',
    "<think>\n</think>",
    "[1] Title: text",
    "# A\n# 1\n# A\n# a",
    "x = x + 1\nx = x - 1\nx = x * 2\nx = x // 2\nx = x % 2",
    'd["key"] = {"a": 1, "b": [1, 2]}',
    "f\"{x}\", '{y}'",
    "for i in range(10):\n    print(i)\n        return x",
    "Error: NameError: name 'x' is not defined. No results found. Out of time.",
    "user\nassistant\nsystem\nuser\nassistant\ntool\nAnswer: 1",
    "How many. Where is. What was. Who. When. In which. Then. There are. Find the. Apply each. After that. Its.",
    "Each of the.",
    "A, A; A: A. A? A! A - A / A | A -> A = A + A > A < A (A) [A] {A} \"A\" 'A' * A # A",
    "a, a; a: a. a? a! a - a / a | a -> a = a + a > a < a (a) [a] {a} \"a\" 'a' * a # a",
    '["A", "A"], {"a": "A", "a": 1} ("A") (\'A\') print("A") print(a) ">>> a = 1" x["a"] == != <= >= += -= ** // % **',
)


def training_text(seed: int) -> list[str]:
    """What the merges are learnt from: syllables of names, words in every form, format strings."""
    rng = random.Random(seed)
    text = []
    for _ in range(300_000):  # syllable by syllable, or else merges across syllables win and names fall to letters
        first, *rest = name_syllables(rng)
        text += [first.capitalize(), *rest]
    common = {*FUNCTION_WORDS, *NOUNS, *ADJECTIVES, *VERBS_PAST, *OTHER_VERBS, *UNITS, *FIELD_NAMES, *PYTHON_WORDS}
    for word in sorted(common):
        text += [f" {word}"] * 200 + [word.capitalize(), word] * 20
    for noun in NOUNS:
        text += [f" {noun}s"] * 120 + [noun.capitalize()] * 60
    return text + list(_FORMAT_STRINGS) * 1500


def build_tokenizer(seed: int, vocabulary_size: int = VOCABULARY_SIZE) -> "Qwen2Tokenizer":
    """Train the tokenizer; a few seconds on one core, the same seed gives the same one.

    It is a `Qwen2Tokenizer`, because that is what `AutoTokenizer` makes of any tokenizer beside a Qwen2 model
    (transformers 5.19), with Qwen2's way of splitting text whatever the files say. Every digit is a token there,
    so that a number is copied digit by digit. Text comes back in Unicode's composed form (NFC).
    """
    import json

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.Split(Regex(_MERGES_WITHIN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        show_progress=False,
    )
    bpe.train_from_iterator(training_text(seed), trainer)
    learnt: Any = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        padding_side="left",
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
