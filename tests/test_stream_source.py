"""What the learner is handed: each trajectory once, and those that curation removes as ones that it refuses."""

from __future__ import annotations

from dataclasses import replace

from learner_samples import trajectory

from launch.source import StreamSource
from rollout.curation import Curation
from rollout.ledger import LedgerWriter


def delivered(source: StreamSource) -> dict[str, bool]:
    given: dict[str, bool] = {}
    while (batch := source.next(2, timeout_s=0.1)) is not None:
        assert not given.keys() & {each.key for each in batch}
        given |= {each.key: each.trainable for each in batch}
    return given


def test_what_curation_removes_arrives_and_is_not_trained_on(tmp_path):
    long = replace(trajectory(1), steps=trajectory(1).steps * 2)
    LedgerWriter(tmp_path, writer="w").append([trajectory(0), long, trajectory(2, success=False)])
    curation = Curation.from_config([{"name": "length", "max_steps": 2}])
    given = delivered(StreamSource(tmp_path, None, curation))
    assert given == {trajectory(0).key: True, long.key: False, trajectory(2).key: False}


def test_filters_that_compare_trajectories_do_not_judge_a_stream(tmp_path):
    twins = [trajectory(0), replace(trajectory(0), key="twin")]
    LedgerWriter(tmp_path, writer="w").append(twins)
    assert all(delivered(StreamSource(tmp_path, None, Curation.from_config(["deduplicate"]))).values())


def test_a_row_that_is_there_twice_comes_once(tmp_path):
    writer = LedgerWriter(tmp_path, writer="w")
    writer.append([trajectory(0), trajectory(1)])
    writer.append([trajectory(0)])
    assert len(delivered(StreamSource(tmp_path, None))) == 2
