"""`rollout.trajectory_queue`: bounded, in order, nothing dropped, nothing lost with a producer."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest

from envs.base import Task
from rollout.records import from_table, to_table
from rollout.trajectory import Trajectory
from rollout.trajectory_queue import QueueError, QueueFullError, TrajectoryBuffer, TrajectoryQueue


def batch(*keys: str) -> list[Trajectory]:
    return [
        Trajectory(
            key=key,
            task=Task(id=key, question="?", answer="!", kind="math"),
            dialect="code",
            system_prompt="",
            steps=(),
            policy="teacher",
        )
        for key in keys
    ]


def keys(taken: list[tuple[Any, int, int]] | None) -> list[str]:
    assert taken is not None
    return [row.key for table, start, stop in taken for row in from_table(table)[start:stop]]


# -- the buffer: asyncio alone


def test_rows_come_out_in_order_and_across_tables() -> None:
    async def scenario() -> None:
        buffer = TrajectoryBuffer(10)
        await buffer.put(to_table(batch("a", "b", "c")))
        await buffer.put(to_table(batch("d")))
        assert keys(await buffer.get(2, 1)) == ["a", "b"]
        assert keys(await buffer.get(10, 1)) == ["c", "d"]

    asyncio.run(scenario())


def test_a_full_buffer_holds_producers_back_and_never_exceeds_its_capacity() -> None:
    async def scenario() -> None:
        buffer = TrajectoryBuffer(4)
        deepest = 0

        async def produce(name: str) -> None:
            for i in range(20):
                assert await buffer.put(to_table(batch(f"{name}{i}", f"{name}{i}'")))

        producers = [asyncio.create_task(produce(name)) for name in "xyz"]
        got: list[str] = []
        while len(got) < 120:
            await asyncio.sleep(0)
            deepest = max(deepest, buffer.stats().depth)
            got += keys(await buffer.get(3, 5))
        await asyncio.gather(*producers)
        assert deepest == 4
        assert len(set(got)) == 120
        assert [key for key in got if key[0] == "x"] == [f"x{i}{mark}" for i in range(20) for mark in ("", "'")]
        assert buffer.stats().put_waits > 0

    asyncio.run(scenario())


def test_a_large_table_is_not_overtaken_for_ever_by_small_ones() -> None:
    async def scenario() -> None:
        buffer = TrajectoryBuffer(4)
        await buffer.put(to_table(batch("a", "b")))
        large = asyncio.create_task(buffer.put(to_table(batch("L1", "L2", "L3", "L4"))))
        await asyncio.sleep(0)
        small = asyncio.create_task(buffer.put(to_table(batch("s"))))
        await asyncio.sleep(0.01)
        assert buffer.stats().waiting_puts == 2
        assert keys(await buffer.get(2, 1)) == ["a", "b"]
        assert await large
        assert keys(await buffer.get(4, 1)) == ["L1", "L2", "L3", "L4"]
        assert await small

    asyncio.run(scenario())


def test_a_put_that_finds_no_room_in_time_says_so_and_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        buffer = TrajectoryBuffer(2)
        await buffer.put(to_table(batch("a", "b")))
        with pytest.raises(QueueFullError, match="2 of 2"):
            await buffer.put(to_table(batch("c")), timeout_s=0.05)
        assert keys(await buffer.get(9, 1)) == ["a", "b"]
        assert await buffer.get(9, 0.01) == []

    asyncio.run(scenario())


def test_close_refuses_waiting_and_later_puts_and_lets_consumers_drain() -> None:
    async def scenario() -> None:
        buffer = TrajectoryBuffer(1)
        await buffer.put(to_table(batch("a")))
        waiting = asyncio.create_task(buffer.put(to_table(batch("b"))))
        await asyncio.sleep(0.01)
        await buffer.close()
        assert await asyncio.wait_for(waiting, 1) is False
        assert await buffer.put(to_table(batch("c"))) is False
        assert keys(await buffer.get(5, 1)) == ["a"]
        assert await buffer.get(5, 1) is None
        assert buffer.stats().put == buffer.stats().got == 1

    asyncio.run(scenario())


def test_close_wakes_a_consumer_that_waits() -> None:
    async def scenario() -> None:
        buffer = TrajectoryBuffer(1)
        waiting = asyncio.create_task(buffer.get(1, 30))
        await asyncio.sleep(0.01)
        await buffer.close()
        assert await asyncio.wait_for(waiting, 1) is None

    asyncio.run(scenario())


def test_sizes_that_make_no_sense_are_refused_by_value() -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="capacity=0"):
            TrajectoryBuffer(0)
        with pytest.raises(ValueError, match="3 trajectories never fit a queue of capacity 2"):
            await TrajectoryBuffer(2).put(to_table(batch("a", "b", "c")))
        with pytest.raises(ValueError, match="not 0"):
            await TrajectoryBuffer(2).get(0, 1)

    asyncio.run(scenario())


# -- the queue: on Ray


@pytest.fixture
def queue(ray_cluster: Any) -> Iterator[TrajectoryQueue]:
    queue = TrajectoryQueue.create(capacity=8)
    yield queue
    queue.kill()


def test_trajectories_travel_whole_and_in_order(queue: TrajectoryQueue) -> None:
    rows = batch("a", "b", "c")
    assert queue.put(rows)
    assert queue.get(2, timeout_s=10) == rows[:2]
    assert queue.get(2, timeout_s=10) == rows[2:]
    assert queue.get(2, timeout_s=0.05) == []


def test_a_handle_travels_to_producers_and_consumers_in_other_processes(
    ray_cluster: Any, queue: TrajectoryQueue
) -> None:
    @ray_cluster.remote(num_cpus=0)
    def produce(handle: TrajectoryQueue, rows: list[Trajectory]) -> bool:
        return all([handle.put([row]) for row in rows])

    assert len(pickle.dumps(queue)) < 10_000
    producers = [produce.remote(queue, batch(*(f"{name}{i}" for i in range(20)))) for name in "xy"]
    got: list[str] = []
    while len(got) < 40 and (rows := queue.get(5, timeout_s=30)):
        got += [row.key for row in rows]
    assert ray_cluster.get(producers, timeout=30) == [True, True]
    assert sorted(got) == sorted(f"{name}{i}" for name in "xy" for i in range(20))
    assert queue.stats().depth == 0


def test_what_a_producer_put_outlives_it(ray_cluster: Any, queue: TrajectoryQueue) -> None:
    @ray_cluster.remote(num_cpus=0)
    class Producer:
        def put(self, handle: TrajectoryQueue, by_value: list[Trajectory], by_reference: list[Trajectory]) -> bool:
            return handle.put(by_value) and handle.put(ray_cluster.put(to_table(by_reference)))

    producer = Producer.remote()
    assert ray_cluster.get(producer.put.remote(queue, batch("by-value"), batch("by-reference")), timeout=30)
    ray_cluster.kill(producer)
    time.sleep(0.5)  # Ray notices a dead owner within this time
    assert [row.key for row in queue.get(5, timeout_s=10) or []] == ["by-value", "by-reference"]


def test_a_batch_larger_than_the_queue_goes_in_piece_by_piece(ray_cluster: Any, queue: TrajectoryQueue) -> None:
    rows = batch(*(str(i) for i in range(20)))

    async def scenario() -> list[Trajectory]:
        putting = asyncio.create_task(queue.aput(rows))
        got: list[Trajectory] = []
        while len(got) < 20:
            got += await queue.aget(64, timeout_s=10) or []
            assert (await queue.astats()).depth <= 8
        assert await putting
        return got

    assert asyncio.run(scenario()) == rows


def test_errors_of_the_buffer_reach_the_caller_as_they_are(queue: TrajectoryQueue) -> None:
    queue.put(batch(*"abcdefgh"))
    with pytest.raises(QueueFullError, match="8 of 8"):
        queue.put(batch("i"), timeout_s=0.05)
    with pytest.raises(QueueFullError, match="8 of 8"):
        asyncio.run(queue.aput(batch("i"), timeout_s=0.05))


def test_a_closed_queue_drains_and_then_says_that_it_ended(queue: TrajectoryQueue) -> None:
    queue.put(batch("a"))
    queue.close()
    assert queue.put(batch("b")) is False
    assert [row.key for row in queue.get(5, timeout_s=10) or []] == ["a"]
    assert queue.get(5, timeout_s=10) is None
    assert asyncio.run(queue.aget(5, timeout_s=10)) is None


def test_a_dead_queue_is_an_error_that_names_it_and_no_hang(ray_cluster: Any) -> None:
    queue = TrajectoryQueue.create(capacity=2)
    queue.stats()
    queue.kill()
    with pytest.raises(QueueError, match="trajectory queue is gone"):
        queue.get(1, timeout_s=1)
    with pytest.raises(QueueError, match="trajectory queue is gone"):
        asyncio.run(queue.aput(batch("a"), timeout_s=1))
