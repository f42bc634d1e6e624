"""A disk that is full is waited for: somebody will free it, and a learner that ends by it costs its ranks' start.

Example::

    patiently(file.flush)
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 600.0
"""After so long the error is raised. Other ranks wait no longer than their collectives' limit in any case."""
_AGAIN_S = 1.0
_WORDS = os.strerror(errno.ENOSPC)
T = TypeVar("T")
logger = logging.getLogger(__name__)


def patiently(write: Callable[[], T], *, patience_s: float = PATIENCE_S) -> T:
    """`write()`, again while there is no room for what it writes; it must not mind being called again."""
    deadline_s, told = time.monotonic() + patience_s, False
    while True:
        try:
            return write()
        except Exception as error:
            # Libraries that write by themselves have errors of their own, which quote the system's words.
            full = error.errno == errno.ENOSPC if isinstance(error, OSError) else _WORDS in str(error)
            if not full or time.monotonic() > deadline_s:
                raise
            if not told:
                logger.warning("%s; it is tried again for %g s", error, patience_s)
                told = True
        time.sleep(_AGAIN_S)
