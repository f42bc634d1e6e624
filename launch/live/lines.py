"""A `JobStatus` as one plain line, for where there is no terminal.

Example::

    plain_line(status)      # "episodes 565/5500; success 565/565; queue 205/256; step 8; trained 1%; loss 3.668; ..."
"""

from __future__ import annotations

from launch.live.drawing import count, duration
from launch.live.status import JobStatus, Stage, printable
from learner.tracking import figures


def plain_line(status: JobStatus) -> str:
    """The figures of the stage that runs; "" where nothing is known of it yet."""
    return "; ".join(f"{name} {value}" for name, value in _figures(status).items())


def _figures(status: JobStatus) -> dict[str, str]:
    stage, learning = status.current, status.learning
    shown: dict[str, str] = {}
    left_s: list[float | None] = []
    if stage is not None:
        shown |= _episodes(stage)
        left_s.append(stage.episodes_left_s)
        if stage.learns and learning is not None:
            if status.queue is not None:
                shown["queue"] = f"{status.queue.depth}/{status.queue.capacity}"
            shown |= figures(learning)
            left_s.append(status.learning_left_s)
    if status.spent is not None:
        shown["spent"] = str(status.spent)
    if stage is not None and (notes := stage.notes):
        shown["waits"] = "; ".join(printable(note, 100) for note in notes)
    shown |= {printable(name): printable(value) for name, value in status.figures.items()}
    if known := [each for each in left_s if each]:
        shown["left"] = duration(max(known))
    return shown


def _episodes(stage: Stage) -> dict[str, str]:
    seen = stage.episodes
    if seen is None:
        return {}
    found = f" ({count(seen.found)} found)" if seen.found else ""
    shown = {
        "episodes": f"{count(seen.finished)}/{count(seen.total)}{found}",
        "success": f"{count(seen.succeeded)}/{count(seen.recorded - seen.failed)}",
    }
    if not stage.learns:  # the learner's are worth more there
        shown["tokens/s"] = count(seen.completion_tokens / max(seen.elapsed_s, 1e-9))
    if seen.failures:
        shown["failed"] = ", ".join(f"{name} {count(n)}" for name, n in sorted(seen.failures.items()))
        shown["the last"] = printable(seen.last_failure, 100)
    return shown
