"""The one place that turns messages into token ids and typed spans: for prompts at rollout and for training rows alike.

Every piece of a conversation (the template's own text, each content) is tokenised on its own, and an assistant turn
whose ids were sampled is taken as it was sampled. So a longer conversation only ever appends: the prompt that a
student sees at rollout is, token for token, a prefix of the row that it was trained on. Templates for which that
cannot be proven are refused. A template that trims contents (Llama-3's) trims what is read; an assistant's turn stays
as it was produced.

Example::

    renderer = Renderer(tokenizer)
    ids = renderer.prompt(messages)                   # ends with the generation prompt
    row = renderer.row(messages)                      # ids, span types, and which tokens the student must produce
    assert row.token_ids[:len(ids)] == ids
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollout.trajectory import Message, Role, Span, SpanType


class RenderingError(ValueError):
    """A conversation that cannot be rendered exactly; the message says why. Such a row is refused, never guessed."""


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation as tokens."""

    token_ids: tuple[int, ...]
    """[n]"""
    span_types: tuple[SpanType, ...]
    """[n] what each token is; a template's own tokens are FORMAT."""
    trained: tuple[bool, ...]
    """[n] True for what a policy must produce: assistant contents and the stop token that ends each."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The template's own text around n contents."""

    before: tuple[tuple[str, ...], ...]
    """[n] texts before each content, each tokenised on its own (before an assistant's: the prompt's end, then the
    generation prompt, exactly as they are at rollout)."""
    after: str
    generation_prompt: str
    trims: tuple[tuple[bool, bool], ...]
    """[n] whether the template drops white space at the beginning and at the end of each content that is read."""


_DEFAULT_SPAN: dict[Role, SpanType] = {
    "system": SpanType.SYSTEM,
    "user": SpanType.USER,
    "assistant": SpanType.FORMAT,
}


_DECODED_TOGETHER = 32
"""Tokens."""


class Renderer:
    """Renders conversations for one tokenizer (a Hugging Face fast tokenizer with a chat template).

    Raises `RenderingError` at construction when the tokenizer has no chat template or no end-of-turn token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise RenderingError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; give it one (tokenizer.chat_template), "
                "such as that of the model's chat version, and save it"
            )
        if tokenizer.eos_token_id is None:
            raise RenderingError(f"tokenizer {tokenizer.name_or_path!r} has no eos token, so turns cannot end")
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise RenderingError(
                f"tokenizer {tokenizer.name_or_path!r} pads with its stop token {tokenizer.eos_token!r}; "
                "set another pad token, or stopping is never learned"
            )
        self.tokenizer = tokenizer
        self.stop_token: str = tokenizer.eos_token
        self.stop_token_id: int = tokenizer.eos_token_id
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = frozenset(added | set(tokenizer.all_special_ids))
        self._pieces: dict[tuple[Role, ...], _Pieces] = {}
        self._literal_ids: dict[str, tuple[int, ...]] = {}
        # A conversation is rendered again at each of its steps, with one new message at its end.
        self._content = functools.lru_cache(maxsize=1024)(self._encode)

    def prompt(self, messages: Sequence[Message], prefix: str = "") -> tuple[int, ...]:
        """Ids of `messages` + the generation prompt (+ `prefix`, the beginning of the assistant's turn)."""
        pieces = self._split(tuple(message.role for message in messages))
        row = self._body(messages, pieces, typed=False)
        ids = row.token_ids + self._literal(pieces.generation_prompt)
        return ids + self._content(prefix)[0] if prefix else ids

    def row(self, messages: Sequence[Message]) -> Row:
        """The training row of a whole conversation; it must end with an assistant turn."""
        if not messages or messages[-1].role != "assistant":
            raise RenderingError("a training row must end with an assistant turn")
        return self._body(messages, self._split(tuple(message.role for message in messages)), typed=True)

    # -- how it is put together

    def _body(self, messages: Sequence[Message], pieces: _Pieces, *, typed: bool) -> Row:
        ids: list[int] = []
        types: list[SpanType] = []
        trained: list[bool] = []

        def add(new_ids: Sequence[int], new_types: Sequence[SpanType], train: bool) -> None:
            ids.extend(new_ids)
            types.extend(new_types)
            trained.extend([train] * len(new_ids))

        for i, message in enumerate(messages):
            before = [token for text in pieces.before[i] for token in self._literal(text)]
            add(before, [SpanType.FORMAT] * len(before), False)
            content_ids, content_types = self._typed_content(message, pieces.trims[i], typed=typed)
            is_assistant = message.role == "assistant"
            add(content_ids, content_types, is_assistant)
            if is_assistant and (not content_ids or content_ids[-1] != self.stop_token_id):
                # A turn that was sampled but cut off never chose to stop: its stop token is context, not a target.
                add([self.stop_token_id], [SpanType.FORMAT], message.token_ids is None)
        if messages and messages[-1].role != "assistant":
            after = self._literal(pieces.after)
            add(after, [SpanType.FORMAT] * len(after), False)
        return Row(tuple(ids), tuple(types), tuple(trained))

    def _typed_content(
        self, message: Message, trims: tuple[bool, bool], *, typed: bool
    ) -> tuple[tuple[int, ...], tuple[SpanType, ...]]:
        """Ids of a content, and the type of each; not `typed` spares finding out (a prompt has no use for it)."""
        default = _DEFAULT_SPAN[message.role]
        begin, end = 0, len(message.content)
        if message.token_ids is not None:
            ids = message.token_ids
            if not typed:
                return ids, (default,) * len(ids)
            ends = decoded_ends(self.tokenizer, ids)
        else:
            if message.role != "assistant":  # what a policy produced is taken as it produced it
                begin, end = _trimmed(message.content, trims)
            ids, ends = self._content(message.content[begin:end])
        if not message.spans:
            return ids, (default,) * len(ids)
        ends = [begin + each for each in ends]
        starts = (begin, *ends)[:-1]  # none for an empty content
        anchors = (_anchor(message.content, start, end) for start, end in zip(starts, ends, strict=True))
        return ids, tuple(_type_at(message.spans, anchor, default) for anchor in anchors)

    def _encode(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids and end offsets (characters) of a content; text that spells a special token stays plain text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RenderingError(f"content is no valid text: {error}") from error
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        ids = tuple(encoded["input_ids"])
        if not self._special_ids.isdisjoint(ids):
            raise RenderingError(f"content spells a special token that the tokenizer cannot split: {text[:80]!r}")
        return ids, tuple(end for _, end in encoded["offset_mapping"])

    def _literal(self, text: str) -> tuple[int, ...]:
        if text not in self._literal_ids:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            self._literal_ids[text] = tuple(ids)
        return self._literal_ids[text]

    def _split(self, roles: tuple[Role, ...]) -> _Pieces:
        if roles not in self._pieces:
            self._pieces[roles] = self._split_now(roles)
        return self._pieces[roles]

    def _split_now(self, roles: tuple[Role, ...]) -> _Pieces:
        literals, generation_prompt = self._literals(roles)
        before: list[tuple[str, ...]] = []
        for i, role in enumerate(roles):
            # The stop token belongs to the assistant's turn, so the text after that turn begins behind it.
            after_assistant = i > 0 and roles[i - 1] == "assistant"
            if role == "assistant":
                self._check_stop(literals[i + 1])
            if role == "assistant" and i > 0:
                end, start = self._prompt_end(roles[:i], literals[: i + 1])
                before.append((end.removeprefix(self.stop_token) if after_assistant else end, start))
            else:
                before.append((literals[i].removeprefix(self.stop_token) if after_assistant else literals[i],))
        return _Pieces(tuple(before), literals[-1], generation_prompt, self._trims(roles, literals))

    def _trims(self, roles: tuple[Role, ...], literals: list[str]) -> tuple[tuple[bool, bool], ...]:
        """For each content that is read whether the template drops white space at its beginning, and at its end."""
        marks = [f"content{uuid.uuid4().hex}" for _ in roles]
        contents = [mark if role == "assistant" else f" \n{mark}\n " for role, mark in zip(roles, marks, strict=True)]
        conversation = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        whole = self._apply(conversation, False)
        trims = tuple((f" \n{mark}" not in whole, f"{mark}\n " not in whole) for mark in marks)
        cut = (text[slice(*_trimmed(text, trim))] for text, trim in zip(contents, trims, strict=True))
        if whole != literals[0] + "".join(text + after for text, after in zip(cut, literals[1:], strict=True)):
            raise RenderingError("the chat template changes white space inside a message; let it keep or trim contents")
        return trims

    def _literals(self, roles: tuple[Role, ...]) -> tuple[list[str], str]:
        """The template's text before content 0, 1, ..., after the last one; and its generation prompt."""
        marks = [f"content{uuid.uuid4().hex}" for _ in roles]
        conversation = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        whole = self._apply(conversation, False)
        literals, rest = [], whole
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise RenderingError(f"the chat template drops or changes a message of the roles {roles}")
            literals.append(before)
        literals.append(rest)
        with_prompt = self._apply(conversation, True)
        if not with_prompt.startswith(whole):
            raise RenderingError("the chat template changes the conversation when a generation prompt is added")
        return literals, with_prompt[len(whole) :]

    def _check_stop(self, after: str) -> None:
        if not after.startswith(self.stop_token):
            raise RenderingError(
                f"the chat template does not end an assistant turn with the stop token {self.stop_token!r} "
                f"but with {after[:40]!r}"
            )

    def _prompt_end(self, roles: tuple[Role, ...], row_literals: list[str]) -> tuple[str, str]:
        """How the rollout's prompt for the next turn ends; it must be what the row has before that turn."""
        literals, generation_prompt = self._literals(roles)
        if [*literals[:-1], literals[-1] + generation_prompt] != row_literals:
            raise RenderingError(
                "the chat template renders earlier turns differently once the assistant has answered, "
                "so the prompt at rollout is no prefix of the training row"
            )
        return literals[-1], generation_prompt

    def _apply(self, conversation: list[dict[str, str]], generation_prompt: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=generation_prompt, return_dict=False
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in conversation)
            raise RenderingError(f"the chat template refuses the roles {roles}: {error}") from error


def decoded_ends(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """End of each token, in characters of the decoded text (special tokens have theirs).

    The text grows by decoding, so a character of several tokens ends where it is whole; until then it is one character
    of replacement.
    """

    def text(start: int, end: int) -> str:
        return tokenizer.decode(list(ids[start:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ends: list[int] = []
    start = behind = 0  # what is decoded again for each token is kept short, or long turns would take seconds
    for i in range(1, len(ids) + 1):
        piece = text(start, i)
        ends.append(behind + len(piece))
        if i - start >= _DECODED_TOGETHER and not piece.endswith("\ufffd"):
            start, behind = i, ends[-1]
    if ends and ends[-1] != len(text(0, len(ids))):  # a decoder that looks further back
        return [len(text(0, i)) for i in range(1, len(ids) + 1)]
    return ends


def _trimmed(text: str, trims: tuple[bool, bool]) -> tuple[int, int]:
    """[begin, end) of a content in the template's text."""
    begin = len(text) - len(text.lstrip()) if trims[0] else 0
    return begin, max(begin, len(text.rstrip())) if trims[1] else len(text)


def _anchor(text: str, start: int, end: int) -> int:
    """Where a token counts: at its first character that is no white space, if it has one (")\\n" is code, " look"
    thought); a token that ends no character of its own, at the one that it is part of."""
    if end <= start:
        return max(0, end - 1)
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()) if piece.strip() else start


def _type_at(spans: Sequence[Span], position: int, default: SpanType) -> SpanType:
    for span in spans:
        if span.start <= position < span.end:
            return span.type
    return default
