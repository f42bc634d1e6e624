"""What every client of an OpenAI-compatible endpoint needs to know: who is near, which failures pass, how long to wait.

It sends nothing itself; `envs.judge` and `rollout.openai_policy` do.

Example::

    if may_pass(error):
        await asyncio.sleep(delay_s(error, tried))
"""

from __future__ import annotations

import email.utils
import ipaddress
import random
import time
from urllib.parse import urlsplit

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0


def is_local(base_url: str) -> bool:
    """This machine or its private network: an address that is not public, or a host name without a dot."""
    host = urlsplit(base_url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host
    return address.is_private or address.is_loopback


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: overload, a lost connection, a broken answer; not a wrong request."""
    from openai import APIConnectionError, APIResponseValidationError, APIStatusError

    if isinstance(error, APIStatusError):
        if getattr(error, "code", None) == "insufficient_quota":
            return False
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    # ValueError: a body that is no JSON though it says so.
    return isinstance(error, APIConnectionError | APIResponseValidationError | ValueError)


def delay_s(error: Exception, tried: int) -> float:
    """Seconds to wait after try number `tried` (from 0): what the server asks for, else anything up to a limit that
    doubles (full jitter, so that those who failed together do not come back together)."""
    asked = asked_wait_s(error)
    return random.uniform(0.0, min(FIRST_DELAY_S * 2**tried, LONGEST_DELAY_S)) if asked is None else asked


def asked_wait_s(error: Exception) -> float | None:
    """Seconds that the server asks to wait (Retry-After, in seconds or as a date); None when it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    asked = str(headers.get("retry-after", "")).strip()
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
