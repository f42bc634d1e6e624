"""How long steps take, measured: the episodes that a simulation replays, and the file that they are kept in.

A simulated episode is a measured one again: as many steps, each with the delay of its policy and of its env, so that
what belongs together in an episode (a slow first step and a long second) stays together. Every run of tasks as long as
the file replays each measured episode once, in an order drawn from the seed: two collections have the same work to do,
and differ by nothing that was drawn.

`teacher` is no measurement but an assumption, and says so: the delays of the policy times a factor.

Example::

    delays = load()                 # measured: the student of the embedded default, on vLLM
    slow = teacher(delays)          # nine times as slow
    slow.episode(17)[0].policy_s

python benchmarks/scale_delays.py RUN/evaluation/student "where it was measured" > benchmarks/scale_delays.json
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

MEASURED_FILE = Path(__file__).with_suffix(".json")
TEACHER_FACTOR = 9.0
STRAGGLER = 2.0
"""An episode that takes more than so many times the mean is one."""
_DIGITS = 4
"""Tenths of a millisecond: finer than what is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDelay:
    """One step of an episode, in seconds."""

    policy_s: float
    env_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """Measured episodes, to be replayed in turn. Raises `ValueError` when there is none, or none with a step."""

    source: str
    """Where they come from, in words."""
    episodes: tuple[tuple[StepDelay, ...], ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.episodes or not all(self.episodes):
            raise ValueError(f"delays from {self.source!r} hold an episode without steps, or none at all")

    def episode(self, number: int) -> tuple[StepDelay, ...]:
        """What the task of that number replays."""
        turn, place = divmod(number, len(self.episodes))
        return self.episodes[_order(self.seed, turn, len(self.episodes))[place]]

    def without_stragglers(self, times: float = STRAGGLER) -> Delays:
        """Without episodes of more than `times` the mean."""
        kept = tuple(steps for steps in self.episodes if _length_s(steps) <= times * self.episode_s)
        return replace(self, episodes=kept)

    def scaled(self, factor: float, source: str) -> Delays:
        """The same episodes with a policy that takes `factor` times as long."""
        if not factor > 0:
            raise ValueError(f"delays can be scaled by a factor above 0, not {factor:g}")
        slower = tuple(
            tuple(StepDelay(policy_s=step.policy_s * factor, env_s=step.env_s) for step in steps)
            for steps in self.episodes
        )
        return replace(self, source=source, episodes=slower)

    @property
    def most_steps(self) -> int:
        return max(map(len, self.episodes))

    @property
    def steps_per_episode(self) -> float:
        return sum(map(len, self.episodes)) / len(self.episodes)

    @property
    def episode_s(self) -> float:
        """Of the mean episode, all delays of it."""
        return sum(map(_length_s, self.episodes)) / len(self.episodes)

    def quantiles(self, what: str, shares: tuple[float, ...]) -> list[float]:
        """Seconds that this share of the steps takes at most; `what`: "policy_s" or "env_s"."""
        values = sorted(getattr(step, what) for steps in self.episodes for step in steps)
        return [values[min(len(values) - 1, int(share * len(values)))] for share in shares]


def teacher(measured: Delays, factor: float = TEACHER_FACTOR) -> Delays:
    """What a 32B teacher on GPUs would take, by assumption. Its few stragglers are left out: each would keep a whole
    collection for minutes at its end, and change nothing else."""
    even = measured.without_stragglers()
    source = (
        f"an assumption: the student's measured delays of the policy times {factor:g}, {len(measured.episodes)} "
        f"episodes without {len(measured.episodes) - len(even.episodes)} stragglers (about what a 32B teacher on GPUs "
        "takes with 200 requests at once: 270 tokens a turn, 40 ms a token); envs as measured"
    )
    return even.scaled(factor, source)


def _length_s(steps: tuple[StepDelay, ...]) -> float:
    return sum(step.policy_s + step.env_s for step in steps)


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(seed: int, turn: int, count: int) -> list[int]:
    if (seed, turn, count) not in _orders:
        order = list(range(count))
        random.Random(f"{seed}-{turn}").shuffle(order)
        _orders[seed, turn, count] = order
    return _orders[seed, turn, count]


def load(path: Path = MEASURED_FILE, *, seed: int = 0) -> Delays:
    """What `measure` has written. Raises `ValueError` for a file that is something else."""
    try:
        record = json.loads(path.read_text())
        episodes = tuple(
            tuple(StepDelay(policy_s=policy_s, env_s=env_s) for policy_s, env_s in steps)
            for steps in record["episodes"]
        )
        return Delays(source=record["source"], episodes=episodes, seed=seed)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no measured delays: {error}") from error


def measure(ledger: Path, source: str) -> Delays:
    """Of every result in the ledger that is there. Raises `ValueError` where there is none."""
    from rollout.ledger import Ledger

    episodes = tuple(
        tuple(
            StepDelay(policy_s=round(step.policy_s, _DIGITS), env_s=round(step.env_s, _DIGITS))
            for step in trajectory.steps
        )
        for trajectory in sorted(Ledger(ledger).trajectories(), key=lambda trajectory: trajectory.key)
        if trajectory.steps
    )
    return Delays(source=source, episodes=episodes)


def to_json(delays: Delays) -> str:
    """With the quantiles in front, for people; `load` reads the episodes."""
    shares = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
    quantiles = {what: dict(zip(map(str, shares), delays.quantiles(what, shares), strict=True)) for what in _FIELDS}
    episodes = ",\n".join(json.dumps([[step.policy_s, step.env_s] for step in steps]) for steps in delays.episodes)
    head = json.dumps({"source": delays.source, "fields": _FIELDS, "quantiles": quantiles}, indent=1)
    return f'{head.removesuffix("}").rstrip()},\n "episodes": [\n{episodes}\n]}}\n'


_FIELDS = ("policy_s", "env_s")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit((__doc__ or "").strip().splitlines()[-1])
    sys.stdout.write(to_json(measure(Path(sys.argv[1]), sys.argv[2])))
