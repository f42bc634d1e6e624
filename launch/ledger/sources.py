"""What the commands of `launch.ledger` read: one or several ledgers as one, and a curation by name or file.

Example::

    sources = Sources(["runs/a/ledger", "s3://bucket/b/ledger"])
    for trajectory in sources.trajectories(): ...       # each key once, the first ledger's wins
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout import ledger_mark
from rollout.curation import Curation, CurationError
from rollout.ledger import Ledger, LedgerError
from rollout.records import from_table
from rollout.trajectory import Trajectory

CURATIONS = Path(__file__).resolve().parents[2] / "configs" / "curation"
PAPER = "paper"
"""The curation that says what is accepted when none is named; it asks exactly for `Trajectory.trainable`."""


class UsageError(ValueError):
    """A command that cannot be done as it was given; one line that names what is wrong."""


class Sources:
    """Ledgers as one. Raises `UsageError` for one that is not there or is something else."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.ledgers = [open_ledger(folder) for folder in folders]
        self.names = tuple(ledger.storage.uri for ledger in self.ledgers)

    def count(self) -> int:
        """Distinct keys of results."""
        return len({key for ledger in self.ledgers for key in ledger.keys()})

    def duplicates(self) -> int:
        """Result rows that are left out because an earlier one has their key."""
        rows = sum(ledger.count() + ledger.duplicates() for ledger in self.ledgers)
        return rows - self.count()

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every result once; see `Ledger.scan`. The key always comes along."""
        seen: set[str] = set()
        for ledger in self.ledgers:
            for table in ledger.scan(None if columns is None else list(dict.fromkeys(["key", *columns]))):
                if len(self.ledgers) > 1:
                    fresh = [key not in seen and not seen.add(key) for key in table.column("key").to_pylist()]
                    table = table if all(fresh) else table.filter(pa.array(fresh, pa.bool_()))
                if table.num_rows:
                    yield table

    def trajectories(self) -> Iterator[Trajectory]:
        """Every result once."""
        for table in self.scan():
            yield from from_table(table)

    def failure_tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every recorded failure, repeated attempts included."""
        for ledger in self.ledgers:
            yield from ledger.scan_failures(columns)


def open_ledger(folder: str) -> Ledger:
    """Raises `UsageError` where there is no ledger."""
    try:
        ledger = Ledger(folder)
        if ledger_mark.version(ledger.storage) is not None:
            return ledger
    except LedgerError as error:
        inner = Path(folder) / "ledger"
        if (inner / ledger_mark.MARK).is_file():
            raise UsageError(f"{folder} is a run; its ledger is {inner}") from None
        raise UsageError(str(error)) from None
    raise UsageError(f"{folder} is no ledger: there is no {ledger_mark.MARK} in it")


def load_curation(named: str) -> Curation:
    """A packaged curation's name, or a YAML file with a list under `filters`. Raises `UsageError`."""
    path = Path(named) if named.endswith((".yaml", ".yml")) else CURATIONS / f"{named}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in CURATIONS.glob("*.yaml")))
        raise UsageError(f"curation {named!r} is neither a file nor one of {there}")
    try:
        return Curation.from_config(_filters(path))
    except CurationError as error:
        raise UsageError(f"{path}: {error}") from None


def _filters(path: Path) -> Any:
    from omegaconf import OmegaConf

    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # whatever the YAML reader finds wrong, in its own classes
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict) or list(plain) != ["filters"]:
        raise UsageError(f"{path} must hold one key, filters, with a list such as [correct, no_parse_error]")
    return plain["filters"]
