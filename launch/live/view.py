"""What a person sees while a job runs, and what machines are told of it.

`LiveView` gathers a job's `JobStatus` from what its parts tell, and shows it: as a screen on a terminal, as plain
lines elsewhere. `StatusSink`s are handed the same status: the file that `python -m launch.watch` reads
(`launch.live.status_file`), metrics through Ray (`launch.live.ray_metrics`), TensorBoard
(`launch.live.tensorboard_sink`).

Example::

    with LiveView(job="collect", run="mine", sinks=[StatusFile("runs/mine")]) as view:
        with view.stage("collecting"):
            view.update(episodes=collection.progress())     # as often as one likes
        view.say("done")
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from rich.console import Console
from rich.live import Live

from launch.evaluation.intervals import Score
from launch.live.lines import plain_line
from launch.live.paces import Pace, Trail
from launch.live.status import JobStatus, Said, Stage, printable
from launch.live.terminal import Screen
from learner.base import Progress
from rollout.spend import SpendSnapshot
from rollout.task_feed import CollectProgress
from rollout.trajectory_queue import QueueStats

PLAIN_EVERY_S = 10.0
PLAIN_WIDTH = 100
"""Columns where there is no terminal to ask."""
DRAW_EVERY_S = 0.5
SAID = 8
"""So many of the last lines are kept, and so many of the last warnings."""
ALL = "all"
"""The whole loss, among those of the spans."""


class StatusSink(Protocol):
    """Is handed each status; keeps to a pace of its own. It must not raise, and not take long."""

    def take(self, status: JobStatus) -> None: ...

    def close(self) -> None:
        """After the last status."""
        ...


class LiveView:
    """Shows a job. Used by one thread; as a context manager, it tells at the end how the job ended.

    `job`: what it does; `run`: its name; `folder`: where it is; `note`: what a person calls it; `stages`: titles of
    what will come, in order; `began_unix_s`: when the first job on the same folder began.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        job: str = "",
        run: str = "",
        folder: str = "",
        note: str = "",
        stages: Sequence[str] = (),
        began_unix_s: float | None = None,
        sinks: Sequence[StatusSink] = (),
    ) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, PLAIN_WIDTH)
        self._sinks = list(sinks)
        self._live: Live | None = None
        self._printed_at_s = 0.0
        self._drawn_at_s = 0.0
        self._started_s = time.monotonic()
        now_s = time.time()
        self.status = JobStatus(
            job=job, run=run, folder=folder, note=note, host=socket.gethostname(), pid=os.getpid(),
            began_unix_s=began_unix_s or now_s, started_unix_s=now_s, updated_unix_s=now_s,
            stages=tuple(Stage(title=title) for title in dict.fromkeys(stages)),
        )  # fmt: skip
        self._episodes, self._tokens, self._training = Pace(), Pace(), Pace()
        self._trails: dict[str, Trail] = {}
        self._step = -1
        self._stage_began_s = self._started_s

    def __enter__(self) -> LiveView:
        if self.status.job:  # else there is nothing to show yet
            self._open()
        self._tell()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._change(state="interrupted")
        elif error is not None:
            self._change(state="failed", error=printable(str(error) or type(error).__name__))
        elif self.status.state == "running":
            self._change(state="done")
        self._tell()
        self._shut()
        for sink in self._sinks:
            sink.close()

    def conclude(self, stopped: str = "") -> None:
        """Nothing is left to do but to tell what came of it: that goes below the last picture. `stopped`: why not all
        was done."""
        self._change(state="failed" if stopped else "done", error=printable(stopped))
        self._tell()
        self._shut()

    def connected(self, metrics_url: str) -> None:
        """Where Ray exports metrics; "" where it exports none."""
        self._change(metrics_url=metrics_url)
        self._tell()

    def plan(self, *titles: str) -> None:
        """Stages that will come after those that are known, in this order."""
        known = {stage.title for stage in self.status.stages}
        new = tuple(Stage(title=title) for title in dict.fromkeys(titles) if title not in known)
        self._change(stages=(*self.status.stages, *new))

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """One part of the job; its last figures stay on the screen."""
        self._printed_at_s = 0.0
        self._episodes, self._tokens, self._training = Pace(), Pace(), Pace()
        self._stage_began_s = time.monotonic()
        opened = self._open()
        self.plan(title)
        self._change_stage(title, state="running")
        self.say(title)
        try:
            yield
        except BaseException:
            self._end_stage(title, failed=True)
            raise
        else:
            self._end_stage(title)
        finally:
            if opened:
                self._shut()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._said(line, warning=False)

    def warn(self, line: str) -> None:
        """A line that stays, and stays in sight."""
        self._said(line, warning=True)

    def show(self, figures: Mapping[str, str], *, last: bool = False) -> None:
        """Named figures of a job that has no others; `last` prints them even if a line was just printed."""
        self._change(figures=dict(figures))
        self._showed(last)

    def update(
        self,
        *,
        episodes: CollectProgress | None = None,
        by_policy: Mapping[str, CollectProgress] | None = None,
        queue: QueueStats | None = None,
        learning: Progress | None = None,
        spent: SpendSnapshot | None = None,
        last: bool = False,
    ) -> None:
        """What the parts of the stage that runs tell now; None leaves what was told before. `by_policy`: the same
        episodes, of each teacher."""
        now_s = time.monotonic()
        running = self.status.current
        changes: dict[str, object] = {"elapsed_s": now_s - self._stage_began_s}
        if episodes is not None:
            self._episodes.add(episodes.finished, at_s=now_s)
            self._tokens.add(episodes.completion_tokens, at_s=now_s)
            mean = episodes.completion_tokens / max(episodes.elapsed_s, 1e-9)
            changes |= {
                "episodes": episodes,
                "by_policy": dict(by_policy or {}),
                "episodes_left_s": self._episodes.left_s(episodes.total),
                "completion_tokens_per_s": mean if self._tokens.per_s is None else self._tokens.per_s,
            }
        if learning is not None:
            changes["learns"] = True
            self._learned(learning, now_s)
        if queue is not None:
            self._change(queue=queue)
        if spent is not None:
            self._change(spent=spent)
        if running is not None and running.state == "running":
            self._change_stage(running.title, **changes)
        self._showed(last)

    def scored(self, title: str, scores: Mapping[str, Score]) -> None:
        """The scores by kind that the evaluation of that title came to."""
        self.plan(title)
        self._change_stage(title, state="done", scores=dict(scores))
        self._tell()

    def recall(self, losses: Sequence[Mapping[str, float]]) -> None:
        """Losses by span ("all" is the whole one) of each step that an earlier job has trained, oldest first."""
        for each in losses:
            self._trail(each)
        self._change(trails={span: trail.points for span, trail in self._trails.items()})

    # -- what the status is made of

    def _learned(self, learning: Progress, now_s: float) -> None:
        self._training.add(learning.fraction, at_s=now_s)
        if learning.step != self._step:
            self._step = learning.step
            if learning.step:
                self._trail({ALL: learning.loss, **learning.loss_by_span})
        self._change(
            learning=learning,
            learning_left_s=self._training.left_s(1.0),
            trails={span: trail.points for span, trail in self._trails.items()},
        )

    def _trail(self, losses: Mapping[str, float]) -> None:
        for span, loss in losses.items():
            self._trails.setdefault(span, Trail()).add(loss)

    def _change(self, **changes: object) -> None:
        self.status = replace(self.status, updated_unix_s=time.time(), **changes)  # type: ignore[arg-type]

    def _change_stage(self, title: str, **changes: object) -> None:
        self._change(
            stages=tuple(
                replace(stage, **changes) if stage.title == title else stage  # type: ignore[arg-type]
                for stage in self.status.stages
            )
        )

    def _end_stage(self, title: str, *, failed: bool = False) -> None:
        elapsed_s = time.monotonic() - self._stage_began_s
        self._change_stage(title, state="failed" if failed else "done", elapsed_s=elapsed_s, episodes_left_s=None)
        self._change(figures={}, learning_left_s=None)
        self._tell()

    def _said(self, line: str, *, warning: bool) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._started_s), 60)
        self.console.print(f"[{minutes:02d}:{seconds:02d}] {line}", markup=False)
        new = Said(unix_s=time.time(), text=printable(line), warning=warning)
        kept = [each for each in self.status.said if each.warning == warning][-(SAID - 1) :]
        others = [each for each in self.status.said if each.warning != warning]
        self._change(said=tuple(sorted([*others, *kept, new], key=lambda each: each.unix_s)))
        self._tell()

    # -- who sees it

    def _showed(self, last: bool) -> None:
        now_s = time.monotonic()
        if self._live is not None:
            if last or now_s - self._drawn_at_s >= DRAW_EVERY_S:
                self._drawn_at_s = now_s
                self._live.refresh()
        elif last or now_s - self._printed_at_s >= PLAIN_EVERY_S:
            self._printed_at_s = now_s
            minutes, seconds = divmod(int(now_s - self._started_s), 60)
            self.console.print(f"[{minutes:02d}:{seconds:02d}]   {plain_line(self.status)}", markup=False)
        self._tell()

    def _tell(self) -> None:
        for sink in self._sinks:
            sink.take(self.status)

    def _screen(self) -> Screen:
        return Screen(self.status, now_unix_s=time.time())

    def _open(self) -> bool:
        """Whether the screen was not there before."""
        if self._live is not None or not self.console.is_terminal:
            return False
        # It is drawn when something is told, and once a second for the clock. From another thread: a status is never
        # changed, only replaced.
        self._live = Live(console=self.console, get_renderable=self._screen, refresh_per_second=1)
        self._live.start()
        return True

    def _shut(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
