"""What earlier runs have recorded of this run's episodes: `reuse`.

Another objective, another student or fewer tasks need no other trajectories. Those that this run would collect, by
their keys (task, policy, sample, settings), are copied from the ledgers named; the rest is collected. A key does not
tell what the env was like, so a ledger of a run with another env, retrieval or world is refused.

Example::

    python launch/distill.py learner=span run_dir=runs/span 'reuse=[runs/starter-seed0/ledger]'
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launch.config import DistillConfig
from launch.config_reading import to_plain
from launch.wiring import Assignment
from learner.config import ConfigError
from rollout.ledger_merge import merge

SAME = ("env", "retrieval", "tasks.source", "tasks.seed")
"""What both runs must have in common."""


def check_reuse(config: DistillConfig) -> None:
    """Raises `ConfigError` for a ledger that is not there, or of another world."""
    for uri in config.reuse:
        if "://" in uri:
            continue  # read when it is merged; its run is not beside it
        if not (Path(uri) / "ledger.json").is_file():
            raise ConfigError(f"config reuse: {uri!r} holds no ledger (no ledger.json there)")
        record = Path(uri).parent / "config.json"
        if record.is_file():
            _check_same_world(uri, json.loads(record.read_text()), to_plain(config))


def reuse(config: DistillConfig, assigned: Sequence[Assignment], into: Path) -> int:
    """How many trajectories were copied into the ledger `into`. Raises `rollout.ledger.LedgerError`."""
    missing = {request.key for each in assigned for request in each.missing}
    return merge(config.reuse, into, writer="reuse", only=missing).results


def _check_same_world(uri: str, there: dict[str, object], here: dict[str, object]) -> None:
    for key in SAME:
        old, new = _at(there, key), _at(here, key)
        if old != new:
            raise ConfigError(
                f"config reuse: {uri!r} is of a run with another {key}: there {_told(old, new)}, here "
                f"{_told(new, old)}"
            )


def _at(config: object, key: str) -> object:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _told(value: object, other: object) -> str:
    """The values that differ, of two mappings."""
    if not (isinstance(value, dict) and isinstance(other, dict)):
        return repr(value)
    return repr({key: each for key, each in value.items() if other.get(key, ...) != each})
