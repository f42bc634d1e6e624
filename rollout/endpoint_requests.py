"""What is asked of an endpoint, and how: `EndpointSettings`, `Request`, `Answer`.

Example::

    Request(path="/chat/completions", body=lambda: body, identity=body, prompts=(question,), most_prompt_tokens=900,
            most_completion_tokens=512)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.rate_limits import RateLimits, Retries
from rollout.replies import Reply
from rollout.spend import Prices


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSettings:
    """How an endpoint is asked; `rollout.policy_spec.PolicySpec` documents the fields."""

    api_key_env: str = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    """One attempt, from its first byte to its last; of a stream, each wait for the next piece."""
    concurrency: int = 32
    retries: Retries = field(default_factory=Retries)
    rate_limits: RateLimits = field(default_factory=RateLimits)
    prices: Prices | None = None
    cache_path: str = ""

    def __post_init__(self) -> None:
        if self.concurrency < 1 or not self.timeout_s > 0:
            raise ValueError(
                f"an endpoint needs concurrency of at least 1 and timeout_s above 0, "
                f"not {self.concurrency} and {self.timeout_s}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is sent, and what is known of it before."""

    path: str
    body: Callable[[], Mapping[str, Any]]
    """Made when its turn has come, by what is known of the endpoint then."""
    identity: Mapping[str, Any]
    """What makes it the same request for the cache: all that changes the answer, whatever the body must leave out."""
    prompts: tuple[str, ...]
    """Texts that no error may repeat."""
    most_prompt_tokens: int
    most_completion_tokens: int
    stream: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A reply and what it cost this time."""

    reply: Reply
    cost_usd: float = 0.0
    cached: bool = False
