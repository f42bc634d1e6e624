"""A plan on a terminal: what would run where, the memory of each model, time and cost, and what to change."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from launch.planning.cost import Line
from launch.planning.memory import GIB
from launch.planning.plans import ModelMemory, Plan, Stage
from rollout.placement_fit import nodes_in_words, words

MOST_ROWS = 20
"""Of a table, one for nodes alike; the other nodes are counted."""
_BAR = 24


def draw(plan: Plan, console: Console, *, title: str) -> None:
    """All of it, the verdict last."""
    console.rule(Text(title))
    for stage in plan.stages:
        console.print(_places(plan, stage))
    for each in plan.memory:
        console.print(_memory(each))
    console.print(_estimate(plan.estimate.lines))
    for warning in plan.warnings:
        style = "red" if warning.fatal else "yellow"
        console.print(Panel(Text(warning.text), title="does not fit" if warning.fatal else "note", border_style=style))
    if not plan.nodes:
        console.print(Text("no cluster was named: --nodes '8xH100 + 2xCPU64' or --address says whether it fits"))
    elif plan.fits:
        console.print(
            Text(f"it fits, as far as is known: {nodes_in_words([each.node for each in plan.nodes])}", "green")
        )
    else:
        count = sum(warning.fatal for warning in plan.warnings)
        console.print(
            Text(f"it does not fit: {count} {'thing' if count == 1 else 'things'} to change, above", "bold red")
        )


def _places(plan: Plan, stage: Stage) -> Table:
    table = Table(title=f"What runs {stage.when}", title_justify="left", expand=False)
    if stage.places is None:
        for column in ("role", "wants", "how"):
            table.add_column(column, overflow="fold")
        for each in stage.groups:
            group = each.group
            count = len(group.bundles)
            wanted = (
                f"{count} {group.what if count != 1 else group.what.removesuffix('s')} of {words(group.bundles[0])}"
            )
            labels = ", ".join(f"{name}={value}" for name, value in group.labels.items())
            table.add_row(
                Text(group.who.removeprefix("the ")), Text(wanted), Text(f"{group.strategy} {labels}".strip())
            )
        return table
    table.add_column("node")
    table.add_column("has")
    table.add_column("runs", overflow="fold")
    nodes = [each for each in plan.nodes if stage.places.get(each.node.name)]
    idle = len(plan.nodes) - len(nodes)
    rows: list[tuple[str, str, list[str]]] = []  # has, runs, names of the nodes
    for each in nodes:
        lines = [f"{count} x {told}" if count > 1 else told for told, count in stage.places[each.node.name].items()]
        has = words(each.node.total)
        row = (f"{has} ({each.gpu})" if each.gpu else has, "\n".join(lines))
        if rows and rows[-1][:2] == row:
            rows[-1][2].append(each.node.name)
        else:
            rows.append((*row, [each.node.name]))
    for has, runs, names in rows[:MOST_ROWS]:
        named = names[0] if len(names) == 1 else f"{len(names)} nodes alike:\n{names[0]} to {names[-1]}"
        table.add_row(Text(named), Text(has), Text(runs))
    if left := sum(len(names) for _, _, names in rows[MOST_ROWS:]):
        table.add_row("", "", Text(f"and {left} nodes more"))
    if idle:
        table.add_row("", "", Text(f"{idle} {'node has' if idle == 1 else 'nodes have'} nothing to do"))
    return table


def _memory(each: ModelMemory) -> Table:
    one = "GPU" if each.device != "CPU" else "process"
    table = Table(title=f"Memory of the {each.role}: {each.model}, each {one} ({each.device})", title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("how", overflow="fold")
    if each.memory is None:
        table.add_row("unknown", "", Text(each.note))
        return table
    for part in each.memory.parts:
        name = part.name + (" (host)" if part.where == "host" else "")
        table.add_row(name, f"{'' if part.exact else '~'}{size(part.bytes)}", Text(part.formula))
    table.add_section()
    table.add_row("sum", size(each.memory.total), _bar(each.memory.total, each.available))
    if each.memory.host:
        ranks = each.offloaded_ranks
        every = f"of each rank; {size(each.memory.host * ranks)} of all {ranks}"
        table.add_row("host memory", size(each.memory.host), Text(every))
    if each.engine is not None:
        table.add_row("KV cache holds", "", Text(_holds(each, one)))
    return table


def _holds(each: ModelMemory, one: str) -> str:
    engine = each.engine
    assert engine is not None
    per_token = f"{engine.kv_bytes_per_token:,.0f} bytes a token on each {one}"
    if engine.kv_tokens is None:
        return f"unknown: the GPU's memory is not known; {per_token}"
    sequences = f"{engine.sequences or 0.0:,.1f} sequences of max_model_len={engine.max_model_len:,}"
    return f"{engine.kv_tokens:,} tokens, {sequences}; {per_token}"


def size(amount: float) -> str:
    """Bytes, as people say them."""
    if amount < 0.1 * GIB:
        return f"{amount / 2**20:,.1f} MiB"
    return f"{amount / GIB:,.2f} GiB"


def _bar(used: float, available: float | None) -> Text:
    if available is None:
        return Text("")
    share = used / available
    filled = min(_BAR, round(share * _BAR))
    style = "red" if share > 1 else "yellow" if share > 0.9 else "green"
    return Text.assemble(
        ("█" * filled, style), ("░" * (_BAR - filled), "dim"), f" {share:.0%} of {available / GIB:,.1f} GiB"
    )


def _estimate(lines: Sequence[Line]) -> Table:
    table = Table(title="Time and cost, an estimate", title_justify="left")
    table.add_column("what")
    table.add_column("about", justify="right")
    table.add_column("how", overflow="fold")
    for line in lines:
        table.add_row(line.what, amount(line), Text(line.how))
    return table


def amount(line: Line) -> str:
    """As people say it: 3.4 h, 12.50 USD, 1.2 million."""
    if line.value is None:
        return "unknown"
    if line.unit == "USD":
        return f"{line.value:,.2f} USD"
    if line.unit == "s":
        if line.value < 90:
            return f"{line.value:.0f} s"
        return f"{line.value / 60:.0f} min" if line.value < 5400 else f"{line.value / 3600:.1f} h"
    if line.unit == "h":
        return f"{line.value:,.1f} h"
    return f"{line.value / 1e6:,.1f} million" if line.value >= 1e6 else f"{line.value:,.0f}"
