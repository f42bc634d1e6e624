"""`reuse`: what earlier runs recorded of this run's episodes is not collected again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.config_reading import load_config, to_plain
from launch.reuse import check_reuse, reuse
from launch.wiring import assignments
from launch.world import load_world
from learner.config import ConfigError
from rollout.ledger import Ledger, LedgerWriter
from rollout.trajectory import StopReason, Trajectory


def episode(key: str, task) -> Trajectory:
    return Trajectory(
        key=key, task=task, dialect="code", system_prompt="", steps=(), policy="expert", weights_version="",
        sample_index=0, seed=0, reward=1.0, success=True, prediction="", stop_reason=StopReason.FINAL, failure=None,
        first_thought=None, started_at_s=0.0, duration_s=0.0,
    )  # fmt: skip


@pytest.fixture
def earlier(tmp_path: Path):
    """A run of 6 tasks that is done; returns its folder and its configuration."""
    config = load_config(["tasks.train_count=6", "tasks.test_count=1", f"run_dir={tmp_path / 'earlier'}"])
    folder = Path(config.run_dir)
    world = load_world(config, folder / "index")
    (assigned,) = assignments(config, world.train, Ledger(folder / "ledger"))
    LedgerWriter(folder / "ledger", writer="w").append([episode(each.key, each.task) for each in assigned.requests])
    (folder / "config.json").write_text(json.dumps(to_plain(config)))
    return folder, config


def test_only_the_episodes_of_this_run_are_taken_and_nothing_of_them_is_missing_then(earlier, tmp_path):
    folder, config = earlier
    later = replace(
        config, tasks=replace(config.tasks, train_count=4), reuse=(str(folder / "ledger"),), run_dir=str(tmp_path / "b")
    )
    into = tmp_path / "b" / "ledger"
    world = load_world(later, tmp_path / "b" / "index")
    check_reuse(later)
    assert reuse(later, assignments(later, world.train, Ledger(into)), into) == 4
    (assigned,) = assignments(later, world.train, Ledger(into))
    assert assigned.missing == []
    assert Ledger(into).keys() == {each.key for each in assigned.requests}


def test_reusing_twice_adds_nothing(earlier, tmp_path):
    folder, config = earlier
    later = replace(config, reuse=(str(folder / "ledger"), str(folder / "ledger")))
    into = tmp_path / "b" / "ledger"
    world = load_world(later, tmp_path / "b" / "index")
    assigned = assignments(later, world.train, Ledger(into))
    assert (reuse(later, assigned, into), reuse(later, assigned, into)) == (6, 0)


def test_a_ledger_of_another_env_is_refused_and_says_what_differs(earlier):
    folder, config = earlier
    later = replace(config, env=replace(config.env, search_results=5), reuse=(str(folder / "ledger"),))
    with pytest.raises(ConfigError, match=r"another env: there {'search_results': 2}, here {'search_results': 5}"):
        check_reuse(later)


def test_a_ledger_that_is_not_there_is_refused(earlier, tmp_path):
    _, config = earlier
    with pytest.raises(ConfigError, match=r"reuse: '.*/none' holds no ledger"):
        check_reuse(replace(config, reuse=(str(tmp_path / "none"),)))
