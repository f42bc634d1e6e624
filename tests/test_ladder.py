"""The ladder: what its runs are asked for, how they are run, and what its table says of them."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from envs.base import Task
from launch import distill
from launch.config_reading import load_config
from launch.rungs.config import Expectation, LadderConfig, LadderRow, LadderRun, read_ladder
from launch.rungs.runs import LadderRuns
from launch.rungs.table import leave, measure
from learner.config import ConfigError
from rollout.ledger import LedgerWriter
from rollout.trajectory import StopReason, Trajectory

TINY = LadderConfig(
    out="",
    seeds=(0, 1),
    parallel=2,
    common=("tasks.train_count=8",),
    runs=(LadderRun(name="a", rows=("student",)), LadderRun(name="b", reuse="a", rows=("student",))),
    table=(
        LadderRow(name="a", title="the first", run="a", row="student"),
        LadderRow(name="b", title="the second", run="b", row="student"),
    ),
    expected=(Expectation(lower="a", higher="b"),),
)


def run_all(ladder: LadderConfig, program: Path) -> LadderRuns:
    with LadderRuns(ladder, ["x=1"], program=program) as runs:
        ends_at = time.monotonic() + 60
        while not runs.done():
            assert time.monotonic() < ends_at
            runs.advance()
            time.sleep(0.02)
    return runs


def script(folder: Path, body: str) -> Path:
    """A stand-in for the main job, which appends its run_dir to `order` and then does `body`."""
    program = folder / "program.py"
    program.write_text(
        "import sys, time\n"
        "run = next(a for a in sys.argv if a.startswith('run_dir=')).partition('=')[2]\n"
        f"order = open({str(folder / 'order')!r}, 'a')\norder.write(run + '\\n')\norder.close()\n{body}"
    )
    return program


def record_run(ladder: LadderConfig, run: str, seed: int, solved: list[bool]) -> None:
    folder = ladder.folder(run, seed)
    writer = LedgerWriter(folder / "evaluation" / "student", writer="w")
    for i, success in enumerate(solved):
        task = Task(id=f"t{i}", question="q", answer="a", kind="odd" if i % 2 else "even")
        writer.append(
            [
                Trajectory(
                    key=f"{run}{seed}{i}", task=task, dialect="code", system_prompt="", steps=(), policy="student",
                    weights_version="", sample_index=0, seed=0, reward=float(success), success=success, prediction="",
                    stop_reason=StopReason.FINAL, failure=None, first_thought=None, started_at_s=0.0, duration_s=0.0,
                )
            ]
        )  # fmt: skip
    results = {"learner": {"tokens": 1_400_000, "examples": 2000}, "environment": {"cpu": "one"}}
    (folder / "results.json").write_text(json.dumps(results))


def test_every_run_of_the_shipped_ladder_composes_with_equal_training_tokens():
    ladder, overrides = read_ladder(["learner.lr=0.002"])
    configs = [load_config(ladder.command(run, seed=1, overrides=overrides)) for run in ladder.runs]
    assert {config.learner.max_tokens for config in configs} == {1_400_000}
    assert {(config.seed, config.learner.lr) for config in configs} == {(1, 0.002)}
    assert len({config.run_dir for config in configs}) == len(configs)


def test_the_main_command_runs_the_ladder_by_its_recipes_name(capsys):
    assert distill.main(["recipe=ladder", "--cfg", "ladder.seeds=[7]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(read_ladder([])[0].runs)
    assert all("seed=7" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["seed=1"], r"config seed: the ladder sets it .* use ladder.seeds=\[0,1\]"),
        (["ladder.seed=1"], "config seed: unknown key; did you mean 'seeds'"),
        (["ladder.seeds=[1,1]"], r"seeds are \[1, 1\]; give at least one, each once"),
        (["ladder.parallel=0"], "parallel"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(overrides, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read_ladder(overrides)


def test_a_run_that_cannot_work_ends_the_command_before_anything_starts(capsys, tmp_path):
    assert distill.main(["recipe=ladder", f"ladder.out={tmp_path / 'l'}", "learner.lr=-1"]) == 2
    assert "run 'agent': config learner: lr is -1" in capsys.readouterr().err
    assert not (tmp_path / "l").exists()


def test_students_of_unequal_training_are_not_compared(capsys):
    assert distill.main(["recipe=ladder", "learner.epochs=2", "learner.max_tokens=null"]) == 2
    assert "compares students of equal training tokens" in capsys.readouterr().err


def test_a_reusing_run_starts_when_the_run_that_it_reuses_has_ended(tmp_path):
    ladder = replace(TINY, out=str(tmp_path / "l"))
    run_all(ladder, script(tmp_path, "time.sleep(0.3)"))
    order = (tmp_path / "order").read_text().split()
    for seed in ladder.seeds:
        assert order.index(str(ladder.folder("a", seed))) < order.index(str(ladder.folder("b", seed)))
    assert len(order) == 4


def test_a_failed_run_takes_down_only_what_reuses_it(tmp_path):
    ladder = replace(TINY, out=str(tmp_path / "l"))
    runs = run_all(ladder, script(tmp_path, "print('out of luck')\nsys.exit('/seed0/' in run)"))
    assert runs.failed() == {"a, seed 0": "out of luck", "b, seed 0": "not started: what it reuses failed"}
    assert runs.figures() == {"runs": "2/4", "failed": "2"}


def test_leaving_early_ends_the_runs_that_are_under_way(tmp_path):
    body = f"""
import os
open({str(tmp_path / "pid")!r} + str(os.getpid()), 'w').close()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('ended politely')
"""
    ladder = replace(TINY, out=str(tmp_path / "l"), seeds=(0,))
    with LadderRuns(ladder, [], program=script(tmp_path, body)) as runs:
        runs.advance()
        ends_at = time.monotonic() + 30
        while not (started := list(tmp_path.glob("pid*"))):
            assert time.monotonic() < ends_at
            time.sleep(0.02)
    assert not Path("/proc", started[0].name.removeprefix("pid")).exists() or sys.platform != "linux"
    assert "ended politely" in (tmp_path / "l" / "seed0" / "a.log").read_text()


def test_a_step_holds_when_the_same_tasks_say_so_on_all_seeds(tmp_path):
    ladder = replace(TINY, out=str(tmp_path))
    for seed in ladder.seeds:
        record_run(ladder, "a", seed, [False] * 8)
        record_run(ladder, "b", seed, [True] * 6 + [False] * 2)
    shown = measure(ladder)
    (step,) = shown.steps
    assert (step.test.first_better, step.test.second_better, step.test.n) == (12, 0, 16)
    assert (step.verdict, step.seeds_higher) == ("holds", 2)
    assert shown.rows[1].by_seed == {0: 0.75, 1: 0.75}
    assert {kind: rate.n for kind, rate in shown.rows[1].scores.items()} == {"even": 8, "odd": 8}


def test_a_step_of_a_few_tasks_is_not_called_shown(tmp_path):
    ladder = replace(TINY, out=str(tmp_path), seeds=(0,))
    record_run(ladder, "a", 0, [False] * 8)
    record_run(ladder, "b", 0, [True] * 3 + [False] * 5)
    assert measure(ladder).steps[0].verdict == "not shown"


def test_a_step_the_wrong_way_is_called_reversed(tmp_path):
    ladder = replace(TINY, out=str(tmp_path), seeds=(0,))
    record_run(ladder, "a", 0, [True] * 9)
    record_run(ladder, "b", 0, [False] * 9)
    assert measure(ladder).steps[0].verdict == "reversed"


def test_what_is_incomplete_is_named_and_the_rest_is_shown(tmp_path):
    ladder = replace(TINY, out=str(tmp_path))
    record_run(ladder, "a", 0, [True] * 4)
    console = Console(width=140, record=True)
    leave(measure(ladder), ladder, console, minutes=1.0)
    text = console.export_text()
    assert "not complete: a, seed 1" in text and "not complete: b, seed 0, 1" in text
    assert "| the first | 100 [34, 100] |" in (tmp_path / "ladder.md").read_text()
    assert json.loads((tmp_path / "ladder.json").read_text())["rows"][0]["tokens"] == {"0": 1_400_000}
    assert (tmp_path / "ladder.png").stat().st_size > 1000
