"""What a report says of the run itself: its heading with the figures that matter most, and at the end what ran, how it
was configured and on what.

Example::

    run_sections.heading(figures)
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from typing import Any

from launch.evaluation.intervals import Score
from launch.report.figures import Figures
from launch.report.markup import Markup, clipped, details, joined, table, tag
from launch.report.run_files import Kind, Role
from launch.report.score_sections import pool
from launch.report.settings import as_yaml, command, text_without_secrets, without_secrets
from launch.report.wording import number, percent, row_title, usd

_STUDENT_ROWS = ("student_self_consistent", "student")
_COMMANDS = {Kind.DISTILL: "distill", Kind.COLLECT: "collect", Kind.EVALUATE: "evaluate"}


def heading(figures: Figures) -> Markup:
    """Name, how it ended, the result in a sentence and in tiles, and what went wrong."""
    files = figures.files
    state, tone, why = _state(figures)
    tiles = _tiles(figures)
    classes = ["tile main", *["tile"] * (len(tiles) - 1)]
    pieces: list[object] = [
        tag(
            "div",
            tag("span", f"Apprentice · {files.kind.value}"),
            tag("span", state, class_=f"pill {tone}"),
            tag("span", _when(figures)),
            class_="eyebrow",
        ),
        tag("h1", files.name),
        tag("p", _sentence(figures), class_="lead"),
        tag(
            "div", *(tag("div", *tile, class_=name) for tile, name in zip(tiles, classes, strict=True)), class_="tiles"
        ),
    ]
    if why:
        pieces.append(
            tag("div", tag("p", clipped(text_without_secrets(why), 1_000)), class_=f"notice {tone}", role="note")
        )
    for trouble in figures.troubles[:10]:
        pieces.append(tag("div", tag("p", "Not read: ", clipped(trouble, 600)), class_="notice bad", role="note"))
    return joined(pieces)


def what_ran(figures: Figures) -> Markup:
    """The command, model, teacher and world; the configuration; versions, machine, seeds."""
    config = figures.files.config
    parts: list[object] = [tag("h2", "What ran")]
    if config is not None:
        facts = _facts(config, figures)
        parts.append(tag("dl", *(part for name, value in facts for part in (tag("dt", name), tag("dd", value))),
                         class_="facts"))  # fmt: skip
        job = _COMMANDS.get(figures.files.kind)
        if job is not None:
            words = shlex.split(command(config, job=job))
            lines = [" ".join(words[:2]), *map(shlex.quote, words[2:])]
            parts += [
                tag("h3", "The command, as it differs from its recipe"),
                tag("pre", (" \\\n    " if len(words) > 6 else " ").join(lines), class_="block"),
            ]
    parts += [tag("h3", "Versions and machine"), _environment(figures), _said(figures.files.status)]
    if config is not None:
        yaml = as_yaml(without_secrets(config))
        parts.append(
            details(
                tag("b", "The whole configuration"), tag("pre", clipped(yaml, 200_000), class_="block"), class_="config"
            )
        )
    return joined(parts)


# -- the heading


def _state(figures: Figures) -> tuple[str, str, str]:
    """(word, tone, why)."""
    files = figures.files
    status, results = files.status or {}, files.results or {}
    state = status.get("state")
    if state == "failed":
        return "failed", "bad", str(status.get("error") or "")
    if state == "interrupted":
        return "interrupted", "warn", "It was interrupted; the same command goes on where it was."
    if state == "running":
        return "not ended", "warn", "It runs still, or was ended from outside: this is what is there so far."
    if files.kind is Kind.COLLECT and results:
        if results.get("stopped"):
            return "stopped", "warn", str(results["stopped"])
        if results.get("complete") is False:
            return "incomplete", "warn", f"{results.get('missing', 'some')} episodes were not run to an end."
        return "complete", "good", ""
    if results or state == "done":
        return "complete", "good", ""
    if files.kind in (Kind.DISTILL, Kind.COLLECT):
        return "not ended", "warn", "It has no results yet: this is what is there so far."
    return ("ledger", "good", "") if files.kind is Kind.LEDGER else ("recorded", "good", "")


def _when(figures: Figures) -> str:
    begun = [
        float((each.ended_s - each.durations_s).min()) for each in figures.ledgers.values() if len(each.ended_s)
    ]  # fmt: skip
    begun = [each for each in begun if each > 0]
    parts = [time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(min(begun)))] if begun else []
    minutes = (figures.files.results or {}).get("minutes") or _minutes(figures.files.status)
    if isinstance(minutes, int | float) and minutes:
        parts.append(f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours")
    seed = (figures.files.config or {}).get("seed")
    if seed is not None:
        parts.append(f"seed {seed}")
    return " · ".join(parts)


def _minutes(status: Mapping[str, Any] | None) -> float | None:
    """Of the last job."""
    times = [(status or {}).get(name) for name in ("started_unix_s", "updated_unix_s")]
    start, end = (each if isinstance(each, int | float) else 0.0 for each in times)
    return (end - start) / 60 if 0 < start <= end else None


def _sentence(figures: Figures) -> Markup:
    """The run in a sentence or two, as far as it is known."""
    files, collected = figures.files, figures.collected
    said: list[object] = []
    if collected is not None and collected.total.n:
        total = collected.total
        who = ", ".join(collected.policies[:3]) + (" and others" if len(collected.policies) > 3 else "")
        said += [tag("b", who), f" solved {total.succeeded:,} of {total.n:,} training tasks"]
        if files.kind is Kind.COLLECT:
            said.append(f"; {total.accepted:,} of its trajectories are fit to learn from.")
        else:
            said.append(". ")
    student = _student(figures)
    if student is not None:
        row, rate = student
        size = f" of {number(figures.parameters)} parameters" if figures.parameters else ""
        said += ["A student", size, " that learned from them" if collected is not None else "", " solves ",
                 tag("b", percent(rate)), f" of {rate.n:,} held-out tasks"]  # fmt: skip
        teacher, untrained = _row(figures, "teacher"), _row(figures, "untrained")
        beside = [f"its teacher solves {100 * teacher.mean:.0f}%"] if teacher else []
        beside += [f"before it learned, it solved {100 * untrained.mean:.0f}%"] if untrained else []
        said.append(f"; {', '.join(beside)}." if beside else ".")
    elif files.kind in (Kind.EVALUATE, Kind.LEDGER):
        for row, kinds in list(figures.scores.items())[:3]:
            if (rate := pool(kinds.values())) is not None:
                said += [tag("b", row_title(row)), f" solves {percent(rate)} of {rate.n:,}. "]
    if not said:
        said.append("Nothing has been recorded yet.")
    return joined(said)


def _tiles(figures: Figures) -> list[list[Markup]]:
    """Number, what it is, and what belongs beside it."""
    tiles: list[tuple[str, str, str]] = []
    student, teacher = _student(figures), _row(figures, "teacher")
    if student is not None:
        row, rate = student
        tiles.append((f"{100 * rate.mean:.0f}%", row_title(row), f"95%: {100 * rate.low:.0f} to {100 * rate.high:.0f}"))
    if teacher is not None:
        tiles.append(
            (f"{100 * teacher.mean:.0f}%", "teacher", f"95%: {100 * teacher.low:.0f} to {100 * teacher.high:.0f}")
        )
    elif figures.scores and student is None:
        for row, kinds in list(figures.scores.items())[:2]:
            if (rate := pool(kinds.values())) is not None:
                low, high = 100 * rate.low, 100 * rate.high
                tiles.append((f"{100 * rate.mean:.0f}%", row_title(row), f"95%: {low:.0f} to {high:.0f}, n={rate.n:,}"))
    collected = figures.collected
    if collected is not None:
        total = collected.total
        tiles.append((f"{total.n:,}", "trajectories collected", f"{total.accepted:,} fit to learn from"))
    elif figures.ledgers:
        n = sum(each.total.n for each in figures.of(Role.EVALUATION).values())
        tiles.append((f"{n:,}", "trajectories", ""))
    last = figures.training.last
    if figures.training.found:
        passes = last.get("epoch")
        whole = f"{passes} whole pass{'es' * (passes > 1)}" if passes else ""
        tiles.append((number(float(last.get("tokens") or 0)), "tokens learned from", whole))
    sampled = sum(each.total.completion_tokens for each in figures.ledgers.values())
    if sampled:
        tiles.append((number(sampled), "tokens sampled", "of all policies"))
    failed = sum(each.attempts for ledger in figures.ledgers.values() for each in ledger.failures.values())
    tiles.append((f"{failed:,}", "failed attempts", "none was trained on" if failed else ""))
    cost = figures.cost_usd
    if cost or figures.spent:
        accepted = collected.total.accepted if collected is not None else 0
        tiles.append((f"${usd(cost)}", "spent", f"${usd(cost / accepted)} an accepted trajectory" if accepted else ""))
    return [
        [tag("b", big), tag("span", what), tag("i", beside) if beside else Markup("")] for big, what, beside in tiles
    ]


def _student(figures: Figures) -> tuple[str, Score] | None:
    if figures.files.kind is not Kind.DISTILL:
        return None
    for row in _STUDENT_ROWS:
        if (rate := _row(figures, row)) is not None:
            return row, rate
    return None


def _row(figures: Figures, row: str) -> Score | None:
    return pool(figures.scores[row].values()) if row in figures.scores else None


# -- what ran


def _facts(config: Mapping[str, Any], figures: Figures) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = []
    if config.get("recipe"):
        facts.append(("recipe", str(config["recipe"])))
    if isinstance(config.get("policy"), Mapping):
        facts.append(("policy", _policy(config["policy"])))
        facts.append(("modes", ", ".join(map(str, config.get("modes") or []))))
    teachers = [each.get("teacher", {}) for each in config.get("teachers") or []] or [config.get("teacher") or {}]
    if teachers != [{}]:
        facts.append(("teacher", "; ".join(_policy(each) for each in teachers)))
    learner = config.get("learner")
    if isinstance(learner, Mapping):
        base = learner.get("model_path")
        base = "the packaged base student" if base == "base_student" else str(base)
        size = f", {figures.parameters:,} parameters" if figures.parameters else ""
        facts.append(("student", f"{base}{size}"))
        method = str(learner.get("objective"))
        method += f", {learner['epochs']} passes" if learner.get("epochs") else ""
        method += f", LoRA rank {learner['lora'].get('rank')}" if isinstance(learner.get("lora"), Mapping) else ""
        method += f", {learner.get('optimizer')}, {learner.get('precision')}, {learner.get('ranks')} ranks"
        facts.append(("learning", method))
    facts.append(("world", _world(config)))
    retrieval = config.get("retrieval") or {}
    corpus = retrieval.get("corpus") or "the starter world's pages"
    facts.append(("retrieval", "none" if retrieval.get("kind") == "none" else
                  f"{retrieval.get('kind')} over {corpus}, encoder {retrieval.get('encoder')}"))  # fmt: skip
    env, episode = config.get("env") or {}, config.get("episode") or {}
    how = f"env {env.get('name')}, at most {env.get('max_steps')} steps"
    how += f", {episode['candidates']} candidates a step" if (episode.get("candidates") or 1) > 1 else ""
    how += ", first-thought prefix" if episode.get("first_thought") else ""
    facts.append(("episodes", how))
    seeds = {
        "run": config.get("seed"),
        "episodes": episode.get("seed"),
        "world": (config.get("tasks") or {}).get("seed"),
    }
    seeds["learner"] = learner.get("seed") if isinstance(learner, Mapping) else None
    facts.append(("seeds", ", ".join(f"{name} {seed}" for name, seed in seeds.items() if seed is not None)))
    return [(name, text_without_secrets(str(value))) for name, value in facts]


def _policy(spec: Mapping[str, Any]) -> str:
    if spec.get("kind") == "expert":
        return "the built-in expert, rule-based"
    name = str(spec.get("name") or "")
    parts = [str(spec.get("model") or ""), f"as {name}" if name else "", f"({spec.get('kind')})"]
    if spec.get("base_url"):
        parts.append(f"at {spec['base_url']}")
    return " ".join(part for part in parts if part)


def _world(config: Mapping[str, Any]) -> str:
    tasks = config.get("tasks") or {}
    benchmark = (config.get("benchmark") or {}).get("name")
    if benchmark:
        return f"benchmark {benchmark}"
    if tasks.get("source") == "starter":
        train, test = tasks.get("train_count"), tasks.get("test_count")
        return f"starter world {tasks.get('seed')}: {train} tasks to learn from, {test} of each kind held out"
    sets = [f"{each.get('path')} ({each.get('kind')})" for name in ("train", "test") for each in tasks.get(name) or []]
    return clipped(", ".join(sets), 600) or "–"


def _environment(figures: Figures) -> Markup:
    found = figures.environment
    rows = [[name, str(found[name])] for name in ("python", "system", "cpus") if name in found]
    rows += [
        [str(name), str(value)] for name, value in found.items() if name not in ("python", "system", "cpus", "packages")
    ]
    packages = found.get("packages")
    rows += [[str(name), str(version)] for name, version in packages.items()] if isinstance(packages, Mapping) else []
    note = "" if figures.environment_recorded else tag(
        "p", "The job recorded none: these are of where this page was made.", class_="note"
    )  # fmt: skip
    return joined([note, table(["", "version"], [[name, clipped(value, 200)] for name, value in rows])])


def _said(status: Mapping[str, Any] | None) -> Markup:
    """The last lines that the job printed."""
    lines = (status or {}).get("said")
    told: list[str] = []
    for each in lines if isinstance(lines, list) else []:
        if isinstance(each, Mapping) and isinstance(each.get("unix_s"), int | float):
            at = time.strftime("%H:%M:%S", time.gmtime(each["unix_s"]))
            told.append(f"{at}  {clipped(text_without_secrets(str(each.get('text', ''))), 400)}")
    if not told:
        return Markup("")
    return joined([tag("h3", "The last lines that it printed (UTC)"), tag("pre", "\n".join(told), class_="block")])
