"""Which rows the next optimizer step trains on: the stream first, then shuffled passes over what it brought.

`Curriculum` holds the examples and the position in them; it is plain and deterministic, knows no torch, and its
`state()` is what a checkpoint must remember for a resumed run to train on exactly what was left. The first pass takes
examples as they arrive; pass e > 0 takes all of them in an order that depends on (seed, e) and their keys alone.

With an `ordering` rows come by difficulty (arXiv 2505.13820 trains from simple to complex): in the first pass those of
each window of arrivals, in later passes all of them. Windows are counted over all that arrives, what a resumed run has
trained on already included, so they are the same after a resume.

Example::

    curriculum = Curriculum(tokens_per_step=4096, seed=0)
    curriculum.add(example, arrived=1)
    curriculum.take()            # [] until a step is full; after `end_stream()` the rest too, then the next passes
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from learner.config import CurriculumConfig
from learner.difficulty import Difficulty, make_difficulty
from learner.examples import Example
from learner.packing import fill_step
from learner.row_order import Ascending, Paced, RowOrder, Shuffled


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordering:
    """By difficulty instead of by chance."""

    order: RowOrder
    difficulty: Difficulty
    """Asked for all rows at the beginning of each pass, and at the end of each window of the first."""
    window_rows: int = 0
    """Rows of the first pass that are waited for and then ordered; 0: as they come."""
    passes: int | None = None
    """So many are ordered, the stream's included; None: all."""

    def holds_in(self, epoch: int) -> bool:
        """Whether this pass is ordered."""
        return self.passes is None or epoch < self.passes

    def describe(self) -> str:
        """What must be the same for a resumed run."""
        return f"{self.order}, windows of {self.window_rows}, {self.passes or 'all'} passes"


def make_ordering(config: CurriculumConfig) -> Ordering | None:
    """What the configuration says; its `difficulty` is the `ExampleMaker`'s too. None: no order. Raises `ConfigError`
    for success rates that cannot be read."""
    if config.order == "none":
        return None
    return Ordering(
        order=Ascending() if config.order == "ascending" else Paced(config.start_share),
        difficulty=make_difficulty(config.by, rates=config.rates),
        window_rows=config.window_rows,
        passes=config.ordered_passes,
    )


@dataclass(slots=True)
class Curriculum:
    """`epochs`: passes over the examples; None: without end."""

    tokens_per_step: int
    seed: int
    epochs: int | None = None
    rows_per_step: int | None = None
    """Fixed number of rows a step, whatever their tokens; None: as many as `tokens_per_step` allows."""
    ordering: Ordering | None = None
    """None: as they come, then shuffled."""
    epoch: int = 0
    """Complete passes."""
    stream_ended: bool = False
    examples: dict[str, Example] = field(default_factory=dict)
    """By key, in order of arrival."""
    arrived_at_last_row: int = 0
    """How many trajectories had arrived when the first pass's last trained row did."""
    _trained: set[str] = field(default_factory=set)
    """Keys of the present pass that have been taken."""
    _window: dict[str, Example] = field(default_factory=dict)
    """First pass: what has arrived since the last window was closed, rows taken before a resume included."""
    _window_waiting: int = 0
    """Rows of the window that are not trained on yet."""
    _pending: deque[Example] = field(default_factory=deque)
    _arrived: dict[str, int] = field(default_factory=dict)
    _known: frozenset[str] | None = None
    """After a resume beyond the first pass: the keys that the stream had brought."""

    def add(self, example: Example, arrived: int) -> bool:
        """One more from the stream, the `arrived`-th trajectory. False when it is there already, or too late."""
        if example.key in self.examples or (self._known is not None and example.key not in self._known):
            return False
        self.examples[example.key] = example
        self._arrived[example.key] = arrived
        if self.epoch > 0:
            return True
        if self.ordering is not None and self.ordering.window_rows:
            self._window[example.key] = example
            self._window_waiting += example.key not in self._trained
            if len(self._window) == self.ordering.window_rows:
                self._close_window()
        elif example.key not in self._trained:
            self._pending.append(example)
        return True

    def end_stream(self) -> None:
        """No more will come. Raises ValueError when a resumed run was not given what it had before."""
        expected = self._known if self._known is not None else self._trained
        missing = sorted(expected - self.examples.keys())
        if missing:
            raise ValueError(
                f"{len(missing)} trajectories that the checkpoint was trained on did not come again, "
                f"first {missing[0]!r}; give the resumed run the same ledger"
            )
        self._close_window()
        self.stream_ended = True
        self._start_next_pass_if_over()

    def take(self) -> list[Example]:
        """The rows of the next step; [] when more must arrive first, or when all passes are done (`done`)."""
        count = self._full_step()
        if count is None:
            if not self.stream_ended:
                return []
            count = len(self._pending)
        rows = [self._pending.popleft() for _ in range(count)]
        for row in rows:
            self._trained.add(row.key)
            if self.epoch == 0:
                self.arrived_at_last_row = max(self.arrived_at_last_row, self._arrived[row.key])
        self._start_next_pass_if_over()
        return rows

    def _full_step(self) -> int | None:
        """How many pending rows make a step; None when there are too few."""
        if self.rows_per_step is not None:
            return self.rows_per_step if len(self._pending) >= self.rows_per_step else None
        return fill_step([len(example) for example in self._pending], self.tokens_per_step)

    @property
    def waiting(self) -> int:
        """Rows that have arrived and are not trained on in this pass yet."""
        return len(self._pending) + self._window_waiting

    @property
    def done(self) -> bool:
        """Every pass is over (or there is nothing to pass over)."""
        if not self.stream_ended:
            return False
        return not self.examples or (self.epochs is not None and self.epoch >= self.epochs)

    def fraction(self, expected_trajectories: int | None) -> float:
        """Of all passes, in [0, 1]; during the first it is of `expected_trajectories`, 0 while nobody knows the
        number."""
        if self.epochs is None:
            return 0.0
        if self.done:
            return 1.0
        if self.epoch > 0:
            within = len(self._trained) / max(1, len(self.examples))
        elif expected_trajectories:
            within = min(1.0, self.arrived_at_last_row / expected_trajectories)
        else:
            within = 0.0
        return (self.epoch + within) / self.epochs

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "epoch": self.epoch,
            "trained": sorted(self._trained),
            "known": sorted(self.examples) if self.epoch > 0 else None,
            "seed": self.seed,
            "tokens_per_step": self.tokens_per_step,
            "rows_per_step": self.rows_per_step,
            "ordering": None if self.ordering is None else self.ordering.describe(),
            "arrived_at_last_row": self.arrived_at_last_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Before anything is added. Raises ValueError when the rows would be taken differently than before."""
        for name in ("seed", "tokens_per_step", "rows_per_step"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, the checkpoint's run had {state[name]}; use that")
        ordering = None if self.ordering is None else self.ordering.describe()
        if state.get("ordering") != ordering:
            raise ValueError(
                f"the curriculum is {ordering}, the checkpoint's run had {state.get('ordering')}; use that"
            )
        self.epoch = state["epoch"]
        self._trained = set(state["trained"])
        self._known = None if state["known"] is None else frozenset(state["known"])
        self.arrived_at_last_row = state["arrived_at_last_row"]

    def _start_next_pass_if_over(self) -> None:
        """Queue what the present pass has left, or else the next pass."""
        if not self.stream_ended or self._pending or self.done:
            return
        if self._trained >= self.examples.keys():
            self.epoch += 1
            self._trained = set()
            if self.done:
                return
        self._queue(self.examples)

    def _close_window(self) -> None:
        self._queue(self._window)
        self._window, self._window_waiting = {}, 0

    def _queue(self, rows: dict[str, Example]) -> None:
        """What this pass has left of `rows`, in the pass's order; the order is that of all of them."""
        if self.ordering is not None and self.ordering.holds_in(self.epoch):
            difficulties = {key: self.ordering.difficulty.latest(row) for key, row in rows.items()}
            keys = self.ordering.order.arrange(difficulties, self.seed, self.epoch)
        else:
            keys = shuffled(rows, self.seed, self.epoch)
        self._pending.extend(rows[key] for key in keys if key not in self._trained)


def shuffled(keys: Iterable[str], seed: int, epoch: int) -> list[str]:
    """The same order for the same keys, in whatever order they come."""
    return Shuffled().arrange(dict.fromkeys(keys), seed, epoch)


def held_out(task_id: str, share: float) -> bool:
    """Whether a task belongs to the held-out share; depends on the id alone, so every run agrees."""
    if share <= 0:
        return False
    digest = hashlib.sha256(task_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
