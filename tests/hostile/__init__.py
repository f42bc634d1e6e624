"""Programs that attack the sandbox, for `test_sandbox_hostile.py`: data, by category. Nothing here runs them.

Each says what must not happen, as an effect that `world.py` can see from outside: a connection that arrives, a file
that changes, a secret that is read, a signal that reaches a victim, the victim's memory, a forged result. `escaped()`,
called by the program itself, reports what only it can see: a fork that worked, a thread that started.

`world.prelude()` is put before every program and gives it: `PORT`, `UDP`, `UNIX`, `ABSTRACT` (where a listener waits),
`FOLDER` (anyone may write there), `SECRET_FILE`, `SECRET_LINK`, `VICTIM` (a process of the user that sandboxed code
has), `ADDRESS` (of its memory that holds the secret), `SIZE`, `libc`, `escaped`, `FORGED`, `frames()` (open sockets).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One attack."""

    category: str
    title: str
    code: str
    must_not: str
    """The effect that it is after: a name in `world.EFFECTS`, or "hang" for one that wants to run for ever."""
    in_place: bool = False
    """Run as a step of its own instead of beside siblings: it attacks the step after it."""

    @property
    def id(self) -> str:
        return f"{self.category}-{self.title}".replace(" ", "_")


def collect(category: str, must_not: str, programs: dict[str, str], *, in_place: bool = False) -> list[Program]:
    """Programs of one category that are after the same effect, by title."""
    return [
        Program(category=category, title=title, code=code.strip("\n"), must_not=must_not, in_place=in_place)
        for title, code in programs.items()
    ]


def all_programs() -> list[Program]:
    from hostile import limits, processes, protocol, reach

    return [*reach.PROGRAMS, *processes.PROGRAMS, *limits.PROGRAMS, *protocol.PROGRAMS]
