"""Runs the jobs of a ladder, some at a time, each in a process of its own: a run of `launch/distill.py` like any other.

A run that is complete costs a second; one that was stopped goes on. One that fails takes down with it only those that
reuse its trajectories.

Example::

    with LadderRuns(ladder, overrides) as runs:
        while not runs.done():
            runs.advance()
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from launch.cluster import ROOT
from launch.rungs.config import LadderConfig, LadderRun

PROGRAM = ROOT / "launch" / "distill.py"
END_S = 90.0
"""What a run has to end politely."""
TAIL_LINES = 3


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True)
class _Job:
    run: LadderRun
    seed: int
    log: Path
    state: State = State.WAITING
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return f"{self.run.name}, seed {self.seed}"


class LadderRuns:
    """`program`: what is given a run's overrides. Leaving the block ends what still runs, politely first."""

    def __init__(self, ladder: LadderConfig, overrides: Sequence[str], *, program: Path = PROGRAM) -> None:
        self._ladder, self._overrides, self._program = ladder, overrides, program
        # Seed by seed: the first complete table is there after a third of the time.
        self._jobs = [
            _Job(run, seed, ladder.folder(run.name, seed).parent / f"{run.name}.log")
            for seed in ladder.seeds
            for run in ladder.runs
        ]

    def __enter__(self) -> LadderRuns:
        return self

    def __exit__(self, *_: object) -> None:
        running = [job.process for job in self._jobs if job.process is not None and job.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def advance(self) -> None:
        """Take note of what has ended; start what can be started."""
        for job in self._jobs:
            if job.state is State.RUNNING and job.process is not None and job.process.poll() is not None:
                job.state = State.DONE if job.process.returncode == 0 else State.FAILED
        for job in self._jobs:
            if job.state is State.WAITING and job.run.reuse:
                if self._state(job.run.reuse, job.seed) is State.FAILED:
                    job.state = State.FAILED
        for job in self._jobs:
            if sum(other.state is State.RUNNING for other in self._jobs) >= self._ladder.parallel:
                return
            reused = State.DONE if not job.run.reuse else self._state(job.run.reuse, job.seed)
            if job.state is State.WAITING and reused is State.DONE:
                self._start(job)

    def done(self) -> bool:
        return all(job.state in (State.DONE, State.FAILED) for job in self._jobs)

    def failed(self) -> dict[str, str]:
        """Run -> the last lines that it wrote."""
        return {job.name: _tail(job.log) for job in self._jobs if job.state is State.FAILED}

    def figures(self) -> dict[str, str]:
        """For people: how many are done, and the last line of each that runs."""
        count = {state: sum(job.state is state for job in self._jobs) for state in State}
        shown = {"runs": f"{count[State.DONE]}/{len(self._jobs)}"}
        if count[State.FAILED]:
            shown["failed"] = str(count[State.FAILED])
        return shown | {job.name: _tail(job.log, 1) for job in self._jobs if job.state is State.RUNNING}

    def _state(self, run: str, seed: int) -> State:
        return next(job.state for job in self._jobs if (job.run.name, job.seed) == (run, seed))

    def _start(self, job: _Job) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        overrides = self._ladder.command(job.run, seed=job.seed, overrides=self._overrides)
        with open(job.log, "ab") as log:
            job.process = subprocess.Popen(
                [sys.executable, str(self._program), *overrides],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                # Ctrl-C reaches this process alone, which passes it on.
                start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        job.state = State.RUNNING


def _tail(log: Path, lines: int = TAIL_LINES) -> str:
    if not log.exists():
        return "not started: what it reuses failed"
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        text = file.read().decode(errors="replace").strip().splitlines()
    return "\n".join(line.strip() for line in text[-lines:])
