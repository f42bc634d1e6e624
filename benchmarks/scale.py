"""Scale by simulation: thousands of episodes at once over many workers in one Ray; engines and envs only wait.

python benchmarks/scale.py --check                                   # all sizes, some ten minutes on a quiet machine
python benchmarks/scale.py --workers 1,5 --slots 50 --json out.json  # a quick look

Real: Ray's actors (a process for each worker), `Collection` and the driver's loop, the feed, the episode loop, ledger
shards on disk, the trajectory queue, and an actor that reads it as the learner does. Simulated: the policy's answers
and the envs' steps, which come after delays that were measured (`scale_delays.json`) or, for a 32B teacher, are assumed
from them. What is measured is therefore the orchestration alone: its processor time by process, and whether a
collection with n times the workers collects n times as much. All processes share this machine's cores: where these are
busy (`SATURATED`), more workers cannot help, and no goal holds any more.

Rates and processor times are those of the steady window (see `scale_figures`), whole runs are printed beside. Sizes are
compared by their share of what the delays of their very episodes allow, so that no luck of the draw is in it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.scale_delays import MEASURED_FILE, TEACHER_FACTOR, load, teacher
from benchmarks.scale_limits import limits, storage
from benchmarks.scale_picture import Point, Series, draw
from benchmarks.scale_processes import CONSUMER, DRIVER, FEED, GCS, QUEUE, RAYLET, WORKERS, Sample, sampled
from benchmarks.scale_run import QUEUE_CAPACITY, Figures, Run, WorkerPool, simulate
from benchmarks.scale_world import AllDelays
from benchmarks.scoreboard import Row

STUDENT_NAME, TEACHER_NAME = "student", "teacher"
SIZES = (1, 2, 5, 10, 25, 50)
STUDENT_SIZES = (1, 5, 10)
"""Steps of a second keep two cores busy with some of the workers; more would only wait for them."""
ROUNDS = {STUDENT_NAME: 4.0, TEACHER_NAME: 1.75}
"""Episodes of each place, one after another: enough to be measured between ramp-up and drain."""
LEAST_ROUNDS = 1.5
SLOTS = 210
"""Some more than 200, since at any moment a few places are between two episodes."""
AT_ONCE = 10_000
LINEAR = 0.95
SATURATED = 0.9
"""Share of the machine's cores, whoever keeps them busy, from which on they are the limit."""
MEMORY_GB = 10.0
TITLES = {
    STUDENT_NAME: "the student on vLLM, as measured", TEACHER_NAME: "a 32B teacher on GPUs, assumed",
}  # fmt: skip
TENFOLD = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One collection and what it was."""

    run: Run
    figures: Figures
    cores: int

    @property
    def machine(self) -> float:
        """Share of the machine's cores that was busy in the steady window."""
        return self.figures.cores("machine") / self.cores

    @property
    def ours(self) -> float:
        return self.figures.ours / self.cores

    @property
    def saturated(self) -> bool:
        return self.machine >= SATURATED


def measure(options: Any, delays: AllDelays) -> tuple[list[Result], list[tuple[int, float]]]:
    """All sizes, the smallest first, and how long it took to start the workers: (how many, seconds)."""
    from launch.cluster import ray_cluster
    from launch.config import ClusterConfig

    cores = os.cpu_count() or 1
    runs: list[Run] = []
    config = ClusterConfig(num_cpus=cores, object_store_mb=options.object_store_mb)
    with ray_cluster(config), sampled(every_s=options.sample_s) as samples:
        pool = WorkerPool(delays)
        try:
            rounds = {STUDENT_NAME: options.student_rounds, TEACHER_NAME: options.rounds}
            sizes = {STUDENT_NAME: options.student_workers, TEACHER_NAME: options.workers}
            for workers, name in sorted((size, kind) for kind in options.delays for size in sizes[kind]):
                runs.append(simulate(pool, name, workers=workers, slots=options.slots, episodes_per_slot=rounds[name]))
                print(_line(runs[-1]), flush=True)
        finally:
            pool.close()
    return [_result(run, samples, cores) for run in runs], pool.start_s


def _line(run: Run) -> str:
    wall_s = max(end for _, end in run.times) - min(run.times)[0]
    return f"{run.name}: {run.workers} workers, {run.episodes:,} episodes in {wall_s:.0f} s, none lost, none twice"


def _result(run: Run, samples: Sequence[Sample], cores: int) -> Result:
    return Result(run=run, figures=run.figures(samples), cores=cores)


def rows(results: Sequence[Result], started: Sequence[tuple[int, float]]) -> Iterator[Row]:
    """The table, of results of which the smallest size of each kind comes first."""
    for name in dict.fromkeys(result.run.name for result in results):
        same = [result for result in results if result.run.name == name]
        yield from _throughput(same)
        yield from _costs(same[-1])
    largest = max(results, key=lambda result: result.run.at_once)
    judged = largest.run.at_once >= AT_ONCE
    yield Row(
        what="episodes under way at one moment, at most", measured=largest.figures.peak,
        goal=f">= {AT_ONCE}" if judged else "", kept=largest.figures.peak >= AT_ONCE if judged else None, group="all",
        beside=f"{largest.run.workers} workers with {largest.run.slots} places each",
    )  # fmt: skip
    memory = max((result.figures.memory_mb for result in results), key=lambda by_role: by_role.get("all", 0.0))
    yield Row(
        what="memory of all processes (PSS)", measured=memory.get("all", 0.0) / 1024, unit="GB", group="all",
        goal=f"<= {MEMORY_GB:g}", kept=memory.get("all", 0.0) / 1024 <= MEMORY_GB,
        beside=f"{memory.get(WORKERS, 0.0) / largest.run.workers:.0f} MB a worker",
    )  # fmt: skip
    count, seconds = sum(n for n, _ in started), sum(s for _, s in started)
    yield Row(
        what=f"time to start {count} workers", measured=seconds, unit="s", group="all",
        beside=f"{seconds / count:.2f} s each, on cores that they share",
    )  # fmt: skip
    yield from _breaking(largest)


def _throughput(results: Sequence[Result]) -> Iterator[Row]:
    one = results[0]
    for result in results:
        run, figures = result.run, result.figures
        by_worker = figures.steady.rate / run.workers / (one.figures.steady.rate / one.run.workers)
        linear = figures.share / one.figures.share
        busy = f"cores busy: {result.machine:.0%}, of it ours {result.ours:.0%}"
        judged = result is not one and not result.saturated
        yield Row(
            what=f"{run.workers} workers: episodes a second", measured=figures.steady.rate, group=run.name,
            beside=f"{figures.limit:.1f} if only delays took time; {figures.whole.rate:.1f} whole run; {busy}",
        )  # fmt: skip
        yield Row(
            what=f"{run.workers} workers: linear, beside {one.run.workers}", measured=linear, group=run.name,
            goal=f">= {LINEAR:g}" if judged else "", kept=linear >= LINEAR if judged else None,
            beside=f"{by_worker:.3f} as a plain ratio; {figures.share:.1%} of what the delays allow"
            + ("; the machine's cores are saturated" if result.saturated else ""),
        )  # fmt: skip


def _costs(result: Result) -> Iterator[Row]:
    """Of the largest size."""
    run, figures = result.run, result.figures
    for role in (DRIVER, FEED, QUEUE, CONSUMER, WORKERS, GCS, RAYLET):
        yield Row(
            what=f"{run.workers} workers: CPU of an episode, {role}", measured=figures.ms_per_episode(role), unit="ms",
            beside=f"{figures.cores(role):.3f} of a core", group=run.name,
        )  # fmt: skip
    yield Row(
        what=f"{run.workers} workers: from {run.episodes:,} tasks to a collection", measured=run.prepare_s, unit="s",
        beside="which are missing; the feed, and a call to each worker", group=run.name,
    )  # fmt: skip
    yield Row(
        what=f"{run.workers} workers: trajectories in the queue", measured=figures.depth, group=run.name,
        beside=f"at most {figures.depth_most} of {QUEUE_CAPACITY}; {run.put_waits} puts waited",
    )  # fmt: skip
    yield Row(
        what=f"{run.workers} workers: the feed's answer to the driver", measured=figures.feed_ms, unit="ms",
        beside=f"at most {figures.feed_most_ms:.0f} ms", group=run.name,
    )  # fmt: skip
    yield Row(
        what=f"{run.workers} workers: an episode's end until the learner has it", measured=run.consumed.lag_s,
        unit="s", beside=f"{run.episodes / run.shards:.1f} episodes a shard", group=run.name,
    )  # fmt: skip


def _breaking(result: Result) -> Iterator[Row]:
    """Which process would be first to fill a core, and what to do then, and what storage would see, at `TENFOLD`."""
    group = f"{TENFOLD:g} x {result.run.at_once:,} at once"
    for number, limit in enumerate(limits(result.run, result.figures)):
        remedy = "" if number and limit.cores * TENFOLD < 1 else f"; then {limit.remedy}"
        yield Row(
            what=f"cores of the {limit.role}", measured=limit.cores * TENFOLD, group=group,
            beside=f"a whole core at {limit.breaks_at:,.0f} episodes at once, {limit.breaks_rate:,.0f}/s"
            + remedy,
        )  # fmt: skip
    then = storage(result.run, result.figures, times=TENFOLD, queue_capacity=QUEUE_CAPACITY)
    yield Row(
        what="ledger: shards a second", measured=then.shards_per_s, group=group,
        beside=f"{then.megabytes_per_s:.1f} MB/s; a resumed run reads their keys in {then.keys_s:.1f} s",
    )  # fmt: skip
    yield Row(
        what="object store: a full queue", measured=then.queue_mb, unit="MB", group=group, beside="it does not grow",
    )  # fmt: skip


def picture(results: Sequence[Result], path: Path) -> None:
    series = [
        Series(
            title=TITLES[name],
            points=tuple(
                Point(
                    workers=result.run.workers, rate=result.figures.steady.rate, limit=result.figures.limit,
                    ours=result.ours, machine=result.machine,
                )
                for result in results
                if result.run.name == name
            ),
        )
        for name in dict.fromkeys(result.run.name for result in results)
    ]  # fmt: skip
    run = results[0].run
    draw(series, path, title=f"{run.slots} episodes at once in each worker, all on {results[0].cores} cores")


def _sizes(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no sizes; give numbers of workers, such as 1,2,5") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--workers", type=_sizes, default=list(SIZES), help="teacher: sizes, as 1,2,5,10,25,50")
    parser.add_argument("--student-workers", type=_sizes, default=list(STUDENT_SIZES), help="student: the same")
    parser.add_argument("--slots", type=int, default=SLOTS, help="episodes at once in each worker")
    parser.add_argument("--delays", default=f"{STUDENT_NAME},{TEACHER_NAME}", help="of which policies; both by default")
    parser.add_argument("--delays-file", type=Path, default=MEASURED_FILE, help="what benchmarks/scale_delays.py wrote")
    parser.add_argument("--factor", type=float, default=TEACHER_FACTOR, help="the teacher's delays, of the student's")
    parser.add_argument(
        "--rounds", type=float, default=ROUNDS[TEACHER_NAME], help="teacher: episodes of each place, in turn"
    )
    parser.add_argument("--student-rounds", type=float, default=ROUNDS[STUDENT_NAME], help="student: the same")
    parser.add_argument("--sample-s", type=float, default=1.0, help="between two looks at the processes")
    parser.add_argument("--object-store-mb", type=int, default=500)
    parser.add_argument("--picture", type=Path, help="draw throughput over workers into this file")
    options = parser.parse_args(arguments)
    options.delays = options.delays.split(",")
    if unknown := set(options.delays) - set(TITLES):
        parser.error(f"--delays {unknown.pop()!r} is unknown; there are {', '.join(TITLES)}")
    if min(options.workers[0], options.student_workers[0], options.slots) < 1:
        parser.error("--workers, --student-workers and --slots must be at least 1")
    if min(options.rounds, options.student_rounds) < LEAST_ROUNDS:
        parser.error(f"--rounds and --student-rounds must be at least {LEAST_ROUNDS:g}: less is all ramp-up and drain")
    for path in (options.picture, options.json):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path} cannot be written: there is no folder {path.absolute().parent}")
    try:
        measured = load(options.delays_file)
        delays = {STUDENT_NAME: measured, TEACHER_NAME: teacher(measured, options.factor)}
    except ValueError as error:
        parser.error(str(error))
    for name in options.delays:
        each = delays[name]
        median_s, late_s = each.quantiles("policy_s", (0.5, 0.95))
        print(
            f"{name}: {each.source}: {median_s:.1f} s a step (median; 95 %: {late_s:.1f} s), {each.episode_s:.1f} s "
            f"and {each.steps_per_episode:.1f} steps an episode", flush=True,
        )  # fmt: skip
    results, started = measure(options, delays)
    if options.picture:
        picture(results, options.picture)
    title = f"{options.slots} simulated episodes at once in each worker, one Ray on {os.cpu_count()} cores"
    return scoreboard.publish(list(rows(results, started)), options, title=title)


if __name__ == "__main__":
    sys.exit(main())
