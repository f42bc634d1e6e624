"""What a person sees while a job runs: a live table on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

PLAIN_EVERY_S = 10.0
PLAIN_WIDTH = 100
"""Columns where there is no terminal to ask."""


class LiveView:
    """Shows named figures; `show` may be called as often as one likes."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, PLAIN_WIDTH)
        self._live: Live | None = None
        self._printed_at_s = 0.0
        self._started_s = time.monotonic()

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """One part of the job; its last figures stay on the screen."""
        self._printed_at_s = 0.0
        self.say(title)
        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=4) as live:
                self._live = live
                try:
                    yield
                finally:
                    self._live = None
        else:
            yield

    def say(self, line: str) -> None:
        """A line that stays."""
        minutes, seconds = divmod(int(time.monotonic() - self._started_s), 60)
        self.console.print(f"[{minutes:02d}:{seconds:02d}] {line}", markup=False)

    def show(self, figures: Mapping[str, str], *, last: bool = False) -> None:
        """The present figures of the stage; `last` prints them even if a line was just printed."""
        if self._live is not None:
            table = Table.grid(padding=(0, 2))
            for name, value in figures.items():
                table.add_row(f"[bold]{name}[/bold]", value)
            self._live.update(table)
        elif last or time.monotonic() - self._printed_at_s >= PLAIN_EVERY_S:
            self._printed_at_s = time.monotonic()
            self.say("  " + "; ".join(f"{name} {value}" for name, value in figures.items()))
