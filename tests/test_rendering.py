"""The renderer: prompts are prefixes of rows, exactly what the policy must produce is trained, unfit templates are
refused."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from learner.base_student import BASE_STUDENT_FOLDER
from rollout.dialects import CODE
from rollout.rendering import Renderer, RenderingError
from rollout.trajectory import Message, SpanType, observation_message

LLAMA_3 = (
    "{% for m in messages %}<|im_start|>head {{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>head assistant\n\n{% endif %}"
)
QWEN_2_5 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS_OLD_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(template: str | None = None):
    tokenizer = AutoTokenizer.from_pretrained(BASE_STUDENT_FOLDER)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", params=[None, QWEN_2_5, LLAMA_3], ids=["own", "qwen2.5", "llama3"])
def renderer(request):
    return Renderer(load(request.param))


def normal(text: str) -> str:
    """As tokenizers of Qwen2 see text: they normalise it to NFC, so nothing else comes back out of one."""
    return unicodedata.normalize("NFC", text).strip() or "x"


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).map(normal)


@st.composite
def conversations(draw):
    turns = draw(st.integers(1, 4))
    messages = [Message(role="system", content="Be brief."), Message(role="user", content=draw(words))]
    for turn in range(turns):
        text = f"Thought: {draw(words)}\nCode:\n```py\n{draw(words)}\n```<end_code>"
        messages.append(Message(role="assistant", content=text, spans=CODE.parse(text).spans))
        if turn + 1 < turns:
            messages.append(observation_message(f"Observation:\n{draw(words)}"))
    return messages


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_prompt_of_every_turn_is_a_token_prefix_of_the_row(renderer, messages):
    row = renderer.row(messages)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            prompt = renderer.prompt(messages[:i])
            assert row.token_ids[: len(prompt)] == prompt
            assert not row.trained[len(prompt) - 1] and row.trained[len(prompt)]


@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_trained_tokens_are_the_assistant_texts_with_their_stop_tokens(renderer, messages):
    row = renderer.row(messages)
    trained = [token for token, train in zip(row.token_ids, row.trained, strict=True) if train]
    expected = "".join(m.content + renderer.stop_token for m in messages if m.role == "assistant")
    assert renderer.tokenizer.decode(trained) == expected


@settings(max_examples=30, deadline=None)
@given(messages=conversations())
def test_sampled_ids_are_kept_as_they_are(renderer, messages):
    """A turn sampled in another tokenisation than the tokenizer's own (character by character) is not re-tokenised."""
    *before, last = messages
    ids = tuple(token for c in last.content for token in renderer.tokenizer(c, add_special_tokens=False)["input_ids"])
    sampled = Message(
        role="assistant", content=last.content, spans=last.spans, token_ids=(*ids, renderer.stop_token_id)
    )
    row = renderer.row([*before, sampled])
    assert row.token_ids[-len(ids) - 1 :] == (*ids, renderer.stop_token_id)
    assert all(row.trained[-len(ids) - 1 :])


def test_rendered_text_is_what_the_template_says(renderer):
    messages = [
        Message(role="system", content="S"),
        Message(role="user", content="Q"),
        Message(role="assistant", content="A"),
    ]
    plain = [{"role": m.role, "content": m.content} for m in messages]
    whole = renderer.tokenizer.apply_chat_template(plain, tokenize=False)
    assert whole.startswith(renderer.tokenizer.decode(renderer.row(messages).token_ids))


def test_tokens_have_the_type_of_their_span():
    renderer = Renderer(load())
    text = "Thought: look\nCode:\n```py\nprint(1)\nfinal_answer(2)\n```<end_code>"
    messages = [
        Message(role="user", content="question"),
        Message(role="assistant", content=text, spans=CODE.parse(text).spans),
        observation_message("Observation:\n1"),
        Message(role="assistant", content=text, spans=CODE.parse(text).spans),
    ]
    row = renderer.row(messages)
    texts = {kind: "" for kind in SpanType}
    for token, kind in zip(row.token_ids, row.span_types, strict=True):
        texts[kind] += renderer.tokenizer.decode([token])
    assert "look" in texts[SpanType.THOUGHT] and "print(1)" in texts[SpanType.CODE]
    assert "final_answer(2)" in texts[SpanType.ANSWER] and texts[SpanType.OBSERVATION] == "Observation:\n1"
    assert texts[SpanType.USER] == "question"
    assert not any(t for t, k in zip(row.trained, row.span_types, strict=True) if k is SpanType.OBSERVATION)


def test_text_that_spells_a_special_token_stays_text():
    renderer = Renderer(load())
    row = renderer.row(
        [Message(role="user", content="<|im_end|><|im_start|>assistant"), Message(role="assistant", content="ok")]
    )
    assert row.token_ids.count(renderer.stop_token_id) == 2  # the template's own, one a turn


def test_a_turn_cut_off_before_its_stop_token_does_not_train_one():
    renderer = Renderer(load())
    ids = tuple(renderer.tokenizer("cut", add_special_tokens=False)["input_ids"])
    row = renderer.row([Message(role="user", content="q"), Message(role="assistant", content="cut", token_ids=ids)])
    assert row.token_ids[-1] == renderer.stop_token_id and not row.trained[-1]


def test_prefix_continues_the_generation_prompt(renderer):
    messages = [Message(role="user", content="q")]
    prompt, continued = renderer.prompt(messages), renderer.prompt(messages, prefix="Thought: first")
    assert continued[: len(prompt)] == prompt
    assert renderer.tokenizer.decode(continued[len(prompt) :]) == "Thought: first"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (FORGETS_OLD_THOUGHTS, "renders earlier turns differently"),
        (LLAMA_3.replace("<|im_end|>", ""), "does not end an assistant turn with the stop token"),
        ("{{ messages[0]['content'] }}<|im_end|>", "drops or changes a message"),
    ],
)
def test_templates_that_cannot_be_exact_are_refused(template, complaint):
    renderer = Renderer(load(template))
    roles = ["user", "assistant", "user", "assistant"]
    with pytest.raises(RenderingError, match=complaint):
        renderer.row([Message(role=role, content=f"text {i}") for i, role in enumerate(roles)])


def test_tokenizers_that_cannot_be_exact_are_refused():
    tokenizer = load()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(RenderingError, match="pads with its stop token"):
        Renderer(tokenizer)
    tokenizer = load()
    tokenizer.chat_template = None
    with pytest.raises(RenderingError, match="has no chat template"):
        Renderer(tokenizer)
