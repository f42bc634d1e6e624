"""Many small runs of the main job in a row, on a cluster whose parts are killed, cut off and filled while it runs.

    python benchmarks/chaos.py --runs 30 --seed 0 --check --json chaos.json
    python benchmarks/chaos.py --seed 7 --runs 1                 what run 8 of the above had, alone

Every run draws its faults from a seed of its own, which is printed: nodes, raylets, rollout workers, engines, env
hosts, the retrieval actor, the queue, what hands out episodes, learner ranks and the driver are killed, the network
between two hosts is cut and heals, the disk fills up and is freed. After each run must hold: the ledger has exactly the
expected keys, each once; the student was trained on each trainable one once a pass; nothing of the job still runs; it
ended in time; no more time was lost than work in flight and recovery; the record of events and the report tell what
happened. At first some runs are left alone, which say how long one takes and how far two differ. Takes root for hosts
that can be cut off (`benchmarks.chaos_hosts`); without, they are all this machine, and it says so.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

if not __package__:  # run as a file: imports come from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.chaos_cluster import ChaosCluster
from benchmarks.chaos_faults import KINDS, draw, kinds_of_run
from benchmarks.chaos_run import Chaos, Result, tiny_student
from benchmarks.scoreboard import Row
from launch.job_command import stops_like_an_interrupt

NOISE_S, NOISE_SHARE = 20.0, 0.5
"""What two undisturbed runs may differ by beyond what was measured: starting anything takes longer some times."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next ones count on")
    parser.add_argument("--faults", type=int, default=3, help="of each run")
    parser.add_argument("--quiet", type=int, default=2, help="undisturbed runs of each sort at first")
    parser.add_argument("--workers", type=int, default=3, help="nodes beside the head")
    parser.add_argument("--kinds", default="", help=f"only these, in each run: {', '.join(KINDS)}")
    parser.add_argument("--keep", type=Path, help="folder, not there yet, where logs and runs that fail are kept")
    options = parser.parse_args(arguments)
    only = [kind.strip() for kind in options.kinds.split(",") if kind.strip()]
    if unknown := [kind for kind in only if kind not in KINDS]:
        parser.error(f"--kinds {unknown[0]!r} is unknown; there are {', '.join(KINDS)}")
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep {options.keep} is there already; name a folder that is not")
    stops_like_an_interrupt()
    # A socket's path has 107 bytes at most, so Ray's folder needs a short one.
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos-")) / "c"
    try:
        results, quiet, why = _all(options, folder.absolute(), only)
    except KeyboardInterrupt:
        return 130
    finally:
        if options.keep is None:
            shutil.rmtree(folder.parent, ignore_errors=True)
    rows = [*_by_run(results, quiet), *_by_kind(results), *_totals(results, why)]
    return scoreboard.publish(rows, options, title=f"{len(results)} runs under fire")


def _all(options, folder: Path, only: list[str]) -> tuple[list[Result], dict[bool, list[float]], str]:
    """(results, times of undisturbed runs without and with an engine, why hosts are no hosts)."""
    plans = []
    for i in range(options.runs):
        rng = random.Random(options.seed + i)
        kinds = only or kinds_of_run(options.seed + i, options.faults)
        plans.append((options.seed + i, draw(rng, kinds, [chr(ord("a") + n) for n in range(options.workers)])))
    with ChaosCluster(folder, workers=options.workers) as cluster:
        why = cluster.hosts.why
        print(f"hosts: {why and 'all are this machine: ' + why or 'network namespaces'}", flush=True)
        chaos = Chaos(cluster, tiny_student(folder / "student"))
        quiet: dict[bool, list[float]] = {}
        for engine in sorted({any(each.kind == "engine" for each in faults) for _, faults in plans}):
            for i in range(options.quiet):
                result = chaos.run(f"quiet-{int(engine)}-{i}", [], engine=engine)
                quiet.setdefault(engine, []).append(result.took_s)
                _say(f"undisturbed{' with an engine' if engine else ''}", result)
                if result.findings:
                    print(result.said[-4000:])
                    raise SystemExit("an undisturbed run does not keep what must hold; nothing was broken yet")
        results = []
        for seed, faults in plans:
            print(f"seed {seed}: {'; '.join(map(str, faults))}", flush=True)
            engine = any(each.kind == "engine" for each in faults)
            took_s = quiet[engine]
            noise_s = max(took_s) - min(took_s) + NOISE_S + NOISE_SHARE * median(took_s)
            result = chaos.run(f"seed-{seed}", faults, engine=engine, quiet_s=median(took_s), noise_s=noise_s)
            results.append(result)
            _say(f"seed {seed}", result)
            if result.findings:
                print(result.said[-4000:], flush=True)
    return results, quiet, why


def _say(name: str, result: Result) -> None:
    away = ", ".join(f"{each.kind} {each.away_s:.1f} s" for each in result.recoveries)
    late = f"; came too late: {', '.join(each.kind for each in result.not_done)}" if result.not_done else ""
    wrong = "".join(f"\n    {each}" for each in result.findings)
    print(
        f"  {name}: {result.took_s:.0f} s, {result.commands} commands, gave up {result.gave_up}; away: {away or 'none'}"
        f"{late}{wrong}",
        flush=True,
    )


def _by_run(results: Sequence[Result], quiet: dict[bool, list[float]]) -> list[Row]:
    rows = [
        Row(group="undisturbed", what="with an engine" if engine else "without an engine", measured=median(took_s),
            unit="s", beside=f"{len(took_s)} runs, {min(took_s):.0f} to {max(took_s):.0f} s")
        for engine, took_s in quiet.items()
    ]  # fmt: skip
    for each in results:
        kinds = ", ".join(recovery.kind for recovery in each.recoveries)
        words = "; ".join(map(str, each.findings)) or f"{each.commands} commands"
        rows.append(
            Row(group=each.name, what=kinds or "nothing", measured=each.took_s, unit="s", goal="all invariants",
                kept=not each.findings, beside=words[:160])
        )  # fmt: skip
    return rows


def _by_kind(results: Sequence[Result]) -> list[Row]:
    rows = []
    for kind in KINDS:
        away = [each.away_s for result in results for each in result.recoveries if each.kind == kind and each.felt]
        all_of_it = [each for result in results for each in result.recoveries if each.kind == kind]
        if all_of_it:
            measured = median(away) if away else "not felt"
            most = f"most {max(away):.1f} s, " if away else ""
            rows.append(
                Row(group="recovery", what=kind, measured=measured, unit="s" if away else "",
                    beside=f"{most}{len(away)} of {len(all_of_it)} measured")
            )  # fmt: skip
    return rows


def _totals(results: Sequence[Result], why: str) -> list[Row]:
    runs = len(results)
    rows = []
    for name, what in (
        ("lost", ("lost",)), ("duplicate", ("duplicate", "foreign", "broken")), ("rows of the student", ("rows",)),
        ("orphan", ("orphan",)), ("hang", ("hang",)), ("more time lost than recovery", ("time",)),
        ("untold", ("untold",)),
    ):  # fmt: skip
        count = sum(each.count(*what) for each in results)
        rows.append(Row(group="all", what=name, measured=count, goal="0", kept=count == 0, beside=f"{runs} runs"))
    gave_up = sum(each.gave_up for each in results)
    rows.append(Row(group="all", what="jobs that gave up and went on with the same command", measured=gave_up))
    if why:
        rows.append(Row(group="all", what="hosts", measured="this machine", beside=why))
    return rows


if __name__ == "__main__":
    sys.exit(main())
