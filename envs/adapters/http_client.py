"""`HttpEnv`: an env that lives behind `envs.adapters.http_server`, in another process or on another machine.

It keeps the whole contract of `envs.base.Env`, previews included, over one kept-alive connection, with nothing but the
standard library. A server that cannot be reached, does not answer in time or has let the episode go is an `EnvError`.
A call is never sent twice: after a broken connection nobody knows whether it was done.

Example::

    env = HttpEnv("http://127.0.0.1:8765")
    observation, info = env.reset(task, seed=0)
    result = env.step("final_answer(42)")
    env.close()
"""

from __future__ import annotations

import http.client
import json
import select
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

from envs.adapters.task_json import task_to_json
from envs.base import EnvError, Observation, ObservationKind, StepResult, Task

_OUT_OF_ORDER, _BAD_REQUESTS = 409, (400, 413)


class HttpEnv:
    """One session of a server; for one thread at a time. Raises `EnvError` when the server cannot be reached.

    `timeout_s` is the longest wait for one answer. `token` is the server's, if it wants one.
    """

    def __init__(self, url: str, *, timeout_s: float = 150.0, token: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r} must be http://host:port or https://host:port")
        self._url, self._prefix = url.rstrip("/"), parts.path.rstrip("/")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=timeout_s)
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._episode_id: str | None = None
        self.can_preview = bool(self._ask("GET", "/metadata").get("can_preview"))

    def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        return self._reset({"task": task_to_json(task), "seed": seed})

    def reset_to_own(self, *, task_id: str | None = None, seed: int = 0) -> tuple[Observation, dict[str, Any]]:
        """Start an episode with one of the server's tasks: the one of that id, else one by the seed."""
        return self._reset({"task_id": task_id, "seed": seed} if task_id is not None else {"seed": seed})

    def step(self, action: str) -> StepResult:
        return _result(self._post("/step", {"action": {"text": action}}))

    def preview(self, actions: Sequence[str]) -> list[StepResult]:
        return [_result(told) for told in self._post("/preview", {"actions": list(actions)})["results"]]

    def commit(self, index: int) -> StepResult:
        return _result(self._post("/commit", {"index": index}))

    def close(self) -> None:
        """Give the session back; may be called twice, and never raises for a server that is gone."""
        episode_id, self._episode_id = self._episode_id, None
        try:
            if episode_id is not None:
                self._ask("POST", "/close", {"episode_id": episode_id})
        except (EnvError, RuntimeError):
            pass  # the server closes what is left idle
        finally:
            self._connection.close()

    def _reset(self, asked: dict[str, Any]) -> tuple[Observation, dict[str, Any]]:
        if self._episode_id is not None:
            asked["episode_id"] = self._episode_id
        told = self._ask("POST", "/reset", asked)
        self._episode_id = told["metadata"]["episode_id"]
        return _observation(told), told["metadata"]["info"]

    def _post(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        if self._episode_id is None:
            raise RuntimeError("no episode is running: call reset() first")
        return self._ask("POST", path, {"episode_id": self._episode_id, **asked})

    def _ask(self, method: str, path: str, asked: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON object. Raises as the server's error says: `EnvError`, `RuntimeError`, `ValueError`."""
        self._drop_stale_connection()
        body = json.dumps(asked).encode() if method == "POST" else None
        query = "?" + urlencode(asked) if asked and method == "GET" else ""
        try:
            self._connection.request(method, self._prefix + path + query, body, self._headers)
            response = self._connection.getresponse()
            status, text = response.status, response.read()
        except TimeoutError as error:
            self._lose()
            raise EnvError(f"{self._url}{path} did not answer within {self._timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            self._lose()
            raise EnvError(f"{self._url}{path} cannot be reached: {type(error).__name__}: {error}") from error
        try:
            told = json.loads(text)
            if not isinstance(told, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise EnvError(f"{self._url}{path} answered {status} with what is no JSON object: {text[:80]!r}") from error
        if status == 200:
            return told
        message = str((told.get("error") or {}).get("message") or text[:200])
        if status == _OUT_OF_ORDER:
            raise RuntimeError(message)
        if status in _BAD_REQUESTS:
            raise ValueError(message)
        if status == 404:
            self._episode_id = None
        raise EnvError(f"{self._url}{path}: {message}")

    def _drop_stale_connection(self) -> None:
        """A server may close a connection that was idle; what can be read before a request is its end."""
        sock = self._connection.sock
        if sock is not None and select.select([sock], [], [], 0)[0]:
            self._connection.close()  # http.client connects anew by itself

    def _lose(self) -> None:
        self._connection.close()
        self._episode_id = None


def _result(told: dict[str, Any]) -> StepResult:
    metadata = told["metadata"]
    return StepResult(
        _observation(told), told["reward"], metadata["terminated"], metadata["truncated"], metadata["info"]
    )


def _observation(told: dict[str, Any]) -> Observation:
    shown = told["observation"]
    return Observation(text=shown["text"], kind=ObservationKind(shown["kind"]))
