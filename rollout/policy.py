"""The seam between an agent and whatever produces its text: `Policy`, and a scripted one for tests and demos.

Teacher and student are both policies. `rollout.vllm_policy`, `rollout.openai_policy` and `rollout.expert` are the real
ones. """

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rollout.trajectory import Completion, FailureClass, Message


class PolicyError(RuntimeError):
    """The policy could not answer (engine dead, endpoint down, prompt too long): our failure, never the model's."""

    ends_collection = False
    """True: no other episode of this worker can go on either, so none is blamed for it."""

    def __init__(self, message: str, failure_class: FailureClass = FailureClass.ENGINE) -> None:
        super().__init__(message)
        self.failure_class = failure_class


class EngineDiedError(PolicyError):
    """The engine is gone, and with it every request that it had: the worker must be started anew."""

    ends_collection = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample one assistant turn."""

    n: int = 1
    """Completions to return."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Sample from the k likeliest tokens alone; 0: from all."""
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    """Strings that end the turn; they stay part of the text."""
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    """Also the log-probabilities of so many of the likeliest tokens at each place; our own vLLM alone knows them."""
    timeout_s: float = 120.0


@runtime_checkable
class Policy(Protocol):
    """Messages in, n completions out."""

    @property
    def name(self) -> str:
        """Stable over runs: it is part of every trajectory's key."""
        ...

    @property
    def weights_version(self) -> str: ...

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        """Sample `sampling.n` assistant turns that begin with `prefix`. Raises `PolicyError`."""
        ...

    async def close(self) -> None:
        """Free the engine or the connections; may be called twice."""
        ...


class ScriptedPolicy:
    """Says what `reply(messages, i)` returns for candidate i: the deterministic policy of tests."""

    weights_version = "scripted"

    def __init__(self, reply: Callable[[Sequence[Message], int], str], name: str = "scripted") -> None:
        self.name = name
        self._reply = reply
        self.calls: list[tuple[tuple[Message, ...], Sampling, str]] = []

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        self.calls.append((tuple(messages), sampling, prefix))
        texts = [self._reply(messages, i) for i in range(sampling.n)]
        return [
            Completion(text=prefix + text, completion_tokens=len(text.split()), weights_version=self.weights_version)
            for text in texts
        ]

    async def close(self) -> None:
        pass
