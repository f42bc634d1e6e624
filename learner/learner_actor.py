"""The ranks of a `Learner` as Ray actors: `LearnerGroup` starts them together, watches them and hands back the result.

A rank consumes what its `Learner` consumes (rank 0: the source; the others: rank 0's orders). Ranks wait for one
another at most `collective_timeout_s`; when one dies the group kills the rest and raises `LearnerError`, so nothing
waits for ever.

Example::

    group = LearnerGroup.start(config, source)       # `source` is pickled to rank 0; keep handles, not data, in it
    group.run()
    while not group.finished(timeout_s=1.0):
        print(group.progress().loss)
    final = group.result(timeout_s=10.0)
    group.shutdown()
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from learner.base import LearnerError, Progress, TrajectorySource
from learner.config import LearnerConfig


class RankActor:
    """One rank; `run` blocks in one thread while `progress` and `stop` are answered by others."""

    def __init__(self) -> None:
        self._learner: Any = None

    def address(self) -> tuple[str, int]:
        """This actor's host and a TCP port that is free there."""
        import ray

        from learner.deepspeed_backend import free_port

        return ray.util.get_node_ip_address(), free_port()

    def prepare(
        self,
        config: LearnerConfig,
        source: TrajectorySource | None,
        rank: int,
        world_size: int,
        master: tuple[str, int],
    ) -> None:
        """Make the learner; raises what its constructor raises."""
        import os

        from learner.trainer import Learner

        os.environ.update(MASTER_ADDR=master[0], MASTER_PORT=str(master[1]), OMP_NUM_THREADS=str(config.threads))
        self._learner = Learner(config, source, rank=rank, world_size=world_size)

    def run(self) -> Progress:
        return self._learner.run()

    def progress(self) -> Progress:
        return self._learner.progress() if self._learner is not None else Progress()

    def stop(self) -> None:
        if self._learner is not None:
            self._learner.stop()


class LearnerGroup:
    """All ranks. Make one with `start`; end it with `shutdown`."""

    def __init__(self, actors: list[Any], placement: Any) -> None:
        self._actors = actors
        self._placement = placement
        self._refs: list[Any] = []

    @classmethod
    def start(
        cls,
        config: LearnerConfig,
        source: TrajectorySource,
        *,
        cpus_per_rank: float = 1.0,
        gpus_per_rank: float = 0.0,
        env_vars: Mapping[str, str] | None = None,
        timeout_s: float = 120.0,
    ) -> LearnerGroup:
        """Start `config.ranks` actors, all or none. Raises `LearnerError` when the cluster has no room for them in
        time."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": cpus_per_rank, **({"GPU": gpus_per_rank} if gpus_per_rank else {})}
        placement = placement_group([bundle] * config.ranks, strategy="PACK")
        begun = time.monotonic()
        if not placement.wait(timeout_s):
            remove_placement_group(placement)
            raise LearnerError(
                f"the cluster has no room for {config.ranks} ranks of {bundle} within {timeout_s} s; "
                f"it has {ray.cluster_resources()}"
            )
        variables = {
            "OMP_NUM_THREADS": str(config.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "DS_LOG_LEVEL": "error",
            **({} if gpus_per_rank else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}),
            **(env_vars or {}),
        }
        actor = ray.remote(RankActor)
        actors = [
            actor.options(
                num_cpus=cpus_per_rank,
                num_gpus=gpus_per_rank,
                max_concurrency=4,
                runtime_env={"env_vars": variables},
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=i),
            ).remote()
            for i in range(config.ranks)
        ]
        group = cls(actors, placement)
        try:
            left_s = max(1.0, timeout_s - (time.monotonic() - begun))
            master = ray.get(actors[0].address.remote(), timeout=left_s)
            ray.get(
                [
                    one.prepare.remote(config, source if i == 0 else None, i, config.ranks, master)
                    for i, one in enumerate(actors)
                ],
                timeout=left_s,
            )
        except BaseException:
            group.shutdown()
            raise
        return group

    def run(self) -> list[Any]:
        """Let every rank train. Returns one ref per rank at once; `result` waits for them."""
        if not self._refs:
            self._refs = [actor.run.remote() for actor in self._actors]
        return list(self._refs)

    def progress(self, timeout_s: float = 10.0) -> Progress:
        """Rank 0's snapshot. Raises `LearnerError` when it is dead or silent."""
        import ray
        import ray.exceptions

        try:
            return ray.get(self._actors[0].progress.remote(), timeout=timeout_s)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise LearnerError(f"rank 0 of the learner does not answer: {error}") from error

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ask for an end after the present step, with checkpoint and export; `result` then returns."""
        import ray

        ray.get([actor.stop.remote() for actor in self._actors], timeout=timeout_s)

    def finished(self, timeout_s: float = 0.0) -> bool:
        """Whether all ranks have ended well. Raises `LearnerError` as soon as one has failed or died."""
        import ray

        if not self._refs:
            raise LearnerError("the learner was not told to run; call run() first")
        deadline = time.monotonic() + timeout_s
        waiting = list(self._refs)
        while waiting:
            left_s = max(0.0, deadline - time.monotonic())
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=left_s)
            for ref in ready:
                try:
                    ray.get(ref)
                except Exception as error:
                    rank = self._refs.index(ref)
                    self._kill()
                    raise LearnerError(f"rank {rank} of the learner failed: {error}") from error
            if not ready:
                return False
        return True

    def result(self, timeout_s: float) -> Progress:
        """Wait for the end. Raises `LearnerError` when a rank failed or died, or when `timeout_s` is over."""
        import ray

        if not self.finished(timeout_s):
            raise LearnerError(f"the learner is not done after {timeout_s} s: {self.progress()}")
        return ray.get(self._refs[0])

    def shutdown(self) -> None:
        """End the actors and free their place; may be called twice."""
        from ray.util.placement_group import remove_placement_group

        self._kill()
        if self._placement is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._placement)
            self._placement = None

    def _kill(self) -> None:
        import ray

        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
