"""Several teachers: who does what, and how their progress is shown as one."""

from __future__ import annotations

from envs.base import Task
from launch.config import TeacherShare
from launch.joint_collection import summed
from launch.teachers import assign
from rollout.episode import EpisodeSettings
from rollout.policy_spec import PolicySpec
from rollout.task_feed import CollectProgress, EpisodeRequest, WorkerState

TASKS = [Task(id=f"t{i}", question=f"{i}?", answer=str(i), kind="k") for i in range(2000)]


def shares(*weights: float) -> list[TeacherShare]:
    return [
        TeacherShare(teacher=PolicySpec(kind="openai", model=name, base_url="http://h/v1"), weight=weight)
        for name, weight in zip("abcd", weights, strict=False)
    ]


def keys_of(assigned: list[list[EpisodeRequest]]) -> list[set[tuple[str, int]]]:
    return [{(request.task.id, request.sample_index) for request in requests} for requests in assigned]


def test_each_episode_goes_to_one_teacher_by_weight():
    a, b = keys_of(assign(TASKS, 2, shares(3, 1), "split", EpisodeSettings()))
    assert not a & b and len(a | b) == 4000
    assert 0.73 < len(a) / 4000 < 0.77  # 5 standard deviations are 0.034


def test_a_teacher_that_is_added_takes_only_what_is_its_own():
    before = keys_of(assign(TASKS, 1, shares(1, 1), "split", EpisodeSettings()))
    after = keys_of(assign(TASKS, 1, shares(1, 1, 1), "split", EpisodeSettings()))
    assert after[0] < before[0] and after[1] < before[1] and 0.28 < len(after[2]) / 2000 < 0.39


def test_more_samples_change_no_earlier_choice():
    one = keys_of(assign(TASKS, 1, shares(2, 1), "split", EpisodeSettings()))
    two = keys_of(assign(TASKS, 2, shares(2, 1), "split", EpisodeSettings()))
    assert all({key for key in more if key[1] == 0} == fewer for fewer, more in zip(one, two, strict=True))


def test_all_teachers_may_do_every_episode():
    a, b = keys_of(assign(TASKS, 2, shares(3, 1), "all", EpisodeSettings()))
    assert a == b and len(a) == 4000


def test_progress_of_several_teachers_is_summed():
    one = CollectProgress(total=5, found=1, recorded=2, elapsed_s=4.0, by_kind={"k": (2, 1)}, failures={"engine": 1})
    one.workers = {"w0-a": WorkerState(running=3, limit=8)}
    two = CollectProgress(total=7, recorded=3, elapsed_s=3.0, by_kind={"k": (3, 3)}, stopped="the spend cap")
    two.workers = {"w0-b": WorkerState(running=1, limit=8)}
    whole = summed([one, two])
    assert (whole.total, whole.finished, whole.elapsed_s, whole.by_kind) == (12, 6, 4.0, {"k": (5, 4)})
    assert (whole.failures, whole.stopped, len(whole.workers)) == ({"engine": 1}, "the spend cap", 2)
