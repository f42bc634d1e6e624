"""The ranks of a `Learner` as Ray actors: `LearnerGroup` starts them together, watches them and hands back the result.

A rank consumes what its `Learner` consumes (rank 0: the source; the others: rank 0's orders). Ranks wait for one
another at most `collective_timeout_s`. When a rank dies (killed, out of memory, its node lost) the group ends the
others and starts all of them again, at most `restarts` times: they go on from the last checkpoint, with the source's
trajectories from the beginning, and take the very steps that they would have taken. What a rank raises itself is no
death: it would raise it again, so the group ends and raises `LearnerError`.

The source is pickled to rank 0 at every start, as it was given: it must be one that brings everything again, such as a
ledger and then a queue. Whoever started the group is its head: with it the actors end, and a new job resumes.

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
import dataclasses
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.base import FolderKeeper, LearnerError, Progress, RankLostError, TrajectorySource
from learner.config import LearnerConfig

if TYPE_CHECKING:
    from learner.examples import Scorer
    from learner.publish import WeightPublisher

DEATH_NOTICE_S = 15.0
"""How long after one rank's failure the group waits to hear what became of the others: which of them died."""

DEATH_AGAIN_S = 2.0
"""After a rank has died while it was started: Ray may need some time to know that a node is lost."""


class RankActor:
    """One rank; `run` blocks in one thread while `progress`, `report_score` and `stop` are answered by others."""

    def __init__(self) -> None:
        self._learner: Any = None
        self._keeper: FolderKeeper | None = None
        self._attempt = ""

    def address(self) -> tuple[str, int]:
        """This actor's host and a TCP port that is free there."""
        import ray

        from learner.deepspeed_backend import free_port

        return ray.util.get_node_ip_address(), free_port()

    def process_id(self) -> int:
        import os

        return os.getpid()

    def prepare(
        self,
        config: LearnerConfig,
        source: TrajectorySource | None,
        rank: int,
        world_size: int,
        master: tuple[str, int],
        scorer: Scorer | None = None,
        publisher: WeightPublisher | None = None,
        keeper: FolderKeeper | None = None,
    ) -> None:
        """Make the learner; raises what its constructor raises."""
        import os

        from learner.trainer import Learner

        os.environ.update(MASTER_ADDR=master[0], MASTER_PORT=str(master[1]), OMP_NUM_THREADS=str(config.threads))
        self._learner = Learner(config, source, rank=rank, world_size=world_size, scorer=scorer, publisher=publisher)
        self._keeper, self._attempt = keeper, f"{master[0]}-{master[1]}"

    def run(self) -> Progress:
        if self._keeper is None:
            return self._learner.run()
        learner = self._learner
        with self._keeper.kept(Path(learner.config.output_dir), rank=learner.rank, attempt=self._attempt):
            return learner.run()

    def progress(self) -> Progress:
        """Raises what the keeper of the folder raises."""
        if self._keeper is not None:
            self._keeper.check()
        return self._learner.progress() if self._learner is not None else Progress()

    def report_score(self, step: int, score: float) -> None:
        if self._learner is not None:
            self._learner.report_score(step, score)

    def save_soon(self) -> None:
        if self._learner is not None:
            self._learner.save_soon()

    def stop(self) -> None:
        if self._learner is not None:
            self._learner.stop()


class LearnerGroup:
    """All ranks. Make one with `start`; end it with `shutdown`."""

    def __init__(
        self,
        config: LearnerConfig,
        source: TrajectorySource,
        placement: Any,
        *,
        actor_options: Mapping[str, Any],
        scorer: Scorer | None,
        publisher: WeightPublisher | None,
        keeper: FolderKeeper | None,
        timeout_s: float,
    ) -> None:
        self._config = config
        self._source = source
        self._scorer = scorer
        self._publisher = publisher
        self._keeper = keeper
        self._placement = placement
        self._actor_options = dict(actor_options)
        self._timeout_s = timeout_s
        self._actors: list[Any] = []
        self._refs: list[Any] = []
        self._last = Progress()
        self._heard_at_s = time.monotonic()
        self._stopping = False
        self._failed: LearnerError | None = None
        self._restarting: threading.Thread | None = None
        self._warned: set[str] = set()
        """Nodes that are to go, and for which a checkpoint was asked for."""
        self.restarts = 0
        """How many times the ranks were started again."""

    @classmethod
    def start(
        cls,
        config: LearnerConfig,
        source: TrajectorySource,
        *,
        cpus_per_rank: float = 1.0,
        gpus_per_rank: float = 0.0,
        resources: Mapping[str, float] | None = None,
        placement: Any = None,
        env_vars: Mapping[str, str] | None = None,
        scorer: Scorer | None = None,
        publisher: WeightPublisher | None = None,
        keeper: FolderKeeper | None = None,
        timeout_s: float = 120.0,
    ) -> LearnerGroup:
        """Start `config.ranks` actors, all or none; `scorer` and `publisher` are pickled to rank 0 like the source,
        `keeper` to every rank.
        Raises `LearnerError` when the cluster has no room for them in time.

        `resources`: custom ones of each rank. `placement`: a placement group with a bundle for each rank, which is
        theirs from now on; else they make one."""
        import ray.exceptions

        begun = time.monotonic()
        if placement is None:
            bundle = {"CPU": cpus_per_rank, **({"GPU": gpus_per_rank} if gpus_per_rank else {}), **(resources or {})}
            placement = _place(bundle, config.ranks, timeout_s)
        variables = {
            "OMP_NUM_THREADS": str(config.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "DS_LOG_LEVEL": "error",
            **({} if gpus_per_rank else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}),
            **(env_vars or {}),
        }
        options = {
            "num_cpus": cpus_per_rank,
            "num_gpus": gpus_per_rank,
            "resources": dict(resources or {}),
            "max_concurrency": 4,
            "runtime_env": {"env_vars": variables},
        }
        group = cls(
            config,
            source,
            placement,
            actor_options=options,
            scorer=scorer,
            publisher=publisher,
            keeper=keeper,
            timeout_s=timeout_s,
        )
        try:
            group._start_surviving(max(1.0, timeout_s - (time.monotonic() - begun)))
        except BaseException as error:
            group.shutdown()
            if isinstance(error, ray.exceptions.RayActorError):
                raise LearnerError(f"a rank of the learner died while it was started: {error}") from error
            if isinstance(error, ray.exceptions.GetTimeoutError):
                raise LearnerError(f"the learner's ranks did not start within {timeout_s:g} s") from error
            raise
        return group

    def run(self) -> list[Any]:
        """Let every rank train. Returns one ref per rank at once; `result` waits for them."""
        if not self._refs:
            self._refs = [actor.run.remote() for actor in self._actors]
        return list(self._refs)

    def progress(self, timeout_s: float = 10.0) -> Progress:
        """Rank 0's snapshot; the last one while ranks are started again, or when rank 0 is too busy to answer. Raises
        `LearnerError` when it has been silent for `collective_timeout_s`, or is dead for good."""
        import ray
        import ray.exceptions

        if self._failed is not None:
            raise LearnerError(f"rank 0 of the learner does not answer: {self._failed}") from self._failed
        if self._restarting is None:
            try:
                last: Any = ray.get(self._actors[0].progress.remote(), timeout=timeout_s)
                self._last, self._heard_at_s = last, time.monotonic()
            except (ray.exceptions.RayError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    patient = time.monotonic() - self._heard_at_s < self._config.collective_timeout_s
                else:  # `finished` starts the dead again
                    dead = isinstance(error, ray.exceptions.RayActorError)
                    patient = dead and bool(self._refs) and self.restarts < self._config.restarts
                if not patient:
                    raise LearnerError(f"rank 0 of the learner does not answer: {error}") from error
        return dataclasses.replace(self._last, restarts=self.restarts)

    def process_ids(self, timeout_s: float = 10.0) -> list[int]:
        """Of each rank, on its own machine."""
        import ray

        return ray.get([actor.process_id.remote() for actor in self._actors], timeout=timeout_s)

    def report_score(self, step: int, score: float) -> None:
        """The score of the student in `progress().candidates[step]`; see `learner.model_selection`. One that is lost
        with a dying rank is asked for again, as the student is handed out again."""
        self._actors[0].report_score.remote(step, score)

    def prepare_for_loss(self, nodes: Iterable[str]) -> bool:
        """Those (Ray's ids) are to go: when a rank is on one of them, a checkpoint is asked for, once for each, so that
        all ranks go on from there when it is lost. Returns whether that was so."""
        from ray.util.placement_group import placement_group_table

        new = set(nodes) - self._warned
        if not new or self._restarting is not None or self._placement is None:
            return False
        self._warned |= new
        with contextlib.suppress(Exception):  # the head is busy: then the last checkpoint has to do
            if new & set(placement_group_table(self._placement)["bundles_to_node_id"].values()):
                self._actors[0].save_soon.remote()
                return True
        return False

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ask for an end after the present step, with checkpoint and export; `result` then returns."""
        import ray

        self._stopping = True
        if self._restarting is None:
            ray.get([actor.stop.remote() for actor in self._actors], timeout=timeout_s)

    def finished(self, timeout_s: float = 0.0) -> bool:
        """Whether all ranks have ended well. Starts dead ranks again, in the background. Raises `LearnerError` as soon
        as a rank has failed, or died once too often."""
        import ray

        if not self._refs:
            raise LearnerError("the learner was not told to run; call run() first")
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            if self._restarting is not None:
                self._restarting.join(left_s)
                if self._restarting.is_alive():
                    return False
                self._restarting = None
            if self._failed is not None:
                raise self._failed
            left_s = max(0.0, deadline - time.monotonic())
            ready, waiting = ray.wait(self._refs, num_returns=len(self._refs), timeout=0.0)
            if waiting and not any(_error_of(ref) for ref in ready):
                ready, _ = ray.wait(waiting, num_returns=1, timeout=left_s)
                if not ready:
                    return False
            if any(_error_of(ref) for ref in ready):
                self._after_failure()
            elif len(ready) == len(self._refs):
                return True

    def result(self, timeout_s: float) -> Progress:
        """Wait for the end. Raises `LearnerError` when a rank failed or died too often, or when `timeout_s` is over."""
        import ray

        if not self.finished(timeout_s):
            raise LearnerError(f"the learner is not done after {timeout_s} s: {self.progress()}")
        final: Any = ray.get(self._refs[0])
        return dataclasses.replace(final, restarts=self.restarts)

    def shutdown(self) -> None:
        """End the actors and free their place; may be called twice."""
        from ray.util.placement_group import remove_placement_group

        if self._failed is None:
            self._failed = LearnerError("the learner was shut down")
        self._kill()
        if self._placement is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._placement)  # ends actors that are being started in it, too
            self._placement = None
        if self._restarting is not None:
            self._restarting.join(DEATH_NOTICE_S)

    # -- starting, and starting again

    def _start_surviving(self, timeout_s: float) -> None:
        """Ranks of which one dies meanwhile (its node is lost just then) are started again, and count as restarts.
        Raises what a rank raises, Ray's error of the last death, `GetTimeoutError`."""
        import ray.exceptions

        while True:
            try:
                return self._start_ranks(timeout_s)
            except ray.exceptions.RayActorError:
                self._kill()
                if self._failed is not None or self.restarts >= self._config.restarts:
                    raise
                self.restarts += 1
                time.sleep(DEATH_AGAIN_S)

    def _start_ranks(self, timeout_s: float) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        config, placement = self._config, self._placement
        assert placement is not None
        actor = ray.remote(RankActor)
        self._actors = [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=i),
                **self._actor_options,
            ).remote()
            for i in range(config.ranks)
        ]
        deadline = time.monotonic() + timeout_s
        master = ray.get(self._actors[0].address.remote(), timeout=timeout_s)
        prepared = [
            one.prepare.remote(
                config,
                self._source if i == 0 else None,
                i,
                config.ranks,
                master,
                self._scorer if i == 0 else None,
                self._publisher if i == 0 else None,
                self._keeper,
            )
            for i, one in enumerate(self._actors)
        ]
        ray.get(prepared, timeout=max(1.0, deadline - time.monotonic()))

    def _after_failure(self) -> None:
        """Some rank failed: find out which one to blame, and begin again or fail for good."""
        import ray

        for wait_s in (0.0, DEATH_NOTICE_S):  # a rank may only have felt what became of another
            ready, _ = ray.wait(self._refs, num_returns=len(self._refs), timeout=wait_s)
            errors = {self._refs.index(ref): error for ref in ready if (error := _error_of(ref)) is not None}
            rank, error, died = to_blame(errors)
            if not isinstance(error, RankLostError) and (died or isinstance(error, LearnerError)):
                break
        self._kill()
        if died and self.restarts < self._config.restarts:
            self.restarts += 1
            self._restarting = threading.Thread(target=self._restart, name="learner-restart", daemon=True)
            self._restarting.start()
            return
        again = f" (and was started again {self.restarts} times before)" if self.restarts else ""
        self._failed = LearnerError(f"rank {rank} of the learner failed{again}: {error}")
        self._failed.__cause__ = error

    def _restart(self) -> None:
        """Until all ranks run. One that dies while it is started (its node is lost just then) counts as another
        restart."""
        import ray
        import ray.exceptions

        try:
            # The old ranks must be gone: they write into the same folder.
            ray.wait(self._refs, num_returns=len(self._refs), timeout=DEATH_NOTICE_S)
            self._start_surviving(self._timeout_s)
            self._refs = [actor.run.remote() for actor in self._actors]
            if self._stopping:
                with contextlib.suppress(ray.exceptions.RayActorError):  # `finished` sees it and starts them again
                    self.stop()
        except Exception as error:
            self._kill()
            placeless = _placeless(self._placement) if isinstance(error, TimeoutError) else 0
            missing = f" ({placeless} of {self._config.ranks} have no node to be on)" if placeless else ""
            self._failed = LearnerError(f"the learner's ranks could not be started again{missing}: {error}")
            self._failed.__cause__ = error

    def _kill(self) -> None:
        import ray

        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)


def _place(bundle: dict[str, float], ranks: int, timeout_s: float) -> Any:
    """A placement group of that many bundles. Raises `LearnerError`."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    placement = placement_group([bundle] * ranks, strategy="PACK")
    if not placement.wait(timeout_s):
        remove_placement_group(placement)
        raise LearnerError(
            f"the cluster has no room for {ranks} ranks of {bundle} within {timeout_s} s; it has "
            f"{ray.cluster_resources()}"
        )
    return placement


def _placeless(placement: Any) -> int:
    """How many of its bundles have lost their node and found no other."""
    import ray
    from ray.util.placement_group import placement_group_table

    with contextlib.suppress(Exception):  # the cluster may be gone
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sum(node not in alive for node in placement_group_table(placement)["bundles_to_node_id"].values())
    return 0


def to_blame(errors: Mapping[int, Exception]) -> tuple[int, Exception, bool]:
    """(rank, its error, whether it died) of the failure that caused the others.

    A rank that died comes first, then one that raised something of its own; one that only lost the others is blamed
    when there is nobody else, and taken for a death: somewhere there is a rank that hangs.
    """
    from ray.exceptions import RayTaskError

    died = {rank: error for rank, error in errors.items() if not isinstance(error, RayTaskError)}
    raised = {rank: error for rank, error in errors.items() if not isinstance(error, RankLostError)}
    rank = min(died or raised or errors)
    return rank, errors[rank], rank in died or not raised


def _error_of(ref: Any) -> Exception | None:
    """Of a call that has ended."""
    import ray

    try:
        ray.get(ref)
    except Exception as error:
        return error
    return None
