"""The ledger's numbers: rows appended per second, and how long a run of 100,000 recorded episodes takes to resume.

python benchmarks/rollout_ledger.py            # some three minutes and 2 GB of disk, under --folder
python benchmarks/rollout_ledger.py --quick    # a tenth of the rows, three repetitions

Trajectories are as agents leave them: three steps of 200 sampled tokens with their ids, log-probabilities and prompt
ids, and every one differs from the others. Appending is all of it: Arrow, Parquet, fsync of file and folder, by one
thread; in batches of 64, the most that a worker writes at once, of 8, and of 512. The disk's own share is measured
beside it: the same bytes written and synced in files of the same size.

Resuming is what a collection does before it runs anything: open the ledger, tidy it for the seconds that the start of a
run may take, find done and given-up keys, compare them with the episodes of the run, of which the last hundredth is
missing; in a process of its own each time, whose imports are not counted. From a ledger as a killed run left it, in
shards of 64 rows, afresh each time; from the same without tidying; and once it is compacted. Files are in the page
cache.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.scoreboard import Row
from envs.base import ObservationKind, Task
from rollout.ledger import Ledger, LedgerWriter
from rollout.trajectory import Completion, Failure, FailureClass, Span, SpanType, Step, Trajectory, Usage

APPEND_GOAL = 2000.0
"""Trajectories per second."""
RESUME_GOAL_S = 5.0
RESUMED = 100_000
STEPS, STEP_TOKENS, SYSTEM_TOKENS, OBSERVATION_TOKENS = 3, 200, 450, 80
VOCABULARY = 151_000
WORKER_BATCH = 64
_WORDS = "Thought Code print search the value of result = ( ) we need to compute answer for question \n".split(" ")
_SYSTEM = "You answer questions by writing Python code that calls the tools you are given, one step at a time. " * 18


def trajectory(number: int) -> Trajectory:
    """One of a kind, and the same for the same number."""
    rng = random.Random(number)
    prompt = tuple(range(1000, 1000 + SYSTEM_TOKENS)) + _ids(rng, 40)
    steps: list[Step] = []
    for i in range(STEPS):
        ids = _ids(rng, STEP_TOKENS)
        text = " ".join(rng.choices(_WORDS, k=STEP_TOKENS))
        bounds = (0, len(text) // 3, len(text) // 3 + 7, len(text) - 4, len(text))
        kinds = (SpanType.THOUGHT, SpanType.FORMAT, SpanType.CODE, SpanType.FORMAT)
        steps.append(
            Step(
                completion=Completion(
                    text=text,
                    token_ids=ids,
                    logprobs=tuple(-rng.expovariate(4.0) for _ in ids),
                    weights_version="step-100",
                    prompt_tokens=len(prompt),
                    completion_tokens=len(ids),
                    prompt_ids=prompt,
                ),
                spans=tuple(
                    Span(type=kind, start=start, end=end)
                    for kind, start, end in zip(kinds, bounds[:-1], bounds[1:], strict=True)
                ),
                action=text[bounds[2] : bounds[3]],
                observation="Observation:\n" + " ".join(rng.choices(_WORDS, k=OBSERVATION_TOKENS)),
                observation_kind=ObservationKind.FINAL if i + 1 == STEPS else ObservationKind.OK,
                tool_calls=1,
                policy_s=rng.random(),
                env_s=rng.random(),
            )
        )
        prompt += ids + _ids(rng, OBSERVATION_TOKENS)
    question = "In which year was " + " ".join(rng.choices(_WORDS, k=20)) + "?"
    return Trajectory(
        key=key(number),
        task=Task(id=f"task-{number}", question=question, answer=str(number), kind="fact", metadata={"level": 2}),
        dialect="code",
        system_prompt=_SYSTEM,
        steps=tuple(steps),
        policy="teacher",
        weights_version="step-100",
        seed=number,
        reward=1.0,
        success=True,
        prediction=str(number),
        usage=Usage(requests=STEPS, prompt_tokens=2000, completion_tokens=STEPS * STEP_TOKENS),
        started_at_s=1.7e9 + number,
        duration_s=9.5,
    )


def key(number: int) -> str:
    """In the form of `trajectory_key`."""
    return f"task-{number}|teacher|0|{number:012x}"


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCABULARY) for _ in range(count))


def appended_per_s(folder: Path, rows: Sequence[Trajectory], batch: int) -> float:
    """Rows a second, of one writer that appends them `batch` at a time."""
    shutil.rmtree(folder, ignore_errors=True)
    writer = LedgerWriter(folder, writer="worker-0")
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    started = time.perf_counter()
    for each in batches:
        writer.append(each)
    return len(rows) / (time.perf_counter() - started)


def synced_per_s(folder: Path, rows: int) -> float:
    """What the disk alone could do: the shards of `appended_per_s`, written and synced again."""
    shards = [path.read_bytes() for path in sorted((folder / "shards").iterdir())]
    target = folder / "again"
    target.mkdir()
    started = time.perf_counter()
    for i, data in enumerate(shards):
        with open(target / str(i), "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return rows / (time.perf_counter() - started)


def fill(folder: Path, rows: int) -> None:
    """A ledger of `rows` results in shards of a worker's size, and a failure for every hundredth of them, as several
    killed workers leave it. The same token ids come again in every shard, with other keys: only keys are read."""
    shutil.rmtree(folder, ignore_errors=True)
    base = [trajectory(number) for number in range(WORKER_BATCH)]
    failure = Failure(failure_class=FailureClass.ENGINE, message="connection reset")
    writers = [LedgerWriter(folder, writer=f"worker-{i}") for i in range(4)]
    for i, start in enumerate(range(0, rows, WORKER_BATCH)):
        batch = [replace(each, key=key(start + j)) for j, each in enumerate(base) if start + j < rows]
        failed = [replace(batch[0], key=key(10 * rows + i), success=False, failure=failure)]
        writers[i % 4].append([*batch, *(failed if i % 2 else ())])


_RESUME = """
import json, sys, time
import pyarrow.parquet
import rollout.ledger_compaction
from benchmarks.rollout_ledger import key
from rollout.ledger import Ledger
from rollout.retries import RetryRule
folder, rows, tidy = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "tidy"
wanted = [key(number) for number in range(rows + rows // 100)]
started, busy = time.perf_counter(), time.process_time()
ledger = Ledger(folder)
if tidy:
    ledger.compact_if_needed()
settled = ledger.settled(RetryRule())
missing = [each for each in wanted if each not in settled]
print(json.dumps([time.perf_counter() - started, time.process_time() - busy, len(missing), len(settled.done)]))
"""


def resumed_s(folder: Path, rows: int, *, tidy: bool = True) -> tuple[float, float]:
    """From opening the ledger to the list of missing episodes, in a fresh process: elapsed and processor time."""
    done = subprocess.run(
        [sys.executable, "-c", _RESUME, str(folder), str(rows), "tidy" if tidy else ""],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    seconds, busy_s, missing, found = json.loads(done.stdout)
    if (missing, found) != (rows // 100, rows):
        raise RuntimeError(f"a resumed run would do {missing} episodes and found {found} of {rows}")
    return seconds, busy_s


def rows(*, folder: Path | None = None, repeats: int = 5, resumed: int = RESUMED) -> list[Row]:
    """Medians of `repeats`; `folder` is where the files go (default: a temporary one), and is emptied again."""
    place = Path(tempfile.mkdtemp(prefix="ledger-", dir=folder))
    try:
        return [*_append_rows(place, repeats), *_resume_rows(place, repeats, resumed)]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _append_rows(place: Path, repeats: int) -> list[Row]:
    found: list[Row] = []
    sample = [trajectory(number) for number in range(2048)]
    for batch in (WORKER_BATCH, 8, 512):
        count = len(sample) if batch > 8 else 512
        rates, disk = [], []
        busy_s = 0.0
        for _ in range(repeats):
            before_s = time.thread_time()
            rates.append(appended_per_s(place / "append", sample[:count], batch))
            busy_s += time.thread_time() - before_s
            disk.append(synced_per_s(place / "append", count))
        busy_ms = busy_s * 1e3 / (repeats * count)
        rate = statistics.median(rates)
        size = sum(path.stat().st_size for path in (place / "append" / "shards").iterdir()) / count
        goal = batch != 8
        found.append(
            Row(
                what=f"ledger append, {batch} a shard",
                measured=rate,
                unit="trajectories/s",
                goal=f">= {APPEND_GOAL:,.0f}" if goal else "",
                kept=rate >= APPEND_GOAL if goal else None,
                beside=f"{min(rates):,.0f} to {max(rates):,.0f}; disk alone {statistics.median(disk):,.0f}/s; each "
                f"{busy_ms:.2f} ms of processor, {size / 1024:.1f} KiB",
            )
        )
    return found


def _resume_rows(place: Path, repeats: int, resumed: int) -> list[Row]:
    folder = place / "resume"
    fill(folder, resumed)
    shards = math.ceil(resumed / WORKER_BATCH)
    untidied = [resumed_s(folder, resumed, tidy=False) for _ in range(repeats)]
    killed = []
    for i in range(repeats):  # tidying removes files: each time from the same ledger, whose files are linked
        again = place / f"again-{i}"
        shutil.copytree(folder, again, copy_function=os.link)
        killed.append(resumed_s(again, resumed))
        shutil.rmtree(again)
    report = Ledger(folder).compact()
    compacted = [resumed_s(folder, resumed) for _ in range(repeats)]
    return [
        _resume_row(f"resume of {resumed:,} rows, left by a killed run", killed, f"{shards:,} shards"),
        _resume_row("the same, nothing tidied", untidied, f"{shards:,} shards"),
        _resume_row("the same, compacted", compacted, f"{report.made} shards"),
        Row(what="compacting all of it", measured=report.seconds, unit="s", beside=f"{report.merged:,} shards"),
    ]


def _resume_row(what: str, times: Sequence[tuple[float, float]], beside: str) -> Row:
    seconds = [elapsed_s for elapsed_s, _ in times]
    middle, busy_s = statistics.median(seconds), statistics.median(busy_s for _, busy_s in times)
    return Row(
        what=what,
        measured=middle,
        unit="s",
        goal=f"< {RESUME_GOAL_S:g}",
        kept=middle < RESUME_GOAL_S,
        beside=f"{beside}; {min(seconds):.2f} to {max(seconds):.2f} s, {busy_s:.2f} s of processor",
    )


def main() -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, three repetitions")
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    options = parser.parse_args()
    sizes = {"repeats": 3, "resumed": RESUMED // 10} if options.quick else {}
    return scoreboard.publish(rows(folder=options.folder, **sizes), options, title="ledger")


if __name__ == "__main__":
    sys.exit(main())
