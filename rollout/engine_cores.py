"""Cores that a CPU engine has to itself: `reserve_cores` keeps its own process off them, and a claim for each core
keeps other engines of the machine off them too.

An engine is one busy thread that everything else of the machine wakes up next to; the scheduler lets each of them
interrupt it, and a fifth of its speed is lost. Set apart on a core of its own it loses nothing. Linux only; a claim
ends with the process that holds it, however it ends.

Example::

    cores = reserve_cores(1)          # None when no core can be spared
    ...                               # the engine's process: os.sched_setaffinity(0, cores.numbers)
    cores.release()
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass


@dataclass(slots=True)
class ReservedCores:
    """Cores that are the engine's alone, as far as this process and its children go."""

    numbers: tuple[int, ...]
    _before: set[int]
    _claims: list[socket.socket]

    def release(self) -> None:
        """Give them back; may be called twice."""
        for claim in self._claims:
            claim.close()
        if self._claims:
            pin_process(self._before)
        self._claims = []


def reserve_cores(count: int) -> ReservedCores | None:
    """`count` of the cores that this process may use, with at least one left for itself; None when there are none."""
    if not hasattr(os, "sched_setaffinity") or count < 1:
        return None
    allowed = os.sched_getaffinity(0)
    claims: dict[int, socket.socket] = {}
    for number in sorted(allowed, reverse=True):
        if len(claims) == count or len(allowed) - len(claims) == 1:
            break
        claim = _claim(number)
        if claim is not None:
            claims[number] = claim
    if len(claims) < count:
        for claim in claims.values():
            claim.close()
        return None
    pin_process(allowed - set(claims))
    return ReservedCores(tuple(sorted(claims)), allowed, list(claims.values()))


def pin_process(cores: set[int]) -> None:
    """All threads of this process, and so the children that they start from now on, run on `cores` alone."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def _claim(core: int) -> socket.socket | None:
    """An abstract socket address, which one process of a machine can hold at a time."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0apprentice-engine-core-{core}")
    except OSError:
        claim.close()
        return None
    return claim
