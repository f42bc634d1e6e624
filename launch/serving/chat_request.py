"""A request of `/v1/chat/completions`, checked: what a client may ask of an agent whose tools run on the server.

Fields that would change the answer and cannot be honoured are refused by name; those that change nothing are taken and
left alone (`IGNORED`). What is not OpenAI's:

    candidates   k candidate actions a step, of which a vote chooses one (arXiv 2505.17612); needs a temperature above 0
    max_steps    fewer steps than the server's own limit
    top_k        sample from the k likeliest tokens alone
    trajectory   true: the answer, or each chunk that tells of a step, holds an "agent" object with all of it
    steps        where the steps are told: "reasoning" (`reasoning_content`), "content" (folded, in front), "none"

Of a conversation the last message is the question; earlier turns are left out, or, where the server was started with a
history, stand in front of it as text. Agents are trained on single questions.

Example::

    asked = read_chat({"model": "starter-seed0", "messages": [{"role": "user", "content": "What is 6 * 7?"}]})
    asked.question(history=0)       # "What is 6 * 7?"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from launch.serving.api_errors import ApiError, invalid

StepsIn = Literal["reasoning", "content", "none"]
IGNORED = frozenset(
    ("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort")
    + ("safety_identifier", "service_tier", "store", "user", "verbosity")
)
"""Fields that change nothing here."""
_MOST_MESSAGES = 2000
_MOST_STOPS = 4
_HISTORY_CHARACTERS = 2000
"""Of each earlier message that is shown."""


def _empty(value: Any) -> bool:
    return value is None or value == [] or value == {}


_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    # Field -> whether a value asks for nothing, and what to tell one who asks for something.
    "n": (lambda v: v in (None, 1), "only n=1 is supported; 'candidates' votes over several actions a step"),
    "tools": (_empty, "this agent's tools run on the server; tools of the client are not supported, leave them out"),
    "tool_choice": (lambda v: v in (None, "none", "auto"), "tools of the client are not supported, leave it out"),
    "functions": (_empty, "this agent's tools run on the server; functions of the client are not supported"),
    "function_call": (lambda v: v in (None, "none", "auto"), "functions of the client are not supported, leave it out"),
    "response_format": (lambda v: v is None or v == {"type": "text"}, "only {'type': 'text'} is supported"),
    "logprobs": (lambda v: v in (None, False), "log-probabilities are not given; use 'trajectory' to see the steps"),
    "top_logprobs": (lambda v: v in (None, 0), "log-probabilities are not given"),
    "logit_bias": (_empty, "it is not supported"),
    "presence_penalty": (lambda v: v in (None, 0), "only 0 is supported"),
    "frequency_penalty": (lambda v: v in (None, 0), "only 0 is supported"),
    "modalities": (lambda v: v in (None, ["text"]), "only ['text'] is supported"),
    "audio": (_empty, "only text is supported"),
    "prediction": (_empty, "it is not supported"),
    "web_search_options": (_empty, "the agent searches by itself; leave it out"),
}


def _text(content: Any) -> str:
    """Of a message: a string, or parts of type text."""
    if content is None:
        return ""
    if isinstance(content, str):
        parts = [content]
    elif isinstance(content, list):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"only text is supported, not a part of type {kind!r:.40}")
            parts.append(part["text"])
    else:
        raise ValueError("it must be a string or a list of text parts")
    text = "\n".join(parts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is no valid text: it holds half of a surrogate pair") from None
    return text


def _role(role: Any) -> Any:
    if role in ("tool", "function"):
        raise ValueError("tools run on the server, so a client has no tool results to send")
    return role


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_text)] = ""


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(BaseModel):
    """The fields that mean something here, by OpenAI's names and ours."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    messages: list[_Message] = Field(min_length=1, max_length=_MOST_MESSAGES)
    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_stops)] = Field(
        None, max_length=_MOST_STOPS
    )
    candidates: int | None = Field(None, ge=1)
    max_steps: int | None = Field(None, ge=1)
    top_k: int | None = Field(None, ge=0)
    trajectory: bool = False
    steps: StepsIn | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def ignored_messages(self) -> int:
        """All but the question."""
        return len(self.messages) - 1

    def question(self, *, history: int) -> str:
        """The last message; with `history`, behind so many earlier messages of user and assistant, cut to some 2,000
        characters each. Raises `ApiError`."""
        last = self.messages[-1]
        place = f"messages[{len(self.messages) - 1}]"
        if last.role != "user":
            raise invalid(f"{place} must be of the role 'user', not {last.role!r}: it is the question", param=place)
        if not last.content.strip():
            raise invalid(f"{place} is empty: it is the question", param=place)
        turns = [m for m in self.messages[:-1] if m.role in ("user", "assistant") and m.content.strip()]
        earlier = turns[max(0, len(turns) - history) :]
        if not earlier:
            return last.content
        told = "\n".join(f"{m.role.capitalize()}: {_cut(m.content.strip())}" for m in earlier)
        return f"Earlier in this conversation:\n{told}\n\nThe task:\n{last.content}"


def read_chat(body: Any) -> ChatRequest:
    """Raises `ApiError` of status 400 that names the field."""
    if not isinstance(body, dict):
        raise invalid("the request must be a JSON object")
    for name, (harmless, message) in _REFUSED.items():
        if name in body and not harmless(body[name]):
            raise invalid(f"{name}: {message}", param=name, code="unsupported_parameter")
    known = {name: value for name, value in body.items() if name not in IGNORED and name not in _REFUSED}
    try:
        return ChatRequest.model_validate(known)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> ApiError:
    """The first thing that is wrong, without the value: it may be what was asked."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    if first["type"] == "extra_forbidden":
        return invalid(f"unrecognized field {place[:80]!r}", param=place[:80], code="unknown_parameter")
    if first["type"] == "model_type":
        return invalid(f"{place}: it must be an object", param=place)
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{place}: {message[0].lower()}{message[1:]}", param=place or None)


def _cut(text: str) -> str:
    return text if len(text) <= _HISTORY_CHARACTERS else text[:_HISTORY_CHARACTERS] + " [...]"
