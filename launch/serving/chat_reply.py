"""What a client of `/v1/chat/completions` gets: one object, or chunks as server-sent events; no network in here.

Steps come as `reasoning_content`, which chat windows show as thinking (DeepSeek's name; `reasoning`, vLLM's newer one,
says the same), the answer as `content`. `usage` counts every request of every step, candidates that lost included.
`finish_reason` is "stop" when the agent answered, "length" when a limit ended it (steps, tokens, time, context), and
"content_filter" when its provider withheld an answer. With `trajectory` asked for, an "agent" object tells all.

Example::

    reply = ChatReply(model="starter-seed0", asked=asked, dialect="code")
    for number, step in enumerate(trajectory.steps, start=1): chunks += reply.step(number, step)
    chunks += reply.end(trajectory)
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.serving.chat_request import ChatRequest, StepsIn
from launch.serving.step_view import folded, step_json, step_markdown, stopped, thought, trajectory_json
from rollout.trajectory import FailureClass, Step, StopReason, Trajectory

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_TITLE_CHARACTERS = 80
Searches = Sequence[Sequence[Mapping[str, Any]]]


class ChatReply:
    """The reply to one request; `steps` is the server's choice where the request makes none."""

    def __init__(self, *, model: str, asked: ChatRequest, dialect: str, steps: StepsIn = "reasoning") -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model, self._asked, self._dialect = model, asked, dialect
        self._steps: StepsIn = asked.steps or steps
        self._created = int(time.time())

    def whole(self, trajectory: Trajectory, searches: Searches = ()) -> dict[str, Any]:
        """A `chat.completion`; `searches` are those of each step."""
        steps = list(enumerate(trajectory.steps, start=1))
        message: dict[str, Any] = {"role": "assistant", "content": self._content(trajectory), "refusal": None}
        if self._steps == "content":
            message["content"] = "".join(self._folded(n, step) for n, step in steps) + message["content"]
        if self._steps == "reasoning":
            told = "".join(step_markdown(n, step, self._dialect) for n, step in steps) + stopped(trajectory)
            message |= {"reasoning_content": told.rstrip(), "reasoning": told.rstrip()}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(trajectory)}
        reply = self._head("chat.completion") | {"choices": [choice], "usage": usage_json(trajectory)}
        if self._asked.trajectory:
            reply["agent"] = trajectory_json(trajectory, searches=searches) | self._left_out()
        return reply

    def begin(self) -> Iterator[bytes]:
        """The first chunk."""
        yield self._chunk({"role": "assistant", "content": ""})

    def step(self, number: int, step: Step, searches: Sequence[Mapping[str, Any]] = ()) -> Iterator[bytes]:
        """A step that has ended, and what it searched."""
        delta = {}
        if self._steps == "reasoning":
            told = step_markdown(number, step, self._dialect)
            delta = {"reasoning_content": told, "reasoning": told}
        if self._steps == "content":
            delta = {"content": self._folded(number, step)}
        agent = {"step": step_json(number, step, searches)} if self._asked.trajectory else None
        if delta or agent:
            yield self._chunk(delta, agent=agent)

    def end(self, trajectory: Trajectory) -> Iterator[bytes]:
        """The answer, why it ended, what it took, and the end of the stream."""
        why = stopped(trajectory)
        if why and self._steps == "reasoning":
            yield self._chunk({"reasoning_content": why, "reasoning": why})
        if content := self._content(trajectory):
            yield self._chunk({"content": content})
        agent = None
        if self._asked.trajectory:
            agent = trajectory_json(trajectory, steps=False) | self._left_out()
        yield self._chunk({}, finish=finish_reason(trajectory), agent=agent)
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage_json(trajectory)})
        yield DONE

    def _content(self, trajectory: Trajectory) -> str:
        """The answer, up to the client's stop strings; where steps are content too, in its place why there is none."""
        if trajectory.prediction is None:
            return f"*{stopped(trajectory)}*" if self._steps == "content" else ""
        return cut_at(trajectory.prediction, self._asked.stop or ())

    def _folded(self, number: int, step: Step) -> str:
        words = " ".join(thought(step).split())
        title = words if len(words) <= _TITLE_CHARACTERS else f"{words[:_TITLE_CHARACTERS]}…"
        markdown = step_markdown(number, step, self._dialect, escape=True)
        return folded(markdown, f"Step {number}: {title}" if title else f"Step {number}")

    def _left_out(self) -> dict[str, int]:
        return {"messages_ignored": self._asked.ignored_messages}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(
        self, delta: Mapping[str, Any], *, finish: str | None = None, agent: Mapping[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return event(chunk if agent is None else chunk | {"agent": agent})


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event; ASCII, so that nothing a model writes can break it."""
    return f"data: {json.dumps(data)}\n\n".encode()


def usage_json(trajectory: Trajectory) -> dict[str, int]:
    usage = trajectory.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def finish_reason(trajectory: Trajectory) -> str:
    failure = trajectory.failure
    if failure is not None and failure.failure_class is FailureClass.MODEL:
        return "content_filter"
    return "stop" if trajectory.stop_reason is StopReason.FINAL else "length"


def cut_at(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop string, that left out, as OpenAI has it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
