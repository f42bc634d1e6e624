"""What must hold when a run has ended, read from what it left behind; each check can fail.

Example::

    findings = check_ledger(Ledger(run / "ledger"), expected) + check_rows(run, passes=2)
    for each in findings:
        print(each)                              # lost: 2 of 200 episodes (k17, k90)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rollout.ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that does not hold."""

    what: Literal["lost", "duplicate", "foreign", "broken", "rows", "orphan", "hang", "time", "untold"]
    count: int
    words: str

    def __str__(self) -> str:
        return f"{self.what}: {self.words}"


def check_ledger(ledger: Ledger, expected: set[str]) -> list[Finding]:
    """Exactly the expected keys with a result, each once, in shards that read well."""
    found: list[Finding] = []
    counts = Counter(trajectory.key for trajectory in ledger.trajectories())
    report = ledger.validate()
    if lost := sorted(expected - counts.keys()):
        found.append(Finding(what="lost", count=len(lost), words=f"{len(lost)} of {len(expected)} {_some(lost)}"))
    if twice := ledger.duplicates():
        found.append(Finding(what="duplicate", count=twice, words=f"{twice} rows of the ledger are there again"))
    if foreign := sorted(counts.keys() - expected):
        found.append(Finding(what="foreign", count=len(foreign), words=f"{len(foreign)} unexpected {_some(foreign)}"))
    if not report.ok:
        found.append(Finding(what="broken", count=1, words=f"the ledger does not validate: {report}"))
    return found


def check_rows(run: Path, *, passes: int) -> list[Finding]:
    """The learner trained on every trainable trajectory of the ledger, once a pass, and on nothing else."""
    trainable = [t.key for t in Ledger(run / "ledger").trajectories() if t.trainable]
    learned = json.loads((run / "learner" / "final.json").read_text())
    found: list[Finding] = []
    refused = sum(learned.get("refused", {}).values())
    kept = len(trainable) - refused
    if learned["rows"] != passes * kept:
        words = f"the student was trained on {learned['rows']} rows, not {passes} x {kept}"
        found.append(Finding(what="rows", count=abs(learned["rows"] - passes * kept), words=words))
    arrived = Counter(_arrivals(run))
    if again := sorted(key for key, count in arrived.items() if count > 1):
        found.append(
            Finding(what="rows", count=len(again), words=f"{len(again)} arrived more than once {_some(again)}")
        )
    if missing := sorted(set(trainable) - arrived.keys()):
        found.append(Finding(what="rows", count=len(missing), words=f"{len(missing)} never arrived {_some(missing)}"))
    return found


def check_orphans(left: Sequence[str]) -> list[Finding]:
    """`left`: command lines of what still runs of a job that has ended."""
    if not left:
        return []
    return [Finding(what="orphan", count=len(left), words=f"{len(left)} left: {', '.join(each[:60] for each in left)}")]


def check_time(*, took_s: float, undisturbed_s: float, allowed_s: float, noise_s: float) -> list[Finding]:
    """`allowed_s`: the work in flight and the recovery of every fault."""
    lost_s = took_s - undisturbed_s
    if lost_s <= allowed_s + noise_s:
        return []
    words = f"{lost_s:.0f} s were lost, {allowed_s:.0f} s are work in flight and recovery, {noise_s:.0f} s noise"
    return [Finding(what="time", count=1, words=words)]


def check_told(run: Path, felt: Iterable[str]) -> list[Finding]:
    """The run's record of events names each of `felt`, and the report shows the record."""
    from launch.events import read_events

    told = Counter(event.what for event in read_events(run) if not event.returned)
    page = (run / "report.html").read_text() if (run / "report.html").exists() else ""
    found = [
        Finding(what="untold", count=1, words=f"a {what} was felt {count} times and told {told[what]} times")
        for what, count in Counter(felt).items()
        if told[what] < count
    ]
    if told and "What went wrong on the way" not in page:
        found.append(Finding(what="untold", count=1, words="the report does not show what happened"))
    return found


def _arrivals(run: Path) -> list[str]:
    return [
        json.loads(line) for path in sorted((run / "learner").glob("**/arrivals*.jsonl"))
        for line in path.read_text().splitlines()
    ]  # fmt: skip


def _some(keys: Sequence[str]) -> str:
    more = ", ..." if len(keys) > 3 else ""
    return f"({', '.join(keys[:3])}{more})"
