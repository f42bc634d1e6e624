"""The base student: a small checkpoint that loads, a tokenizer for any text, generic text that gives nothing away."""

import itertools
import json
import re

import pytest

from learner.base_student import BASE_STUDENT_FOLDER
from learner.base_student.generic_text import Document, documents

AGENT_MARKS = (
    "web_search",
    "final_answer",
    "Thought:",
    "Code:\n",
    "Observation:",
    "Execution logs",
    "Last output",
    "end_code",
    "```py\n",
    "tool_call",
    "\nAnswer:",
)
TASK_PHRASES = (
    r"\bbuys \d",
    r"\bsells \d",
    r"\bgives away \d",
    r"\bHow many\b",
    r"\bIn which (city|country|year)\b",
    r"\bwritten by\b",
    r"\bpublished (by|in)\b",
    r"\bfounded by\b",
    r"\bdirected by\b",
    r"\bwas born\b",
    r"\bthe (author|director|founder|mayor|publisher|birthplace|employer) of\b",
    r"[Tt]he (author|director|founder|mayor|publisher) is\b",
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_STUDENT_FOLDER)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE_STUDENT_FOLDER).float().eval()


@pytest.fixture(scope="module")
def generic() -> list[Document]:
    return list(itertools.islice(documents(11), 3000))


def continuation(model, tokenizer, question: str, most_tokens: int = 60) -> str:
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=most_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_checkpoint_is_at_most_eight_megabytes():
    assert sum(f.stat().st_size for f in BASE_STUDENT_FOLDER.iterdir()) <= 8_000_000


def test_the_checkpoint_is_a_plain_tied_qwen2(model):
    from safetensors import safe_open

    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.tie_word_embeddings and model.config.max_position_embeddings == 2048
    with safe_open(BASE_STUDENT_FOLDER / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}


def test_the_log_tells_how_it_was_made():
    record = json.loads((BASE_STUDENT_FOLDER / "pretrain_log.json").read_text())
    assert record["log"][-1]["tokens"] >= record["settings"]["tokens"]
    assert record["log"][-1]["loss"] < record["log"][0]["loss"]


def test_it_copies_as_well_as_its_card_says(model, tokenizer):
    from learner.base_student.pretrain import accuracy_by_kind

    recorded = json.loads((BASE_STUDENT_FOLDER / "pretrain_log.json").read_text())["accuracy_by_kind"]
    measured = accuracy_by_kind(model, tokenizer, seed=0)
    for kind, (exact, tokens) in measured.items():
        assert [exact, tokens] == pytest.approx(recorded[kind], abs=0.06)
    assert min(measured[kind][1] for kind in ("numbered_lines", "passage", "listed")) > 0.9


def test_it_cannot_act(model, tokenizer):
    for question in (
        "In which city was the author of The Silver Harbor born?",
        "Ann has 12 coins and buys 30 more. How many?",
    ):
        reply = continuation(model, tokenizer, question)
        assert not any(mark in reply for mark in ("web_search", "final_answer", "```py"))


@pytest.mark.parametrize(
    "text",
    [
        "plain words, and Names; 0012.50 (x_1)!",
        "a\tb\r\n  two  spaces \n\n    indented\n        twice",
        "\u00fcber \u6f22\u5b57 \U0001f600 \u00a0 \x00 \u2028",
        "x = x // 3  # 'quoted' \"twice\" {a: [1, 2]}",
        " , . : ;  a ,b . c",
    ],
)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_one_token(tokenizer):
    tokens = tokenizer.tokenize("x = 4821 + 70713, page12")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("48217071312")


def test_special_tokens_are_one_token_each(tokenizer):
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_prompt_is_a_prefix_of_the_conversation_that_goes_on_from_it(tokenizer):
    messages = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "Repeat: 12"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "12"},
    ]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    for n in (2, 4):
        prompt = tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt


def test_generic_text_follows_from_its_seed():
    def first(seed: int) -> list[str]:
        return [d.text for d in itertools.islice(documents(seed), 50)]

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_generic_text_holds_nothing_of_agents_or_tasks(generic):
    text = "\n".join(d.text for d in generic)
    assert [mark for mark in AGENT_MARKS if mark in text] == []
    assert [phrase for phrase in TASK_PHRASES if re.search(phrase, text)] == []


def test_every_document_marks_each_character_and_teaches_something(generic):
    for d in generic:
        assert len(d.learnt_flags) == len(d.text)
        assert any(d.learnt_flags)


def test_batches_learn_only_learnt_pieces(tokenizer):
    from learner.base_student.pretrain import token_stream

    (ids, learnt), d = next(token_stream(tokenizer, 5)), next(documents(5))
    assert tokenizer.decode(ids[:-1]) == d.text
    assert tokenizer.decode(ids[learnt]) == "".join(text for text, flag in d.pieces if flag)


def test_first_weights_can_copy_before_any_training(tokenizer):
    import torch

    from learner.base_student.model import build_model, model_config

    model = build_model(model_config(tokenizer), seed=0).eval()
    torch.manual_seed(0)
    ids = torch.randperm(2000)[:40].repeat(2)[None] + 259  # one row of 40 tokens, twice
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0]
    assert (logits[40:79].argmax(-1) == ids[0, 41:]).float().mean() > 0.2  # chance is 1 / 3072
