"""What may go wrong with a request to an endpoint: our errors, and what those of the `openai` client mean.

Example::

    if passes(error):
        ...                     # try again
    elif too_long(error):
        ...                     # the prompt does not fit
"""

from __future__ import annotations

from envs.endpoints import may_pass
from rollout.policy import PolicyError
from rollout.replies import UnusableAnswerError
from rollout.trajectory import FailureClass


class EndpointGoneError(PolicyError):
    """Every call would fail alike: the endpoint answers nothing any more, refuses the key or knows no such model."""

    ends_collection = True


class RequestRefused(PolicyError):
    """The endpoint refuses the request for what it is (400, 404, 422, ...); `reason` is what it said, redacted."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "", parameter: str = "", code: str = "") -> None:
        super().__init__(message, FailureClass.INPUT)
        self.status, self.reason, self.parameter, self.code = status, reason, parameter, code


class LateError(Exception):
    """One attempt took too long."""


def passes(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    return may_pass(error) or isinstance(error, UnusableAnswerError | LateError) or broken_wire(error)


def broken_wire(error: Exception) -> bool:
    """A stream that breaks raises its HTTP library's errors, and API errors without a status."""
    from openai import APIError, APIStatusError

    if isinstance(error, APIError) and not isinstance(error, APIStatusError):
        return True
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "h11")


def too_long(error: Exception) -> bool:
    """Whether the prompt is longer than the model takes."""
    if getattr(error, "status_code", None) not in (400, 413, 422):
        return False
    text = str(error).lower()
    return getattr(error, "code", None) == "context_length_exceeded" or any(
        words in text for words in ("context length", "context window", "prompt is too long", "maximum input length")
    )
