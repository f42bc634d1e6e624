"""A policy that may sample so many tokens in all: what a client's `max_tokens` means for an agent of several steps.

It counts as `Usage` does, candidates that lost included. With nothing left it raises a `PolicyError` of class LIMIT,
which ends an episode with stop reason "length".

Example::

    limited = BudgetedPolicy(policy, most_tokens=512)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rollout.policy import Policy, PolicyError, Sampling
from rollout.trajectory import Completion, FailureClass, Message


class BudgetedPolicy:
    """`policy` for one episode; closing it is left to whoever owns `policy`."""

    def __init__(self, policy: Policy, *, most_tokens: int) -> None:
        self._policy, self._most, self._left = policy, most_tokens, most_tokens
        self.name = policy.name

    @property
    def weights_version(self) -> str:
        return self._policy.weights_version

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        each = min(sampling.max_tokens, self._left // sampling.n)
        if each < 1:
            raise PolicyError(f"the budget of {self._most} tokens is used up", FailureClass.LIMIT)
        completions = await self._policy.complete(messages, replace(sampling, max_tokens=each), prefix=prefix)
        self._left -= sum(completion.completion_tokens - completion.shared_tokens for completion in completions)
        return completions

    async def close(self) -> None:
        pass
