"""All figures of a report, gathered from the files of a run: `gather`. What is shown of them is `launch.report.page`.

Nothing is trusted to be complete: a job that failed leaves what it has. A ledger that cannot be read is a line in
`troubles`, not the end.

Example::

    figures = gather(find("runs/starter-seed0"))
    figures.scores["student"]["arithmetic"].mean
    json.dumps(figures.to_json())
"""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.environment import describe_environment
from launch.evaluation.intervals import Score
from launch.report.ledger_figures import NAME_CHARS, LedgerFigures, Tally, read_figures, steps_by_task
from launch.report.run_files import Kind, Role, RunFiles
from launch.report.samples import failed_samples, read_samples
from launch.report.settings import text_without_secrets
from launch.report.span_composition import Composition, compose, tokenizer_folder
from launch.report.training_figures import TrainingFigures, read_training
from rollout.ledger import Ledger, LedgerError
from rollout.trajectory import Trajectory

SHOWN_KINDS = 8
"""Of a ledger: so many kinds of tasks have samples."""
_SHOWN_EACH = {True: 2, False: 3}
"""Samples of each policy and kind, by success: there is more to learn from what failed."""
_MOST_SHOWN = 120
_CURATED_AGAIN = 20_000
"""Trajectories: a curation that nobody recorded is done again for so many at most, since it reads them whole."""


@dataclass(slots=True)
class Spent:
    """What the spend log says of one model, over all jobs."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    unpriced: bool = False
    """Some of it has no price."""
    lost_usd: float = 0.0
    """Of `usd`: of calls that were never answered."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory to show."""

    ledger: str
    trajectory: Trajectory


@dataclass(slots=True)
class Figures:
    """Everything a page shows."""

    files: RunFiles
    made_at_s: float
    """Unix time."""
    ledgers: dict[str, LedgerFigures] = field(default_factory=dict)
    """By the name of its files; those of `Role.WATCH` are in `watched`."""
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    """row -> kind -> success on the tasks that it was scored on."""
    scored: str = ""
    """Where they are from: "results" of a job that ended, or "ledgers", as far as they go."""
    watched: list[tuple[int, Score]] = field(default_factory=list)
    """(learner's step, success of its student at that step)."""
    training: TrainingFigures = field(default_factory=TrainingFigures)
    curation: Mapping[str, Any] | None = None
    """`rollout.curation.CurationReport.to_json`."""
    composition: Composition | None = None
    spent: dict[str, Spent] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    environment: Mapping[str, Any] = field(default_factory=dict)
    environment_recorded: bool = False
    """It is what the job ran on; else what the report was made on."""
    parameters: int | None = None
    """Of the student."""
    learned_between_s: tuple[float, float] | None = None
    """Unix times of the first and last optimizer step, where they are known."""
    troubles: list[str] = field(default_factory=list)
    """What could not be read, in words."""

    def of(self, *roles: Role) -> dict[str, LedgerFigures]:
        return {each.name: self.ledgers[each.name] for each in self.files.of(*roles) if each.name in self.ledgers}

    @property
    def collected(self) -> LedgerFigures | None:
        """The ledger that was collected to train on."""
        return self.ledgers.get("training")

    @property
    def cost_usd(self) -> float:
        """Of all that is recorded, failed attempts included; by the spend log where that knows more."""
        recorded = sum(each.total.cost_usd + each.failed_cost_usd for each in self.ledgers.values())
        return max(recorded, sum(each.usd for each in self.spent.values()))

    def to_json(self) -> dict[str, Any]:
        """What the page shows, without trajectories."""
        files = self.files
        return {
            "kind": files.kind.value,
            "name": files.name,
            "made_at_s": self.made_at_s,
            "state": None if files.status is None else files.status.get("state"),
            "scores": {row: {kind: asdict(each) for kind, each in kinds.items()} for row, kinds in self.scores.items()},
            "scored_by": self.scored,
            "watched": [{"step": step, **asdict(each)} for step, each in self.watched],
            "ledgers": {name: each.to_json() for name, each in self.ledgers.items()},
            "training": self.training.to_json() if self.training.found else None,
            "curation": self.curation,
            "composition": None if self.composition is None else self.composition.to_json(),
            "spent": {model: asdict(each) for model, each in self.spent.items()},
            "cost_usd": self.cost_usd,
            "parameters": self.parameters,
            "environment": dict(self.environment),
            "troubles": self.troubles,
        }


def gather(files: RunFiles) -> Figures:
    """Reads all there is; what cannot be read is told in `troubles`."""
    figures = Figures(files=files, made_at_s=time.time())
    ledgers = _open(files, figures)
    reference = _reference(files, ledgers, figures)
    for each in files.of(Role.TRAINING, Role.EVALUATION):
        if each.name not in ledgers:
            continue
        try:
            figures.ledgers[each.name] = read_figures(
                ledgers[each.name], reference=reference if each.role is Role.EVALUATION else None
            )
        except (LedgerError, OSError) as error:
            _trouble(figures, error)
    figures.watched = _watched(files, ledgers, figures)
    figures.scores, figures.scored = _scores(files, figures)
    figures.training = read_training(files.lines("metrics.jsonl"))
    figures.curation = _curation(files, ledgers, figures)
    figures.spent = _spent(files)
    _add_samples(files, ledgers, figures)
    recorded = (files.results or {}).get("environment")
    figures.environment_recorded = isinstance(recorded, Mapping)
    figures.environment = recorded if isinstance(recorded, Mapping) else describe_environment()
    if files.folder is not None:
        figures.parameters = _parameters(files.folder / "learner" / "student")
        figures.learned_between_s = _learned_between(files.folder / "learner" / "metrics.jsonl")
    return figures


def _open(files: RunFiles, figures: Figures) -> dict[str, Ledger]:
    ledgers: dict[str, Ledger] = {}
    for each in files.ledgers:
        try:
            ledgers[each.name] = Ledger(each.uri)
        except (LedgerError, OSError) as error:
            _trouble(figures, error)
    return ledgers


def _reference(files: RunFiles, ledgers: Mapping[str, Ledger], figures: Figures) -> dict[str, int]:
    """Steps that the teacher needed for each task that it was scored on, too."""
    steps: dict[str, int] = {}
    for each in files.of(Role.EVALUATION):
        if each.name.startswith("teacher") and each.name in ledgers:
            try:
                steps = steps_by_task(ledgers[each.name]) | steps
            except (LedgerError, OSError) as error:
                _trouble(figures, error)
    return steps


def _watched(files: RunFiles, ledgers: Mapping[str, Ledger], figures: Figures) -> list[tuple[int, Score]]:
    found: list[tuple[int, Score]] = []
    for each in files.of(Role.WATCH):
        if each.name not in ledgers or each.step is None:
            continue
        try:
            rate = read_figures(ledgers[each.name]).total.rate
        except (LedgerError, OSError) as error:
            _trouble(figures, error)
            continue
        if rate is not None:
            found.append((each.step, rate))
    return sorted(found, key=lambda pair: pair[0])


def _scores(files: RunFiles, figures: Figures) -> tuple[dict[str, dict[str, Score]], str]:
    """Of the results, where a job came so far; else of what the ledgers hold."""
    recorded = recorded_scores((files.results or {}).get("scores"))
    if recorded:
        return recorded, "results"
    scores: dict[str, dict[str, Score]] = {}
    roles = (Role.TRAINING,) if files.kind is Kind.COLLECT else (Role.EVALUATION,)
    for name, ledger in figures.of(*roles).items():
        for policy in ledger.policies:
            row = policy if files.kind in (Kind.COLLECT, Kind.LEDGER) else name
            if len(ledger.policies) > 1 and row == name:
                row = f"{name}: {policy}"
            scores[row] = {
                kind: rate
                for kind in ledger.kinds
                if (rate := ledger.tallies.get((policy, kind), Tally()).rate) is not None
            }
    return scores, "ledgers"


def recorded_scores(found: Any) -> dict[str, dict[str, Score]]:
    """What `results.json` says under "scores"; {} for anything else than rows of kinds of scores."""
    if not isinstance(found, Mapping):
        return {}
    scores: dict[str, dict[str, Score]] = {}
    for row, kinds in found.items():
        if not isinstance(kinds, Mapping):
            continue
        cells = {str(kind)[:NAME_CHARS]: cell for kind, each in kinds.items() if (cell := _score(each)) is not None}
        if cells:
            scores[str(row)[:NAME_CHARS]] = cells
    return scores


def _score(found: Any) -> Score | None:
    try:
        mean, low, high, n = (found[name] for name in ("mean", "low", "high", "n"))
        numbers = float(mean), float(low), float(high)
    except (TypeError, KeyError, ValueError):
        return None
    return Score(*numbers, int(n)) if all(map(math.isfinite, numbers)) else None


def _curation(files: RunFiles, ledgers: Mapping[str, Ledger], figures: Figures) -> Mapping[str, Any] | None:
    """What was recorded; done again for a job that did not come so far, unless there is too much."""
    for place in ((files.results or {}).get("learner"), files.learned, files.results):
        recorded = place.get("curation") if isinstance(place, Mapping) else None
        if isinstance(recorded, Mapping) and isinstance(recorded.get("filters"), list):
            return recorded
    collected = figures.collected
    filters = ((files.config or {}).get("curation") or {}).get("filters")
    if collected is None or not filters or "training" not in ledgers or collected.total.n > _CURATED_AGAIN:
        return None
    from rollout.curation import Curation, CurationError

    try:
        curated = Curation.from_config(filters).apply(ledgers["training"].trajectories)
        for _ in curated.kept:
            pass
    except (CurationError, LedgerError, OSError) as error:
        _trouble(figures, error)
        return None
    return curated.report.to_json()


def _spent(files: RunFiles) -> dict[str, Spent]:
    spent: dict[str, Spent] = {}
    for row in files.lines("spend.jsonl"):
        if not isinstance(row.get("model"), str):
            continue
        each = spent.setdefault(row["model"], Spent())
        try:
            usd = row.get("usd")
            each.requests += int(row.get("requests") or 0)
            each.prompt_tokens += int(row.get("prompt_tokens") or 0)
            each.completion_tokens += int(row.get("completion_tokens") or 0)
            each.usd += float(usd or 0.0)
            each.unpriced |= usd is None
            each.lost_usd += float(usd or 0.0) if row.get("lost") else 0.0
        except (TypeError, ValueError):
            continue
    return spent


def _add_samples(files: RunFiles, ledgers: Mapping[str, Ledger], figures: Figures) -> None:
    """Some successes and failures of each kind and policy; of the training ledger, the rows around them, too."""
    for each in files.of(Role.TRAINING, Role.EVALUATION):
        found = figures.ledgers.get(each.name)
        if found is None:
            continue
        keys = _keys(found)[: max(0, _MOST_SHOWN - len(figures.samples))]
        try:
            is_training = each.role is Role.TRAINING or files.kind is Kind.LEDGER
            samples = read_samples(ledgers[each.name], keys, around=is_training)
            failed = failed_samples(ledgers[each.name])
        except (LedgerError, OSError) as error:
            _trouble(figures, error)
            continue
        shown = [samples.trajectories[key] for key in keys if key in samples.trajectories]
        figures.samples += [Sample(each.name, trajectory) for trajectory in [*shown, *failed]]
        if is_training and figures.composition is None:
            config = files.config or {}
            figures.composition = compose(
                samples.around, tokenizer_folder(config, files.folder), config.get("learner") or {}
            )


def _keys(ledger: LedgerFigures) -> list[str]:
    """The largest kinds first, until there are enough."""
    kinds = sorted(ledger.kinds, key=lambda kind: -ledger.of_kind(kind).n)[:SHOWN_KINDS]
    return [
        key
        for kind in sorted(kinds)
        for policy in ledger.policies
        for success in (True, False)
        for key in ledger.samples.get((policy, kind, success), [])[: _SHOWN_EACH[success]]
    ]


def _parameters(student: Path) -> int | None:
    """How many numbers a Hugging Face folder holds, by the headers of its safetensors
    (https://github.com/huggingface/safetensors#format)."""
    total = 0
    for path in sorted(student.glob("*.safetensors")):
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > 100_000_000:
                    return None
                header = json.loads(file.read(length))
            total += sum(math.prod(each["shape"]) for name, each in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return None
    return total or None


def _learned_between(metrics: Path) -> tuple[float, float] | None:
    try:
        with open(metrics, "rb") as file:
            first = json.loads(file.readline())["unix_s"]
            file.seek(max(0, metrics.stat().st_size - 65_536))
            last = json.loads(file.read().splitlines()[-1])["unix_s"]
        return float(first), float(last)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _trouble(figures: Figures, error: Exception) -> None:
    line = text_without_secrets(" ".join(str(error).split()))
    if line not in figures.troubles:
        figures.troubles.append(line)
