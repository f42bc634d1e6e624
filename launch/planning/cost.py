"""How long a job will take, and what it costs: counts of episodes and tokens, times a pace that somebody measured.

Nothing is guessed silently: a pace is given by the person, taken from an earlier run (`pace_of_run`), or, for a learner
on a GPU whose data sheet is known, reckoned from its FLOP/s with a utilization that is said; else the time is unknown.

Example::

    pace = pace_of_run("runs/starter-seed0")
    estimate = estimate_job(config, counts, pace, learner_parameters=2_215_872)
    estimate.lines                              # what is said, with where each number is from
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.config import CollectConfig, DistillConfig, JobConfig
from rollout.spend import Prices

ASSUMED_MFU = 0.35
"""Of a learner whose pace nobody measured: what our benchmark of packed rows and others' published runs reach."""
STEPS, PROMPT_TOKENS, COMPLETION_TOKENS = 3.0, 1500.0, 150.0
"""Of an episode, a step and a step, where nothing is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A number and where it is from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What was measured or given; None: not known."""

    steps: Known = Known(value=STEPS, source="assumed; --steps says it")
    """Of an episode."""
    prompt_tokens: Known = Known(value=PROMPT_TOKENS, source="assumed; --prompt-tokens says it")
    """Of a step."""
    completion_tokens: Known = Known(value=COMPLETION_TOKENS, source="assumed; --completion-tokens says it")
    """Of a step, all candidates together."""
    row_tokens: Known | None = None
    """Of a training row."""
    trained_share: Known | None = None
    """Of a row's tokens, those that are trained on."""
    teacher_tokens_per_s: Known | None = None
    """Completion tokens of one engine, or of all workers that ask an API or the expert."""
    student_tokens_per_s: Known | None = None
    """Completion tokens of one engine, greedy."""
    train_tokens_per_s: Known | None = None
    """Of all ranks together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a job has to do."""

    train_tasks: int
    test_tasks: int
    sources: tuple[str, ...] = ()
    """Where the numbers are from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One number of the estimate."""

    what: str
    value: float | None
    unit: str
    how: str
    """Formula or source; of what is not known, what would tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of a whole job."""

    lines: tuple[Line, ...]
    warnings: tuple[str, ...] = field(default=())

    def value(self, what: str) -> float | None:
        return next((line.value for line in self.lines if line.what == what), None)


def count_tasks(config: JobConfig) -> Counts:
    """Reads the files that are there; of those that are not, what the configuration says of their size."""
    tasks = config.tasks
    if tasks.source == "starter":
        kinds = 4
        return Counts(
            train_tasks=tasks.train_count, test_tasks=tasks.test_count * kinds,
            sources=("tasks.train_count", f"tasks.test_count x {kinds} kinds"),
        )  # fmt: skip
    train, why_train = _sizes(tasks.train)
    test, why_test = _sizes(tasks.test)
    if train is None or train > tasks.train_count:
        train, why_train = tasks.train_count, "tasks.train_count" + ("" if train else f" at most: {why_train}")
    return Counts(train_tasks=train, test_tasks=test or 0, sources=(why_train, why_test))


def _sizes(task_sets: Any) -> tuple[int | None, str]:
    """None where one of them is not here and does not say."""
    from envs.tasks import load_tasks

    total, told, absent = 0, [], []
    for each in task_sets:
        if Path(each.path).exists():
            count = len(
                load_tasks(each.path, kind=each.kind, grader=each.grader, columns=each.columns, limit=each.count)
            )
            told.append(f"{each.path}: {count:,}")
        elif each.count is not None:
            count = each.count
            absent.append((each.path, count))
        else:
            return None, f"{each.path} is not here"
        total += count
    if absent:
        first = absent[0][0]
        which = first if len(absent) == 1 else f"{len(absent)} files ({first} for one)"
        told.append(f"{sum(count for _, count in absent):,} by the counts of {which}, not here")
    return total, "; ".join(told) or "none"


def pace_of_run(place: str) -> Pace:
    """Of a run of the main job, or of a collection: its ledger, and its results where it has ended. Raises
    `ValueError` for a folder that is neither."""
    from launch.evaluation.summary import summarize
    from rollout.ledger import Ledger, LedgerError

    ledger_at = f"{place}/ledger"
    try:
        figures = summarize(Ledger(ledger_at), step_times=False).all
    except (LedgerError, OSError) as error:
        raise ValueError(f"--from {place}: there is no ledger to learn from: {error}") from None
    if not figures.n:
        raise ValueError(f"--from {place}: its ledger is empty")
    steps = max(figures.mean_steps, 1e-9)
    known = {
        "steps": Known(value=figures.mean_steps, source=f"mean of {figures.n:,} episodes in {ledger_at}"),
        "prompt_tokens": Known(value=figures.mean_prompt_tokens / steps, source=f"mean per step in {ledger_at}"),
        "completion_tokens": Known(
            value=figures.mean_completion_tokens / steps, source=f"mean per step in {ledger_at}"
        ),
    }
    pace = Pace(**{name: each for name, each in known.items() if each.value > 0})
    learner = Path(place) / "learner" / "metrics.jsonl"
    if learner.is_file() and (last := _last_line(learner)):
        rows, tokens = last.get("rows") or 0, last.get("tokens") or 0
        if rows and tokens:
            pace = replace(
                pace,
                row_tokens=Known(value=tokens / rows, source=f"{tokens:,} tokens / {rows:,} rows in {learner}"),
                trained_share=Known(value=last.get("trained_tokens", tokens) / tokens, source=str(learner)),
                train_tokens_per_s=Known(value=last["tokens_per_s"], source=f"{learner}, its last step"),
            )
    if rate := _collected_per_s(Ledger(ledger_at)):
        source = f"{ledger_at}: completion tokens / time from the first episode's start to the last one's end"
        pace = replace(pace, teacher_tokens_per_s=Known(value=rate, source=source))
    student = Path(place) / "evaluation" / "student"
    if student.is_dir() and (rate := _collected_per_s(Ledger(student))):
        pace = replace(pace, student_tokens_per_s=Known(value=rate, source=f"{student}, likewise"))
    return pace


def _collected_per_s(ledger: Any) -> float | None:
    first, last, tokens = float("inf"), 0.0, 0
    for table in ledger.scan(["started_at_s", "duration_s", "completion_tokens"]):
        for row in table.to_pylist():
            first = min(first, row["started_at_s"])
            last = max(last, row["started_at_s"] + row["duration_s"])
            tokens += row["completion_tokens"] or 0
    return tokens / (last - first) if tokens and last > first else None


def _last_line(path: Path) -> dict[str, Any]:
    """The last whole one."""
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}


def estimate_job(
    config: JobConfig,
    counts: Counts,
    pace: Pace,
    *,
    learner_parameters: int | None = None,
    gpu_flops: tuple[str, float] | None = None,
    gpus: float = 0.0,
    gpu_hour_usd: float | None = None,
) -> Estimate:
    """`gpu_flops`: name and dense bf16 peak of the learner's GPU; `gpus`: held while the job runs."""
    lines: list[Line] = []
    warnings: list[str] = []

    def say(what: str, value: float | None, unit: str, how: str) -> float | None:
        lines.append(Line(what=what, value=value, unit=unit, how=how))
        return value

    tasks = counts.test_tasks if getattr(config, "split", "train") == "test" else counts.train_tasks
    episodes = config.episodes_of(tasks)
    several = (
        f" x {len(config.all_teachers)} teachers" if config.share == "all" and len(config.all_teachers) > 1 else ""
    )
    say(
        "episodes",
        episodes,
        "",
        f"{tasks:,} tasks ({counts.sources[0]}) x rollout.samples={config.rollout.samples}{several}",
    )
    steps = (
        say("steps", episodes * pace.steps.value, "", f"{pace.steps.value:.2f} an episode: {pace.steps.source}") or 0
    )
    prompts = steps * pace.prompt_tokens.value
    say("prompt tokens", prompts, "", f"{pace.prompt_tokens.value:,.0f} a step: {pace.prompt_tokens.source}")
    completions = steps * pace.completion_tokens.value
    say(
        "completion tokens",
        completions,
        "",
        f"{pace.completion_tokens.value:,.0f} a step: {pace.completion_tokens.source}",
    )
    collect_s = _collecting(config, pace, completions, say)
    usd = _api_cost(config, prompts, completions, say)
    learn_s = score_s = None
    if isinstance(config, DistillConfig):
        learn_s = _learning(config, pace, episodes, learner_parameters, gpu_flops, say)
        score_s = _scoring(config, pace, counts, say)
        if collect_s is not None and learn_s is not None and score_s is not None:
            total_s = max(collect_s, learn_s) + score_s
            how = "the longer of collecting and learning, which go on together, then scoring; loading comes on top"
            say("all", total_s, "s", how)
        else:
            total_s = None
            say("all", None, "s", "a part is not known")
    else:
        total_s = collect_s
    if gpus:
        hours = None if total_s is None else gpus * total_s / 3600
        say(
            "GPU-hours",
            hours,
            "h",
            f"{gpus:g} GPUs held all the time" + ("" if total_s is not None else "; the time is not known"),
        )
        if hours is not None and gpu_hour_usd is not None:
            usd = (usd or 0.0) + hours * gpu_hour_usd
            say("GPUs", hours * gpu_hour_usd, "USD", f"{hours:,.2f} GPU-hours x {gpu_hour_usd:g} USD (--gpu-hour-usd)")
    if usd is not None:
        say("cost", usd, "USD", "the sum of what is priced")
    cap = config.spend.usd
    api = next((line.value for line in lines if line.what == "API"), None)
    if cap is not None and api is not None and api > cap:
        warnings.append(
            f"the API teachers would cost {api:,.2f} USD, and spend.usd stops at {cap:g}: raise it, or do less"
        )
    if isinstance(config, CollectConfig | DistillConfig) and config.tasks.source == "files" and not tasks:
        warnings.append("no task was found: the estimate is of nothing")
    return Estimate(lines=tuple(lines), warnings=tuple(warnings))


def _collecting(config: JobConfig, pace: Pace, completions: float, say: Any) -> float | None:
    rate = pace.teacher_tokens_per_s
    if rate is None:
        return say(
            "collecting", None, "s", "the teacher's pace is not known: --tokens-per-s of an engine, or --from RUN"
        )
    engines = sum(
        (share.workers or config.rollout.workers) * share.teacher.data_parallel_size
        for share in config.all_teachers
        if share.teacher.kind == "vllm"
    )
    told = f"{engines} engines x " if engines > 1 else ""
    total = rate.value * max(engines, 1)
    return say(
        "collecting",
        completions / total,
        "s",
        f"{completions:,.0f} tokens / ({told}{rate.value:,.0f} tokens/s: {rate.source})",
    )


def _api_cost(config: JobConfig, prompts: float, completions: float, say: Any) -> float | None:
    paid = [share for share in config.all_teachers if share.teacher.kind in ("openai", "vllm_server")]
    if not paid:
        return None
    weights = sum(share.weight for share in config.all_teachers)
    total, told = 0.0, []
    for share in paid:
        prices: Prices | None = share.teacher.prices
        if prices is None:
            say("API", None, "USD", f"{share.teacher.policy_name} has no prices: teacher.prices says them")
            return None
        part = 1 / len(config.all_teachers) if config.share == "all" else share.weight / weights
        a, b = prices.prompt_usd_per_million, prices.completion_usd_per_million
        total += part * (prompts * a + completions * b) / 1e6
        told.append(f"{share.teacher.policy_name}: {part:.0%} of the tokens at {a:g} and {b:g} USD a million")
    return say("API", total, "USD", "; ".join(told) + "; cached prompts would cost less")


def _learning(
    config: DistillConfig,
    pace: Pace,
    episodes: int,
    parameters: int | None,
    gpu_flops: tuple[str, float] | None,
    say: Any,
) -> float | None:
    learner = config.learner
    if learner.max_tokens is not None:
        tokens, how = float(learner.max_tokens), "learner.max_tokens"
    else:
        per_row = pace.row_tokens
        if per_row is None:
            value = pace.prompt_tokens.value + pace.completion_tokens.value
            value = min(float(learner.max_row_tokens), value + (pace.steps.value - 1) * pace.completion_tokens.value)
            per_row = Known(
                value=value, source="a step's prompt and what the other steps sample, at most max_row_tokens"
            )
        tokens = episodes * per_row.value * (learner.epochs or 1)
        each = f"{per_row.value:,.0f} tokens ({per_row.source})"
        how = f"{episodes:,} rows x {each} x {learner.epochs} epochs; none refused"
    say("trained tokens", tokens, "", how)
    rate = pace.train_tokens_per_s
    if rate is None and gpu_flops is not None and parameters is not None:
        name, peak = gpu_flops
        per_token = (4 if learner.lora is not None else 6) * parameters
        if learner.gradient_checkpointing:
            per_token += 2 * parameters
        value = learner.ranks * peak * ASSUMED_MFU / per_token
        rate = Known(
            value=value,
            source=f"{learner.ranks} x {peak / 1e12:.0f} TFLOP/s ({name}'s data sheet) x {ASSUMED_MFU:.0%} used "
            f"(assumed) / {per_token / 1e9:.1f} GFLOP a token",
        )
    if rate is None:
        return say("learning", None, "s", "the learner's pace is not known: --train-tokens-per-s, or --from RUN")
    return say(
        "learning", tokens / rate.value, "s", f"{tokens:,.0f} tokens / {rate.value:,.0f} tokens/s ({rate.source})"
    )


def _scoring(config: DistillConfig, pace: Pace, counts: Counts, say: Any) -> float | None:
    evaluate = config.evaluate
    times = {"untrained": 1, "student": 1, "self_consistent": evaluate.candidates, "teacher": 0}
    sampled = sum(times[row] for row in evaluate.rows)
    tokens = counts.test_tasks * pace.steps.value * pace.completion_tokens.value * sampled
    say(
        "scored tokens", tokens, "",
        f"{counts.test_tasks:,} test tasks ({counts.sources[1]}) x {sampled} runs of them (evaluate.rows, candidates), "
        "as long as the teacher's; the teacher's own row is not in it",
    )  # fmt: skip
    if not tokens:
        return say("scoring", 0.0, "s", "nothing to score")
    rate = pace.student_tokens_per_s
    if rate is None:
        return say("scoring", None, "s", "the student's pace is not known: --student-tokens-per-s, or --from RUN")
    return say(
        "scoring", tokens / rate.value, "s", f"{tokens:,.0f} tokens / {rate.value:,.0f} tokens/s ({rate.source})"
    )
