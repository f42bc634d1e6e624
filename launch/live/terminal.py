"""`Screen`: a `JobStatus` drawn for a terminal, by rich. The same for a job of one's own and for one that is watched.

Every line is fitted to the width; where the height does not suffice, the lines that matter least are left out. From
`WIDE` columns on, rollouts and learning stand side by side. What models, servers and files have said is shown as plain
text, without control characters. It draws, and knows no more than the status.

Example::

    Console(width=100).print(Screen(status, now_unix_s=time.time()))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap

from rich.console import Console, ConsoleOptions, OverflowMethod, RenderResult
from rich.text import Text

from launch.live.drawing import bar, clock, count, duration, loss_of, per_cent, sparkline
from launch.live.status import JobStatus, Stage, printable
from rollout.spend import SpendSnapshot
from rollout.task_feed import CollectProgress

WIDE = 130
LABEL = 10
"""Columns of the names at the left."""
BAR = 60
SILENT_S = 30.0
"""A job that runs writes its status every few seconds; after so long something is wrong with it."""
COLOURS = {"running": "cyan", "done": "green", "failed": "red", "interrupted": "yellow"}
MARKS = {"running": "▶", "done": "✓", "failed": "✗", "waiting": "·"}
ASCII_MARKS = {"running": ">", "done": "+", "failed": "x", "waiting": "."}
ALWAYS, MUCH, SOME, LITTLE = 0, 1, 2, 3
"""How much a line matters."""


@dataclass(frozen=True, slots=True)
class _Line:
    text: Text
    matters: int = MUCH


class Screen:
    """`watched`: the job runs elsewhere, so its last lines are shown too, and whether it is still heard of."""

    def __init__(self, status: JobStatus, *, now_unix_s: float, watched: bool = False) -> None:
        self._status, self._now_s, self._watched = status, now_unix_s, watched

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The last line of a terminal is left to the cursor.
        height = console.size.height - 1 if console.is_terminal else 10_000
        yield from self.lines(options.max_width, height, ascii_only=options.ascii_only)

    def lines(self, width: int, height: int, *, ascii_only: bool = False) -> list[Text]:
        """At most `height` lines of at most `width` columns."""
        draw = _Drawing(self._status, width, ascii_only)
        stage = self._status.current
        left = list(draw.rollouts(stage)) if stage is not None and stage.episodes is not None else []
        right = list(draw.learning()) if stage is not None and stage.learns else []
        side_by_side = width >= WIDE and bool(left) and bool(right)
        if side_by_side:
            draw.width = width // 2 - 2
            left, right = list(draw.rollouts(stage)), list(draw.learning())
            draw.width = width
        top = [_Line(self._title(width, draw.overflow), ALWAYS), *draw.stages()]
        bottom = [*draw.rest(), *self._lines_said(width)]
        if side_by_side:
            left, right = _fitted(left, height - len(top) - 2), _fitted(right, height - len(top) - 2)
            rows = max(len(left), len(right))
            blank = [_Line(Text())]
            pairs = zip(left + blank * (rows - len(left)), right + blank * (rows - len(right)), strict=True)
            middle = [_Line(_beside(a.text, b.text, width // 2), min(a.matters, b.matters)) for a, b in pairs]
        else:
            gap = [_Line(Text(), LITTLE)] if left and right else []
            middle = left + gap + right
        gap = [_Line(Text(), LITTLE)]
        whole = top + (gap if middle else []) + middle + (gap if bottom else []) + bottom
        texts = [line.text for line in _fitted(whole, height)]
        for text in texts:
            text.truncate(width, overflow="crop" if ascii_only else "ellipsis")
            text.no_wrap = True
        return texts

    def _title(self, width: int, overflow: OverflowMethod) -> Text:
        status = self._status
        running = status.state == "running"
        elapsed_s = (self._now_s if running else status.updated_unix_s) - status.started_unix_s
        state = Text(status.state, style=f"bold {COLOURS[status.state]}")
        state.append(f" {clock(elapsed_s)}", style="bold")
        silent_s = self._now_s - max(status.updated_unix_s, status.written_unix_s)
        if self._watched and running and silent_s > SILENT_S:
            state = Text(f"silent for {duration(silent_s)}: is it alive?", style="bold red")
        name = Text.assemble((printable(status.run) or "job", "bold"), "  ", (printable(status.job), ""))
        if status.note:
            name.append(f"  {printable(status.note)}", style="dim")
        name.truncate(max(1, width - state.cell_len - 2), overflow=overflow)
        return Text.assemble(name, " " * max(1, width - name.cell_len - state.cell_len), state)

    def _lines_said(self, width: int) -> Iterator[_Line]:
        status = self._status
        if status.error:
            for i, line in enumerate(wrap(printable(status.error), max(20, width - 2))):
                yield _Line(Text(("  " if i else "! ") + line, style="bold red"), SOME if i else ALWAYS)
        others = [each for each in status.said if not each.warning][-5:] if self._watched else []
        shown = sorted([*status.warnings[-3:], *others], key=lambda each: each.unix_s)
        for each in shown:
            at = clock(each.unix_s - status.started_unix_s)
            text = Text(f"{'!' if each.warning else ' '} [{at}] {printable(each.text, 2 * width)}")
            text.stylize("yellow" if each.warning else "dim")
            yield _Line(text, MUCH if each.warning else LITTLE)


class _Drawing:
    def __init__(self, status: JobStatus, width: int, ascii_only: bool) -> None:
        self.status, self.width, self.ascii = status, width, ascii_only
        self.overflow: OverflowMethod = "crop" if ascii_only else "ellipsis"

    # -- stages

    def stages(self) -> Iterator[_Line]:
        marks = ASCII_MARKS if self.ascii else MARKS
        status = self.status
        for stage in status.stages:
            if stage.state == "waiting":
                continue
            running = stage.state == "running"
            text = Text(f"{marks[stage.state]} ", style=COLOURS[stage.state])
            text.append(printable(stage.title), style="bold" if running else "")
            if not running:
                text.append(f"  {clock(stage.elapsed_s)}", style="dim")
            if stage.scores:
                text.append(f"  {_scores(stage)}")
            elif not running and stage.episodes is not None:
                text.append(f"  {_solved(stage.episodes)}")
            yield _Line(text, ALWAYS if running else SOME)
            if running:
                yield from self._bars(stage)
        waiting = [printable(stage.title) for stage in status.stages if stage.state == "waiting"]
        if waiting:
            yield _Line(Text(f"{marks['waiting']} then {', '.join(_without_common(waiting))}", style="dim"), SOME)

    def _bars(self, stage: Stage) -> Iterator[_Line]:
        seen, learning = stage.episodes, self.status.learning
        if seen is not None:
            done = f"{count(seen.finished)}/{count(seen.total)}"
            yield self._bar("episodes", seen.finished / max(seen.total, 1), done, stage.episodes_left_s)
        if learning is not None and stage.learns:
            left_s = None if learning.done else self.status.learning_left_s
            yield self._bar("training", learning.fraction, f"step {count(learning.step)}", left_s)

    def _bar(self, name: str, share: float, done: str, left_s: float | None) -> _Line:
        tail = f" {done:>13} {100 * share:4.0f}%"
        after = " done" if share >= 1 else f" {duration(left_s)} left" if left_s is not None else ""
        room = self.width - 2 - LABEL - len(tail) - len(" 59.9 days left")
        full, empty = bar(share, max(4, min(BAR, room)), ascii_only=self.ascii)
        return _Line(
            Text.assemble("  ", f"{name:<{LABEL}}", (full, "green"), (empty, "dim"), (tail, "bold"), (after, "dim")),
            ALWAYS,
        )

    # -- rollouts

    def rollouts(self, stage: Stage | None) -> Iterator[_Line]:
        if stage is None or stage.episodes is None:
            return
        seen = stage.episodes
        ok = Text.assemble((f"{count(seen.recorded - seen.failed)} ok", "green"))
        if seen.found:
            ok.append(f"   {count(seen.found)} found of earlier jobs", style="dim")
        if seen.failed:
            classes = ", ".join(
                f"{printable(name)} {count(n)}" for name, n in sorted(seen.failures.items(), key=lambda x: -x[1])
            )
            ok.append(f"   {count(seen.failed)} failed", style="red").append(f": {classes}")
        yield self._line("episodes", ok)
        answered = seen.recorded - seen.failed
        if answered:
            yield self._line("success", Text.assemble((per_cent(seen.succeeded / answered), "bold"), self._kinds(seen)))
        if len(stage.by_policy) > 1:
            parts = [f"{printable(name)} {_solved(each)}" for name, each in stage.by_policy.items()]
            yield self._line("teachers", "   ".join(parts), SOME)
        running = min(seen.running, sum(worker.running for worker in seen.workers.values()))
        limit = sum(worker.limit for worker in seen.workers.values())
        parts = [f"{count(running)} of at most {count(limit)} at a time"]
        if len(seen.workers) > 1:
            parts.append(f"{len(seen.workers)} workers")
        usage = [worker.kv_usage for worker in seen.workers.values() if worker.kv_usage is not None]
        if usage:
            parts.append(f"engine cache {100 * max(usage):.0f}% full")
        if seen.recorded:
            steps, calls = seen.steps / seen.recorded, seen.tool_calls / seen.recorded
            parts.append(f"{steps:.1f} steps, {calls:.1f} tool calls each")
        yield self._line("running", "   ".join(parts), SOME)
        mean = seen.completion_tokens / max(seen.elapsed_s, 1e-9)
        rate = f"{count(stage.completion_tokens_per_s)} now   {count(mean)} on average"
        yield self._line("tokens/s", f"{rate}   {count(seen.completion_tokens)} made", MUCH)
        queue = self.status.queue
        if queue is not None and stage.learns and not (queue.closed and not queue.depth):
            full, empty = bar(queue.depth / queue.capacity, 20, ascii_only=self.ascii)
            text = Text.assemble((full, "cyan"), (empty, "dim"), f" {count(queue.depth)}/{count(queue.capacity)}")
            text.append(f"   {_slower(queue.put_waits, queue.get_waits)}", style="dim")
            yield self._line("queue", text)

    def _kinds(self, seen: CollectProgress) -> str:
        if len(seen.by_kind) < 2:
            return ""
        return "".join(f"   {printable(kind, 40)} {per_cent(k / max(n, 1))}" for kind, (n, k) in seen.by_kind.items())

    # -- learning

    def learning(self) -> Iterator[_Line]:
        at = self.status.learning
        if at is None:
            return
        if not at.step:
            waits = f"{count(at.trajectories)} trajectories have come; waited {duration(at.wait_s)}"
            yield self._line("learner", f"before its first step   {waits}")
            return
        yield self._curve("loss", at.loss, self.status.trails.get("all", ()), at.accuracy, MUCH)
        for span, loss in at.loss_by_span.items():
            trail = self.status.trails.get(span, ())
            yield self._curve(f"  {printable(span, 40)}", loss, trail, at.accuracy_by_span.get(span), SOME)
        if at.validation_loss is not None:
            held = f"{loss_of(at.validation_loss)}"
            if at.validation_accuracy is not None:
                held += f"   {per_cent(at.validation_accuracy)} correct"
            yield self._line("held out", held, SOME)
        speed = [f"{count(at.tokens_per_s)} in steps", f"{count(at.tokens)} trained"]
        if at.mfu is not None:
            speed.append(f"MFU {100 * at.mfu:.1f}%")
        if at.peak_memory_mb:
            speed.append(f"{at.peak_memory_mb / 1024:.1f} GiB")
        yield self._line("tokens/s", "   ".join(speed))
        waited = f"{duration(at.wait_s)} for trajectories ({100 * at.stall_share:.0f}% of learning)"
        yield self._line("waited", waited, SOME)
        yield self._line("epoch", f"{at.epoch + 1}   lr {at.lr:.1e}   gradient {at.grad_norm:.2g}", LITTLE)
        if at.best_step is not None:
            yield self._line("best", f"step {count(at.best_step)}", SOME)
        odd = _odd(at.refused, at.skipped_steps, at.restarts)
        if odd:
            yield self._line("refused", Text(odd, style="yellow"), SOME)

    def _curve(self, name: str, loss: float, trail: Sequence[float], accuracy: float | None, matters: int) -> _Line:
        right = f"   {per_cent(accuracy)} correct" if accuracy is not None else ""
        room = self.width - 2 - LABEL - 10 - len(" 100.0% correct") - 3
        drawn = sparkline(trail, min(40, max(8, room)), ascii_only=self.ascii)
        value = Text(f"{loss_of(loss):<10}")
        if value.plain.startswith("not"):
            value.stylize("bold red")
        return self._line(name, Text.assemble(value, (drawn, "magenta"), right), matters)

    # -- the rest

    def rest(self) -> Iterator[_Line]:
        status = self.status
        if status.spent is not None:
            yield self._line("spent", self._spent(status.spent))
        for wait in status.waits:
            yield self._line("waits", Text(printable(wait), style="yellow"))
        for name, value in status.figures.items():
            yield self._line(name, printable(value))
        stage = status.current
        if stage is not None and stage.episodes is not None and stage.episodes.last_failure:
            yield self._line("failed", Text(printable(stage.episodes.last_failure), style="red"))

    def _spent(self, spent: SpendSnapshot) -> Text:
        cap = spent.cap
        text = Text()
        share = max(spent.spent_usd / cap.usd if cap.usd else 0.0, spent.tokens / cap.tokens if cap.tokens else 0.0)
        if share:
            full, empty = bar(share, 20, ascii_only=self.ascii)
            colour = "red" if share > 0.9 else "yellow" if share > 0.7 else "green"
            text = Text.assemble((full, colour), (empty, "dim"), f" {100 * share:.0f}%   ")
        text.append(str(spent))
        stage = self.status.current
        seen = stage.episodes if stage is not None else None
        if seen is not None and seen.recorded and spent.spent_usd and seen.cost_usd:
            left = (seen.total - seen.finished) * seen.cost_usd / seen.recorded
            text.append(f"   about ${spent.spent_usd + left:.2f} at the end", style="dim")
        return text

    def _line(self, name: str, value: Text | str, matters: int = MUCH) -> _Line:
        value = Text(value) if isinstance(value, str) else value
        text = Text.assemble("  ", (f"{printable(name, 40) if name.strip() == name else name:<{LABEL}}", "bold"), value)
        if self.width > 0:
            text.truncate(self.width, overflow=self.overflow)
        return _Line(text, matters)


def _fitted(lines: Sequence[_Line], height: int) -> list[_Line]:
    kept = list(lines)
    for level in (LITTLE, SOME, MUCH):
        for line in [line for line in reversed(kept) if line.matters == level]:
            if len(kept) <= height:
                return kept
            kept = [each for each in kept if each is not line]
    return kept[: max(1, height)]


def _beside(a: Text, b: Text, at: int) -> Text:
    return Text.assemble(a, " " * max(1, at - a.cell_len), b)


def _solved(seen: CollectProgress) -> str:
    answered = seen.recorded - seen.failed
    return f"{count(seen.succeeded)} of {count(answered)} solved" if answered else f"{count(seen.finished)} found"


def _scores(stage: Stage) -> str:
    scores = stage.scores.values()
    mean = sum(each.mean * each.n for each in scores) / max(1, sum(each.n for each in scores))
    kinds = [f"{printable(kind, 40)} {100 * each.mean:.0f}%" for kind, each in stage.scores.items()]
    return "   ".join([f"{100 * mean:.0f}% solved", *(kinds if len(kinds) > 1 else ())])


def _slower(put_waits: int, get_waits: int) -> str:
    if put_waits > get_waits:
        return "the learner is the slower side"
    return "rollout is the slower side" if get_waits else ""


def _odd(refused: Mapping[str, int], skipped: int, restarts: int) -> str:
    parts = [f"{count(n)} {reason}" for reason, n in sorted(refused.items(), key=lambda item: -item[1])]
    if skipped:
        parts.append(f"{skipped} steps without a finite gradient")
    if restarts:
        parts.append(f"started again {restarts} times")
    return "   ".join(parts)


def _without_common(titles: Sequence[str]) -> list[str]:
    """ "evaluation: a", "evaluation: b" -> "evaluation: a", "b"."""
    shown: list[str] = []
    last = ""
    for title in titles:
        head, mark, tail = title.partition(": ")
        shown.append(tail if mark and head == last else title)
        last = head if mark else ""
    return shown
