"""The learner numbers: useful tokens/s beside TRL's SFTTrainer and beside a bare loop, stall, two ranks.

python benchmarks/learner.py                                     # all of them, twenty minutes on two idle cores
python benchmarks/learner.py --only trl,limit --repeats 1 --rows 160     # quickly
python benchmarks/learner.py --tune --only trl                   # first try all of TRL's settings again

Every side trains the base student on the same rows of the built-in expert in the same order, in a process of its own
with one thread on one core, in turns; medians of `--repeats` runs. "Useful" tokens are trained tokens: neither padding
nor what the student only reads. The first steps are not counted. Sides that are compared must reach the same
validation loss, which one function measures on all of them.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.learner_side import run_side, save
from benchmarks.learner_trl import BEST, CANDIDATES, TrlSettings
from benchmarks.learner_world import Measured, Workload, make_workload
from benchmarks.scoreboard import Row

PARTS = ("trl", "limit", "stall", "ranks")
TRL_GOAL, LIMIT_GOAL, STALL_GOAL = 1.2, 0.90, 0.02
STREAMED = 640
"""Trajectories of the stream whose waiting is measured: more than the queue and the learner hold together."""
SAME_LOSS = 0.01
"""Validation losses that differ by less than this share are the same: bf16 products are summed in another order."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of the comparison, and how it is run."""

    name: str
    side: str
    settings: Mapping[str, Any]


class Runs:
    """What each side measured, by name."""

    def __init__(self, runs: Mapping[str, Sequence[Measured]]) -> None:
        self._runs = runs

    def per_s(self, name: str) -> float:
        return statistics.median(run.trained_per_s for run in self._runs[name])

    def per_cpu_s(self, name: str) -> float:
        return statistics.median(run.trained_per_cpu_s for run in self._runs[name])

    def all_per_s(self, name: str) -> float:
        return statistics.median(run.tokens / run.wall_s for run in self._runs[name])

    def loss(self, name: str) -> float:
        return statistics.median(run.validation_loss for run in self._runs[name])

    def first_loss(self, name: str) -> float:
        return statistics.median(run.first_loss for run in self._runs[name])


def measure(options: Any, parts: Sequence[str]) -> Iterator[Row]:
    workload = make_workload(rows=options.rows, held_out=options.held_out)
    print(f"{workload.describe()}; the expert made {workload.trajectories_per_s:.0f} of them a second", flush=True)
    if "trl" in parts or "limit" in parts:
        with tempfile.TemporaryDirectory(prefix="learner-benchmark-") as folder:
            file = Path(folder) / "workload"
            save(workload, file)
            best = tuned(file) if options.tune else BEST
            runs = in_turns(sides(parts, best), file, repeats=options.repeats)
        if "trl" in parts:
            yield from trl_rows(runs, best)
        if "limit" in parts:
            yield from limit_rows(runs)
    if "stall" in parts or "ranks" in parts:
        yield from stream_rows(workload, parts, repeats=options.repeats)


def sides(parts: Sequence[str], best: TrlSettings) -> list[Side]:
    """Ours, TRL's and the bare loop's, as far as `parts` ask for them."""
    trl = dataclasses.asdict(best)
    chosen = [Side(name="ours, AdamW", side="ours", settings={"optimizer": "adamw"})]
    if "trl" in parts:
        chosen.append(Side(name="TRL, AdamW", side="trl", settings={**trl, "optimizer": "adamw"}))
    if "limit" in parts:
        chosen.append(Side(name="bare, AdamW", side="bare", settings={"optimizer": "adamw"}))
    chosen.append(Side(name="ours, Muon", side="ours", settings={"optimizer": "muon"}))
    if "trl" in parts:
        chosen.append(Side(name="TRL, Muon", side="trl", settings={**trl, "optimizer": "muon"}))
    if "limit" in parts:
        chosen.append(Side(name="bare, Muon", side="bare", settings={"optimizer": "muon"}))
    return chosen


def in_turns(chosen: Sequence[Side], workload: Path, *, repeats: int) -> Runs:
    """Every side once, then every side again: what disturbs the machine for a while disturbs them all."""
    runs: dict[str, list[Measured]] = {side.name: [] for side in chosen}
    for turn in range(repeats):
        for side in chosen:
            measured = run_side(side.side, workload, side.settings)
            runs[side.name].append(measured)
            print(f"{turn + 1}/{repeats} {side.name}: {measured.describe()}", flush=True)
    return Runs(runs)


def tuned(workload: Path) -> TrlSettings:
    """The fastest of TRL's `CANDIDATES` whose loss is at most a tenth above the best one's; one that fails here, such
    as a compiled one without a compiler, is told and passed over. Raises `RuntimeError` when all of them fail."""
    tried: list[tuple[TrlSettings, Measured]] = []
    for candidate in CANDIDATES:
        try:
            tried.append((candidate, run_side("trl", workload, dataclasses.asdict(candidate))))
        except RuntimeError as error:
            print(f"TRL, {candidate.describe()}: {error}", flush=True)
            continue
        print(f"TRL, {candidate.describe()}: {tried[-1][1].describe()}", flush=True)
    if not tried:
        raise RuntimeError("TRL failed with all of its settings; see above")
    least = min(measured.validation_loss for _, measured in tried)
    right = [one for one in tried if one[1].validation_loss <= 1.1 * least]
    return max(right, key=lambda one: one[1].trained_per_s)[0]


def trl_rows(runs: Runs, best: TrlSettings) -> Iterator[Row]:
    for optimizer, goal in (("AdamW", True), ("Muon", False)):
        ours, theirs = f"ours, {optimizer}", f"TRL, {optimizer}"
        ratio = runs.per_s(ours) / runs.per_s(theirs)
        note = best.describe() if goal else "our optimizer object, as TRL has none"
        yield Row(
            what=f"useful tokens/s, times TRL's, {optimizer}",
            measured=ratio,
            unit="x",
            goal=f">= {TRL_GOAL}" if goal else "",
            kept=ratio >= TRL_GOAL if goal else None,
            beside=f"{runs.per_s(ours):,.0f} beside {runs.per_s(theirs):,.0f} ({note}); per processor second "
            f"{runs.per_cpu_s(ours) / runs.per_cpu_s(theirs):.2f} x",
        )
        apart = abs(runs.loss(ours) / runs.loss(theirs) - 1)
        yield Row(
            what=f"validation loss after the same tokens, {optimizer}",
            measured=runs.loss(ours),
            goal=f"within {SAME_LOSS:.0%} of TRL's" if goal else "",
            kept=apart <= SAME_LOSS if goal else None,
            beside=f"TRL {runs.loss(theirs):.4f}; loss of the first step {runs.first_loss(ours):.4f} beside "
            f"{runs.first_loss(theirs):.4f}",
        )


def limit_rows(runs: Runs) -> Iterator[Row]:
    for optimizer, what in (("Muon", "the embedded default"), ("AdamW", "AdamW on everything")):
        ours, bare = f"ours, {optimizer}", f"bare, {optimizer}"
        ratio = runs.per_s(ours) / runs.per_s(bare)
        yield Row(
            what=f"useful tokens/s, share of a bare loop's, {what}",
            measured=ratio,
            goal=f">= {LIMIT_GOAL}",
            kept=ratio >= LIMIT_GOAL,
            beside=f"{runs.per_s(ours):,.0f} beside {runs.per_s(bare):,.0f}; per processor second "
            f"{runs.per_cpu_s(ours) / runs.per_cpu_s(bare):.2f}; validation loss {runs.loss(ours):.4f} beside "
            f"{runs.loss(bare):.4f}",
        )
    yield Row(
        what="all tokens/s, padding left out, the embedded default",
        measured=runs.all_per_s("ours, Muon"),
        unit="tokens/s",
        beside=f"bare loop {runs.all_per_s('bare, Muon'):,.0f}",
    )


def stream_rows(workload: Workload, parts: Sequence[str], *, repeats: int) -> Iterator[Row]:
    from benchmarks.learner_stream import a_ray, rate, stall

    with a_ray():
        if "stall" in parts:
            seen = [stall(trajectories=STREAMED) for _ in range(repeats)]
            waited = statistics.median(one.waited for one in seen)
            yield Row(
                what="stall: share of the learner's time spent waiting",
                measured=waited,
                goal=f"<= {STALL_GOAL}",
                kept=waited <= STALL_GOAL,
                beside=f"outside of steps for any reason {statistics.median(one.outside_steps for one in seen):.3f}; "
                f"rollouts found the queue full {statistics.median(one.put_waits for one in seen):.0f} times; "
                f"{statistics.median(one.counted_s for one in seen):.0f} s counted",
            )
        if "ranks" in parts:
            rates = [(rate(workload, ranks=1), rate(workload, ranks=2)) for _ in range(repeats)]
            one, two = (statistics.median(side) for side in zip(*rates, strict=True))
            yield Row(
                what="two ranks, times one",
                measured=two / one,
                unit="x",
                beside=f"{two:,.0f} beside {one:,.0f} trained tokens/s, {workload.rows_per_step} rows a step in all, "
                f"{os.cpu_count()} cores",
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma-separated parts of: {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the medians are printed")
    parser.add_argument("--rows", type=int, default=320, help="trajectories that each side trains on")
    parser.add_argument("--held-out", type=int, default=96, help="trajectories of the validation loss")
    parser.add_argument("--tune", action="store_true", help="try all of TRL's settings first, and use the best")
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {unknown.pop()!r} is unknown; there are {', '.join(PARTS)}")
    for name, least in (("repeats", 1), ("rows", 96), ("held_out", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}")
    title = f"The learner, base student of 2 M parameters, {os.cpu_count()} cores, medians of {options.repeats}"
    print(title, flush=True)
    return scoreboard.publish(list(measure(options, parts)), options, title=title)


if __name__ == "__main__":
    sys.exit(main())
