"""`launch.ledger export` and `import`: trajectories as files of other tools, and their files as a ledger.

The formats are those of `rollout.interchange`; beside them `parquet` and `jsonl` are a ledger's own rows in one file.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launch.ledger.output import Output, new_file, new_ledger
from launch.ledger.sources import Sources, UsageError, load_curation
from rollout.interchange import FORMATS, Imported, InterchangeError, read, write
from rollout.trajectory import Trajectory

_PLAIN = ("parquet", "jsonl")
_WRITTEN = (*_PLAIN, *(each.name for each in FORMATS.values() if each.rows))
_ALIASES = {"trl": "prompt_completion", "smolagents": "smolagents_memory"}
_ROWS_AT_A_TIME = 256


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    named = [f"{alias} (that is {name})" for alias, name in _ALIASES.items()]
    parser.add_argument("--format", required=True, metavar="FORMAT", help=f"one of {', '.join([*_WRITTEN, *named])}")
    parser.add_argument("--out", required=True, help="the new file")
    parser.add_argument("--curation", help="export what it keeps: a name in configs/curation, or a YAML file")
    parser.add_argument("--shown", action="store_true", help="prompts as the policy saw them, not as a student shall")


def run_export(options: argparse.Namespace, output: Output) -> int:
    name = _ALIASES.get(options.format, options.format)
    if name not in _WRITTEN:
        raise UsageError(f"format {options.format!r} cannot be written; there are {', '.join([*_WRITTEN, *_ALIASES])}")
    if options.shown and name in _PLAIN:
        raise UsageError(f"--shown says nothing for {name}: its rows hold both prompts")
    sources = Sources(options.ledgers)
    curation = load_curation(options.curation) if options.curation else None
    trajectories = sources.trajectories() if curation is None else curation.apply(sources.trajectories).kept
    chosen = output.progress("exporting", trajectories, total=sources.count() if curation is None else None)
    with new_file(options.out) as path:
        if name in _PLAIN:
            rows = count = _write_plain(chosen, path, name)
            left_out: dict[str, int] = {}
        else:
            written = write(chosen, path, name, prompt="shown" if options.shown else "trained")
            rows, count, left_out = written.rows, written.trajectories, written.left_out
    output.say(f"{count:,} trajectories are {rows:,} rows of {options.out}")
    for reason, n in left_out.items():
        output.say(f"  {n:,} left out: {reason}")
    output.data({"out": options.out, "format": name, "trajectories": count, "rows": rows, "left_out": left_out})
    return 0


def _write_plain(trajectories: Iterable[Trajectory], path: Path, name: str) -> int:
    import pyarrow.parquet as pq

    from rollout.records import SCHEMA, to_table

    count = 0
    if name == "parquet":
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for batch in _batches(trajectories):
                writer.write_table(to_table(batch))
                count += len(batch)
        return count
    with open(path, "x", encoding="utf-8") as file:
        for batch in _batches(trajectories):
            for row in to_table(batch).to_pylist():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += len(batch)
    return count


def _batches(trajectories: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
    held: list[Trajectory] = []
    for trajectory in trajectories:
        held.append(trajectory)
        if len(held) == _ROWS_AT_A_TIME:
            yield held
            held = []
    if held:
        yield held


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="the new ledger")
    parser.add_argument(
        "--format", default="auto", metavar="FORMAT", help=f"auto (the default) or one of {', '.join(FORMATS)}"
    )
    parser.add_argument("--policy", default="", help="who acted, where the file does not say")
    parser.add_argument(
        "--dialect", choices=("code", "search"), default="code", help="what ReAct runs become (default %(default)s)"
    )
    parser.add_argument(
        "--assume-success", action="store_true", help="runs without score and without answer count as right"
    )
    parser.add_argument("--answers", help="JSON list of {question, answer} that FireAct's runs point into")


def run_import(options: argparse.Namespace, output: Output) -> int:
    """Each row becomes a trajectory, or is counted with the reason why it does not."""
    refused: Counter[str] = Counter()
    examples: dict[str, str] = {}
    outcomes: Counter[str] = Counter()
    seen: set[str] = set()
    files: dict[str, dict[str, int]] = {}
    twice = 0
    with new_ledger(options.out, writer="import") as fill:
        for file in options.files:
            count = files[file] = {"imported": 0, "refused": 0}
            for each in output.progress(Path(file).name, _read(file, options), total=None):
                if not isinstance(each, Imported):
                    count["refused"] += 1
                    refused[each.reason] += 1
                    examples.setdefault(each.reason, f"{Path(file).name}, {each}")
                elif each.trajectory.key in seen:
                    twice += 1
                else:
                    count["imported"] += 1
                    outcomes[each.outcome] += 1
                    seen.add(each.trajectory.key)
                    fill(each.trajectory)
        if not seen:
            told = "; ".join(f"{n:,} {reason}" for reason, n in refused.most_common()) or "the files hold no row"
            raise UsageError(f"nothing could be imported: {told}")
    data = {
        "out": options.out,
        "imported": len(seen),
        "repeated": twice,
        "outcomes": dict(outcomes.most_common()),
        "files": files,
        "refused": {reason: {"rows": n, "example": examples[reason]} for reason, n in refused.most_common()},
    }
    _show_import(data, output)
    output.data(data)
    return 0


def _read(file: str, options: argparse.Namespace) -> Iterator[Any]:
    try:
        yield from read(
            file,
            options.format,
            as_dialect=options.dialect,
            policy=options.policy,
            assume_success=options.assume_success,
            answers=options.answers,
        )
    except InterchangeError as error:
        problem, about, _ = str(error).partition("\nFormats: ")
        raise UsageError(f"{problem.rstrip('.')}; formats are {', '.join(FORMATS)}" if about else problem) from None


def _show_import(data: dict[str, Any], output: Output) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    told = ", ".join(f"{n:,} {name}" for name, n in data["outcomes"].items())
    output.say(f"{data['imported']:,} rows are trajectories in {data['out']} (success: {told})")
    if data["repeated"]:
        output.say(f"{data['repeated']:,} rows are the same run as an earlier one")
    if not data["refused"]:
        output.say("every row was imported")
        return
    table = Table("not imported", "rows", "for example", box=box.SIMPLE_HEAD, pad_edge=False)
    for reason, each in data["refused"].items():
        table.add_row(Text(reason), f"{each['rows']:,}", Text(each["example"][:200]))
    output.show(table)
