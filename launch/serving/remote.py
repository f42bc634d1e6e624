"""An agent that is served elsewhere, asked through the openai client: `RemoteAgent`.

Of `launch.serve` it gets the steps as they happen, by its `trajectory` extension; any other OpenAI-compatible endpoint
is asked plainly, and its words are shown as they come.

Example::

    agent = await RemoteAgent.connect("http://127.0.0.1:8000/v1")
    answer = await agent.ask("What is 6 * 7?", candidates=1, on_step=print, on_piece=print)
    await agent.close()
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

_CONNECT_S = 20.0
_NO_KEY = "none"
"""The client wants one, where no key is asked for."""


class RemoteError(ValueError):
    """The endpoint cannot be asked, or refuses; the message says why."""


class RemoteAgent:
    """`client` is an `openai.AsyncOpenAI`; `ours` tells whether the endpoint knows our extensions."""

    def __init__(self, client: Any, model: str, *, ours: bool) -> None:
        self._client, self.model, self.ours = client, model, ours

    @classmethod
    async def connect(cls, url: str, *, model: str = "", api_key_env: str = "") -> RemoteAgent:
        """Raises `RemoteError`."""
        from openai import AsyncOpenAI

        from rollout.redaction import quiet_clients

        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise RemoteError(f"--url {url!r} is no address; give one such as http://127.0.0.1:8000/v1")
        key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
        if api_key_env and not key:
            raise RemoteError(f"--api-key-env {api_key_env}: that variable is not set, or empty")
        quiet_clients()
        base = url if address.path.strip("/") else f"{url.rstrip('/')}/v1"
        client = AsyncOpenAI(base_url=base, api_key=key or _NO_KEY, max_retries=2)
        try:
            served = (await _told(client.models.list(timeout=_CONNECT_S), base)).data
        except BaseException:
            await client.close()
            raise
        names = [each.id for each in served]
        if model and model not in names:
            await client.close()
            raise RemoteError(f"--model {model!r} is not served at {base}; there are {', '.join(names[:10])}")
        if not names:
            await client.close()
            raise RemoteError(f"{base} serves no model")
        chosen = next(each for each in served if not model or each.id == model)
        return cls(client, chosen.id, ours=chosen.owned_by == "apprentice")

    async def ask(
        self,
        question: str,
        *,
        candidates: int,
        on_step: Callable[[Mapping[str, Any]], None],
        on_piece: Callable[[str, bool], None],
    ) -> dict[str, Any]:
        """What `step_view.trajectory_json` says of the answer, with its steps; of another's endpoint what is known.

        `on_piece` gets words and whether they are thoughts, from endpoints that tell no steps. Raises `RemoteError`.
        """
        extra = {"trajectory": True, "steps": "none", "candidates": candidates} if self.ours else None
        began = time.monotonic()
        asked = self._client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": question}], stream=True, extra_body=extra
        )
        return await _told(self._listen(await _told(asked, self.model), began, on_step, on_piece), self.model)

    async def close(self) -> None:
        await self._client.close()

    async def _listen(
        self,
        stream: Any,
        began: float,
        on_step: Callable[[Mapping[str, Any]], None],
        on_piece: Callable[[str, bool], None],
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        steps: list[Mapping[str, Any]] = []
        content, finish = "", ""
        async with stream:
            async for chunk in stream:
                agent = (chunk.model_extra or {}).get("agent") or {}
                if "step" in agent:
                    steps.append(agent["step"])
                    on_step(agent["step"])
                elif agent:
                    answer = dict(agent)
                for choice in chunk.choices:
                    finish = choice.finish_reason or finish
                    thought = (choice.delta.model_extra or {}).get("reasoning_content") or ""
                    content += choice.delta.content or ""
                    if not self.ours and thought:
                        on_piece(thought, True)
                    if not self.ours and choice.delta.content:
                        on_piece(choice.delta.content, False)
        if self.ours and not answer:
            raise RemoteError("the server ended the answer before it was whole")
        return (answer or _plain(content, finish, time.monotonic() - began)) | {"steps": steps}


def _plain(content: str, finish: str, duration_s: float) -> dict[str, Any]:
    usage = {"requests": 1, "prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}
    return {
        "answer": content, "success": None, "stop_reason": finish, "stop_detail": "", "failure": None,
        "tool_calls": 0, "duration_s": duration_s, "usage": usage,
    }  # fmt: skip


async def _told(call: Any, where: str) -> Any:
    """What `call` returns. Raises `RemoteError` for the client's errors."""
    from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError

    try:
        return await call
    except APITimeoutError:
        raise RemoteError(f"{where} did not answer in time") from None
    except APIConnectionError as error:
        raise RemoteError(f"{where} cannot be reached: {error.__cause__ or error}") from None
    except APIStatusError as error:
        raise RemoteError(f"{where} answered {error.status_code}: {_message(error)}") from None
    except APIError as error:
        raise RemoteError(f"{where}: {_message(error)}") from None


def _message(error: Any) -> str:
    body = error.body
    if isinstance(body, Mapping):
        body = body.get("message") or body.get("error")
    return str(body or error)[:500]
