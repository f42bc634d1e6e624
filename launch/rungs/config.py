"""What a ladder is made of: its runs, the rows of its table, and what one expects of them (`configs/ladder.yaml`).

Example::

    ladder, overrides = read_ladder(["ladder.seeds=[0]", "tasks.test_count=50"])
    ladder.command(ladder.runs[0], seed=0, overrides=overrides)      # overrides of launch/distill.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.bounds import check_bounds
from launch.config_reading import CONFIG_FOLDER, parse_config
from learner.config import ConfigError

PREFIX = "ladder."


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderRun:
    """One run of the main job, for each seed."""

    name: str
    overrides: tuple[str, ...] = ()
    reuse: str = ""
    """The run whose trajectories it is trained on too; "" collects its own."""
    rows: tuple[str, ...]
    """Who is scored at its end: `evaluate.rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderRow:
    """One row of the table: `row` of the results of `run`."""

    name: str
    title: str
    run: str
    row: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """On the same held-out tasks `higher` solves more than `lower`; both are names of rows."""

    lower: str
    higher: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderConfig:
    """Raises `ValueError` for names that are twice there or unknown."""

    out: str
    seeds: tuple[int, ...]
    parallel: int = 1
    """Runs at a time."""
    common: tuple[str, ...] = ()
    """Overrides of every run."""
    runs: tuple[LadderRun, ...]
    table: tuple[LadderRow, ...]
    expected: tuple[Expectation, ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self, at_least_1=("parallel",))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}; give at least one, each once")
        rows = _unique("table", [row.name for row in self.table])
        before: set[str] = set()
        for run in self.runs:
            if run.reuse and run.reuse not in before:
                raise ValueError(f"run {run.name!r} reuses {run.reuse!r}, which is no run before it")
            before.add(run.name)
        for run in _unique("runs", [run.name for run in self.runs]) ^ {row.run for row in self.table}:
            raise ValueError(f"run {run!r} is only in one of runs and table; it must be in both")
        for expectation in self.expected:
            for name in {expectation.lower, expectation.higher} - rows:
                raise ValueError(f"expected names the row {name!r}; the table has {', '.join(sorted(rows))}")

    def folder(self, run: str, seed: int) -> Path:
        return Path(self.out).absolute() / f"seed{seed}" / run

    def command(self, run: LadderRun, *, seed: int, overrides: Sequence[str]) -> list[str]:
        """Overrides of `launch/distill.py`; what its user gave, `overrides`, beats all but where the run goes."""
        reuse = f"[{self.folder(run.reuse, seed) / 'ledger'}]" if run.reuse else "[]"
        return [
            *self.common,
            *run.overrides,
            *overrides,
            f"seed={seed}",
            f"run_dir={self.folder(run.name, seed)}",
            f"evaluate.rows=[{','.join(run.rows)}]",
            f"reuse={reuse}",
        ]


def read_ladder(overrides: Sequence[str]) -> tuple[LadderConfig, list[str]]:
    """The ladder, and those of `overrides` that are for its runs: all but `ladder.KEY=VALUE`. Raises `ConfigError`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    own = [text.removeprefix(PREFIX) for text in overrides if text.startswith(PREFIX)]
    others = [text for text in overrides if not text.startswith(PREFIX)]
    for key in ("seed", "run_dir", "reuse", "evaluate.rows"):
        if any(text.lstrip("+").partition("=")[0] == key for text in others):
            instead = {"seed": "ladder.seeds=[0,1]", "run_dir": "ladder.out=FOLDER"}.get(key, "configs/ladder.yaml")
            raise ConfigError(f"config {key}: the ladder sets it for each of its runs; use {instead}")
    try:
        config = OmegaConf.merge(OmegaConf.load(CONFIG_FOLDER / "ladder.yaml"), OmegaConf.from_dotlist(own))
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config ladder: {str(error).splitlines()[0]}") from None
    assert isinstance(plain, dict)
    return parse_config({str(key): value for key, value in plain.items()}, LadderConfig), others


def _unique(what: str, names: Sequence[str]) -> set[str]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what}: the name {name!r} is there twice")
    return set(names)
