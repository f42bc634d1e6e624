"""`FaultServer`: a server that speaks OpenAI's chat completions and completions, and fails as often as it is told to.

Which requests fail, and how, is drawn from a seed. It runs on a free loopback port, in a thread with an event loop of
its own, and takes hundreds of connections. Its errors are as indiscreet as the worst real ones: they repeat the key and
the prompt.

Example::

    with FaultServer(reply=lambda request: "Thought: 42", share=0.3, seed=0) as server:
        policy = OpenAIPolicy("m", base_url=server.base_url)
        ...
    server.requests, server.faults_injected["drop"], server.billed_tokens
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from email.utils import formatdate
from time import time
from typing import Any

FAULTS = (
    "429",  # with Retry-After in seconds
    "429_date",  # with Retry-After as a date
    "500",
    "502",  # a page, not JSON
    "503",
    "slow",  # silence of `slow_s`
    "drop",  # the connection ends within the body
    "malformed",  # half a JSON document
    "no_choices",
    "null_content",
    "wrong_type",  # a page with status 200
)
"""A stream is cut off by "drop" after its first piece; the other faults happen before it begins."""

Reply = Callable[[Mapping[str, Any]], str | Sequence[str]]


class FaultServer:
    """Serves within a `with` block.

    `reply(request)` is the text of every choice, or one text for each; the server cuts it at the request's stop strings
    as real ones do. `share` of the POST requests fail, each with one of `faults`. With a `key`, requests without it are
    refused. `refuse(request)` may name a field that is refused with 400. `vllm` serves as vLLM does: it owns its
    models, tells which stop string it met, and continues a last assistant message.
    """

    def __init__(
        self,
        reply: Reply = lambda request: "Thought: 42",
        faults: Sequence[str] = FAULTS,
        share: float = 0.3,
        seed: int = 0,
        *,
        slow_s: float = 2.0,
        retry_after_s: float = 0.05,
        answer_s: float = 0.0,
        key: str | None = None,
        model: str = "m",
        vllm: bool = False,
        refuse: Callable[[Mapping[str, Any]], str | None] = lambda request: None,
    ) -> None:
        unknown = set(faults) - set(FAULTS)
        assert not unknown, f"unknown faults {unknown}; there are {FAULTS}"
        self._reply, self._faults, self._share, self._rng = reply, tuple(faults), share, random.Random(seed)
        self._slow_s, self._retry_after_s, self._answer_s = slow_s, retry_after_s, answer_s
        self._key, self._model, self._vllm, self._refuse = key, model, vllm, refuse
        self.base_url = ""
        self.requests = 0
        """POST requests that came in."""
        self.answered = 0
        """Of those, how many got a good answer."""
        self.faults_injected: Counter[str] = Counter()
        self.unauthorized = 0
        self.billed_tokens = 0
        """Prompt and completion tokens of everything that was answered with a usage."""
        self.bodies: list[dict[str, Any]] = []
        self.now = self.most_at_once = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-server", daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        self.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> asyncio.Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        return self._server

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    # -- HTTP

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.split(" ", 2)
                headers = dict(
                    (name.strip().lower(), value.strip())
                    for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
                )
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self._respond(method, path, headers, body, writer):
                    writer.transport.abort()
                    return
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the server goes
        finally:
            writer.close()

    async def _respond(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """False: end the connection at once."""
        authorization = headers.get("authorization", "")
        if self._key is not None and authorization != f"Bearer {self._key}":
            self.unauthorized += 1
            _send(writer, 401, {"error": {"message": f"Incorrect API key provided: {authorization}", "code": "x"}})
            return True
        if method == "GET":
            owner = "vllm" if self._vllm else "somebody"
            card = {"id": self._model, "object": "model", "owned_by": owner}
            _send(writer, 200, {"object": "list", "data": [card]})
            return True
        request = json.loads(body)
        self.requests += 1
        self.bodies.append(request)
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        try:
            return await self._post(path, request, authorization, writer)
        finally:
            self.now -= 1

    async def _post(self, path: str, request: dict[str, Any], authorization: str, writer: asyncio.StreamWriter) -> bool:
        prompt = request["messages"][-1]["content"] if "messages" in request else str(request.get("prompt"))
        gossip = f"while {authorization} asked {prompt!r}"
        refused = self._refuse(request)
        if refused is not None:
            message = f"Unsupported parameter: '{refused}' is not supported with this model, {gossip}"
            _send(writer, 400, {"error": {"message": message, "param": refused, "code": "unsupported_parameter"}})
            return True
        fault = self._rng.choice(self._faults) if self._faults and self._rng.random() < self._share else ""
        if fault:
            self.faults_injected[fault] += 1
        if fault in ("429", "429_date"):
            date = formatdate(time() + self._retry_after_s, usegmt=True)
            wait = date if fault == "429_date" else f"{self._retry_after_s:g}"
            _send(writer, 429, {"error": {"message": f"slow down, {gossip}"}}, {"retry-after": wait})
            return True
        if fault in ("500", "502", "503"):
            said: Any = {"error": {"message": f"broken {gossip}"}} if fault != "502" else f"<html>{gossip}</html>"
            _send(writer, int(fault), said)
            return True
        if fault == "wrong_type":
            _send(writer, 200, f"<html>please log in, {gossip}</html>")
            return True
        await asyncio.sleep(self._slow_s if fault == "slow" else self._answer_s)
        answer = self._answer(path, request)
        if fault == "no_choices":
            answer["choices"] = []
        if fault == "null_content":
            for choice in answer["choices"]:
                choice.update(
                    {"message": {"role": "assistant", "content": None}} if "message" in choice else {"text": None}
                )
        if fault == "malformed":
            text = json.dumps(answer)
            _send(writer, 200, text[: len(text) // 2], {"content-type": "application/json"})
            return True
        if request.get("stream"):
            _start_stream(writer)
            return await self._stream(answer, writer, dropped=fault == "drop")
        if fault == "drop":
            body = json.dumps(answer).encode()
            _send(writer, 200, body[: len(body) // 2].decode(), {"content-length": str(len(body))})
            await writer.drain()
            return False
        self.billed_tokens += answer["usage"]["total_tokens"]
        if not fault or fault == "slow":
            self.answered += 1
        _send(writer, 200, answer)
        return True

    # -- answers

    def _answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        n = request.get("n") or 1
        replied = self._reply(request)
        texts = [replied] * n if isinstance(replied, str) else list(replied)[:n]
        chat = path.endswith("/chat/completions")
        choices = [self._choice(i, text, request, chat) for i, text in enumerate(texts)]
        prompt = request["messages"] if chat else request["prompt"]
        prompt_tokens = len(json.dumps(prompt)) // 4
        completion_tokens = sum(len(text) // 4 + 1 for text in texts)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        kind = "chat.completion" if chat else "text_completion"
        return {"id": "x", "object": kind, "created": 1, "model": self._model, "choices": choices, "usage": usage}

    def _choice(self, index: int, text: str, request: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        stops = request.get("stop") or []
        found = [(text.find(stop), stop) for stop in stops if stop in text]
        met = min(found)[1] if found else None
        text = text[: min(found)[0]] if found else text
        choice: dict[str, Any] = {"index": index, "finish_reason": "stop"}
        if self._vllm:
            choice["stop_reason"] = met
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return choice

    async def _stream(self, answer: dict[str, Any], writer: asyncio.StreamWriter, *, dropped: bool) -> bool:
        events: list[dict[str, Any]] = []
        for choice in answer["choices"]:
            text = choice["message"]["content"] or ""
            pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
            events += [_event(answer, choices=[{"index": choice["index"], "delta": {"content": x}}]) for x in pieces]
            ended = {name: value for name, value in choice.items() if name != "message"}
            events.append(_event(answer, choices=[{**ended, "delta": {}}]))
        events.append(_event(answer, choices=[], usage=answer["usage"]))
        if dropped:
            events = events[:1]
        for event in events:
            _chunk(writer, f"data: {json.dumps(event)}\n\n")
            await writer.drain()
        if dropped:
            return False
        _chunk(writer, "data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        self.billed_tokens += answer["usage"]["total_tokens"]
        self.answered += 1
        return True


def _event(answer: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": answer["model"], **fields}


def _start_stream(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")


def _chunk(writer: asyncio.StreamWriter, text: str) -> None:
    data = text.encode()
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _send(writer: asyncio.StreamWriter, status: int, body: Any, headers: Mapping[str, str] = {}) -> None:  # noqa: B006
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    kind = "text/html" if isinstance(body, str) else "application/json"
    all_headers = {"content-type": kind, "content-length": str(len(data)), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
    writer.write(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + data)
