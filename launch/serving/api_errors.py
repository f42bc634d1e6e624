"""Errors as OpenAI's API tells them: `{"error": {"message", "type", "param", "code"}}` with the status that fits.

See https://platform.openai.com/docs/guides/error-codes. Messages name what is wrong and what would be right, and never
repeat what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.serving.places import NoPlace
from rollout.policy import PolicyError
from rollout.trajectory import FailureClass, StopReason, Trajectory

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that gets an error for an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_s = status, message, code, param, retry_s

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> Mapping[str, str]:
        headers = {}
        if self.retry_s is not None:
            headers["Retry-After"] = str(self.retry_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_s=5)


def from_no_place(error: NoPlace) -> ApiError:
    return ApiError(429, str(error), code="no_place", retry_s=error.retry_s)


def from_policy(error: PolicyError) -> ApiError:
    """What ends more than one episode."""
    if error.failure_class is FailureClass.LIMIT:
        return ApiError(429, "the budget of this agent is used up", code="insufficient_quota")
    return ApiError(503, "the engine has died; the server must be started again", code="engine_died")


def from_trajectory(trajectory: Trajectory) -> ApiError | None:
    """The error that an episode ended in; None when it is an answer, or a lack of one that is the agent's own."""
    failure = trajectory.failure
    if failure is None:
        if trajectory.stop_reason is StopReason.LENGTH and not trajectory.steps:
            message = f"the question does not fit: {trajectory.stop_detail}"
            return invalid(message, param="messages", code="context_length_exceeded")
        return None
    if failure.failure_class is FailureClass.MODEL:
        return None  # finish reason "content_filter"
    if failure.failure_class is FailureClass.INPUT:
        return invalid("the question cannot be given to the model", param="messages", code="invalid_question")
    if failure.failure_class is FailureClass.LIMIT:
        return ApiError(429, "the budget of this agent is used up", code="insufficient_quota")
    place = "environment" if failure.failure_class is FailureClass.ENVIRONMENT else "engine"
    return ApiError(503, f"the {place} failed; the same request may be tried again", code=f"{place}_failed", retry_s=1)
