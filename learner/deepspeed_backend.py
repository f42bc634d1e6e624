"""The engine under the learner: DeepSpeed, and the only file that imports it.

`DeepSpeedBackend` is one rank: it builds the student and its engine (ZeRO stage 0 to 3, fp32 / bf16 products / bf16,
offload), runs micro-batches, steps, saves and loads checkpoints, and gathers weights. It knows nothing of trajectories
or schedules. What works together is in `learner.engine_settings`.

Example::

    backend = DeepSpeedBackend(config, rank=0, world_size=1)
    logits = backend.forward(micro_batch)           # [n, vocabulary] at the trained positions
    backend.backward(loss, last=True)
    outcome = backend.step(lr_factor=1.0)           # StepOutcome: skipped where the gradient was not finite
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.base import LearnerError
from learner.checkpoints import CheckpointFolder
from learner.config import LearnerConfig
from learner.engine_settings import engine_settings, refuse_what_does_not_work
from learner.gradient_guard import StepOutcome
from learner.out_of_memory import explained
from learner.rank_group import RankGroup
from learner.saved_state import facts_of, restore, tensors_of

if TYPE_CHECKING:
    import torch

    from learner.ema import Average
    from learner.packing import MicroBatch
    from learner.side_parameters import SideParameters

logger = logging.getLogger(__name__)


class DeepSpeedBackend:
    """One rank's engine.

    Raises `ConfigError` (settings), `LearnerError` (checkpoints of another run, no memory), OSError (no model).
    """

    def __init__(self, config: LearnerConfig, *, rank: int, world_size: int) -> None:
        from learner.ema import Average
        from learner.student_module import load_student, student_module
        from learner.trained_state import trained_state

        refuse_what_does_not_work(config)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        torch = _start_torch(config)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self._torch = torch
        _start_distributed(config, rank, world_size)
        self._ranks = RankGroup(rank=rank, world_size=world_size, timeout_s=config.collective_timeout_s)
        self.batching = config.batching
        if self.batching == "auto":
            self.batching = "packed" if self.device.type == "cuda" else "bucketed"
        with explained(config, "loading the student", world_size=world_size):
            self.model = load_student(config, device=self.device, batching=self.batching)
            self.student = student_module(self.model, config, self.device)
            self.engine = self._start_engine()
            self.state = trained_state(self.engine, self.student, zero_stage=config.zero_stage)
            self.average: Average | None = None
            if config.ema is not None:
                self.average = Average(self.state, decay=config.ema.decay)
        self._side: SideParameters | None = None

    # -- a step

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Logits [n, vocabulary] at the micro-batch's selected positions."""
        positions = None if batch.position_ids is None else self.to_device(batch.position_ids)
        with self._explained(f"the forward pass of {batch.input_ids.size} tokens, padding included"):
            return self.engine(self.to_device(batch.input_ids), positions, self.to_device(batch.selected))

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add to the gradient. `loss` is this rank's share of the step's loss; `last` when the step's last
        micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        # Ranks are averaged by the engine; the loss is a sum over all of them.
        with self._explained("the backward pass"), self._eager_muon():
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> StepOutcome:
        """Clip, update the weights, clear the gradient. A gradient that is not finite on some rank changes nothing on
        any, and is told as skipped."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        with self._explained("the optimizer's step"):
            outcome = self._step_whole() if self.config.zero_stage == 0 else self._step_sharded()
        if self._side is not None and outcome.skipped:
            self._side.clear()
        elif self._side is not None:
            self._side.step(lr_factor=lr_factor, sum_over_ranks=self.sum_over_ranks, world_size=self.world_size)
        if self.average is not None and not outcome.skipped:
            self.average.update()
        return outcome

    def train_also(self, parameters: Iterable[torch.Tensor]) -> None:
        """Step on an objective's own parameters (leaves on any device, the same on every rank) as well. Once, before
        `load_checkpoint`."""
        from learner.side_parameters import SideParameters

        parameters = list(parameters)
        self._side = SideParameters(parameters, lr=self.config.lr) if parameters else None

    def _step_whole(self) -> StepOutcome:
        """ZeRO 0: ranks hold the same gradients, so they decide alike."""
        limit = self.config.gradient_clipping or math.inf
        norm = float(self._torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit))
        if not math.isfinite(norm):
            self.student.zero_grad(set_to_none=True)
            return StepOutcome(norm, skipped=True)
        self.engine.step()
        return StepOutcome(norm)

    def _step_sharded(self) -> StepOutcome:
        """ZeRO 1 to 3: the engine looks at the gradient over all ranks, and skips."""
        zero, muon = self.engine.optimizer, self.config.optimizer == "muon"
        if self.config.zero_stage == 3 and muon and zero.has_overflow():
            # The engine would look at the update, when Muon's momentum has taken the gradient in.
            zero._pre_step()
            zero._partition_all_parameters()
            zero._overflow_clean_up(1.0)
            return StepOutcome(math.inf, skipped=True)
        with self._eager_muon():
            self.engine.step()
        if zero.overflow:
            return StepOutcome(math.inf, skipped=True)
        return StepOutcome(0.0 if muon else float(self.engine.get_global_grad_norm() or 0.0))

    def _explained(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return explained(self.config, doing, world_size=self.world_size)

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """Within it: no gradient, no dropout."""
        return _evaluating(self.engine, self._torch)

    def to_device(self, array: Any) -> torch.Tensor:
        return self._torch.from_numpy(array).to(self.device)

    def seed(self, seed: int) -> None:
        """Dropout's randomness for the next step; differs between ranks."""
        self._torch.manual_seed(seed * 1009 + self.rank)

    # -- rank 0 tells the others

    def scatter(self, objects: list[Any] | None) -> Any:
        """Each rank gets its own of rank 0's `objects` ([world_size]); the others pass None. Raises `LearnerError`."""
        return self._ranks.scatter(objects)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Element by element, in fp64. Raises `LearnerError`."""
        return self._ranks.sum(values)

    # -- checkpoints and weights: every rank calls these together

    def save_checkpoint(self, folder: Path, step: int, state: dict[str, Any] | None) -> None:
        """Write `folder/step-<n>` whole or not at all, remove the oldest beyond those kept. `state`: the trainer's, on
        rank 0."""
        store = CheckpointFolder(folder, keep=self.config.keep_checkpoints)
        name = f"step-{step:07d}"
        if self.rank == 0:
            store.begin(name)
        self._ranks.wait()
        tensors = tensors_of(self.state, self.average, rank=self.rank, world_size=self.world_size)
        store.write_part(name, self.rank, tensors, facts=self._facts() if self.rank == 0 else {})
        self._ranks.wait()
        if self.rank == 0:
            store.finish(name, {"trainer": state or {}, "settings": self._settings(), "written_by": self._written_by()})
        self._ranks.wait()

    def load_checkpoint(self, folder: Path) -> dict[str, Any] | None:
        """Load the newest that is whole, written by any number of ranks and any ZeRO stage, and return the trainer's
        state; None when there is none. Damaged ones are told of and set aside. Raises `LearnerError`."""
        store = CheckpointFolder(folder, keep=self.config.keep_checkpoints)
        names = self.scatter([store.names()] * self.world_size if self.rank == 0 else None) or []
        for name in names:
            damage = store.damage(name, rank=self.rank, world_size=self.world_size)
            if self.sum_over_ranks([float(damage is not None)])[0] == 0:
                return self._load(store, name)
            if damage is not None:
                logger.warning("checkpoint %s is damaged (%s); going back to the one before", folder / name, damage)
            self._ranks.wait()
            if self.rank == 0:
                store.set_aside(name)
        if names:
            raise LearnerError(
                f"every checkpoint in {folder} is damaged ({', '.join(names)}; they are renamed damaged-...); start "
                "again to begin anew"
            )
        return None

    def _load(self, store: CheckpointFolder, name: str) -> dict[str, Any]:
        saved = store.state(name)
        if saved["settings"] != self._settings():
            raise LearnerError(
                f"checkpoint {store.folder / name} was written with {saved['settings']}, this run has "
                f"{self._settings()}; resume with the same settings, or start anew in another output_dir"
            )
        if self.rank == 0 and saved["written_by"] != self._written_by():
            logger.warning("resuming with %s what was written by %s", self._written_by(), saved["written_by"])
        facts = store.facts(name)[0]
        try:
            restore(self.state, self.average, store.open(name), facts, self.device)
            if self._side is not None:
                self._side.restore(facts["side"])
        except ValueError as error:
            raise LearnerError(f"checkpoint {store.folder / name} is of another model: {error}") from error
        return saved["trainer"]

    def _facts(self) -> dict[str, Any]:
        return {**facts_of(self.state, self.average), "side": [] if self._side is None else self._side.state()}

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Name -> whole tensor on the CPU, with LoRA merged, as the plain model names them, averaged where the average
        is what is exported; None on ranks other than 0."""
        weights = self._gathered()
        if weights is None:
            return None
        if self.config.lora is not None:
            from learner.adapters import merged_weights

            weights = merged_weights(self.config, weights)
        if self.model_config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return {name: value.contiguous() for name, value in weights.items()}

    def export(self, folder: Path, *, facts: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> None:
        """Write the student (or its adapters, as `lora.export` says) to `folder`, from rank 0. `facts`, `data`: for the
        card, what is said of the training and of what it was trained on."""
        from learner.export import export_adapter, export_student

        lora = self.config.lora
        if lora is None or lora.export == "merged":
            weights = self.full_weights()
            if weights is not None:
                export_student(folder, weights=weights, config=self.config, facts=facts, data=data)
            return
        adapters = self._gathered()
        if adapters is None:
            return
        if lora.export == "adapter":
            export_adapter(folder, adapters=adapters, config=self.config, facts=facts, data=data)
            return
        from learner.adapters import merged_weights

        weights = merged_weights(self.config, adapters)
        if self.model_config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        export_student(folder, weights=weights, config=self.config, facts=facts, data=data, adapters=adapters)

    def _gathered(self) -> dict[str, torch.Tensor] | None:
        """Rank 0: the model's whole weights on the CPU, of LoRA the adapters alone, as the trained model names them."""
        adapters_alone = self.config.lora is not None
        with self.as_exported():
            if self.config.zero_stage == 3:
                weights = self.engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapters_alone)
            else:
                weights = self.student.state_dict()
            if self.rank != 0:
                return None
            trained = set(self.state.names())
            return {
                name.removeprefix("model."): value.detach().to("cpu", copy=True)
                for name, value in weights.items()
                if not adapters_alone or name in trained
            }

    @contextlib.contextmanager
    def as_exported(self) -> Iterator[None]:
        """The average in the model's place, where it is what is exported."""
        if self.average is None or self.config.ema is None or not self.config.ema.export:
            yield
            return
        with self._torch.no_grad():
            try:
                with self.average.in_place():
                    self.state.show()
                    yield
            finally:
                self.state.show()

    def close(self) -> None:
        """Leave the other ranks; may be called twice. A rank of its own stays, as DeepSpeed cannot start twice."""
        if self.world_size > 1 and self._torch.distributed.is_initialized():
            self._torch.distributed.destroy_process_group()

    # -- how it is built

    @property
    def model_config(self) -> Any:
        return self.model.config

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the checkpoint."""
        c = self.config
        lora = None if c.lora is None else [c.lora.rank, c.lora.alpha, c.lora.target]
        return {"precision": c.precision, "optimizer": c.optimizer, "objective": c.objective, "lora": lora}

    def _written_by(self) -> dict[str, int]:
        return {"ranks": self.world_size, "zero_stage": self.config.zero_stage}

    def _eager_muon(self) -> contextlib.AbstractContextManager[Any]:
        """DeepSpeed compiles Muon's kernels, and runs them in `backward` or in `step`, depending on the stage.

        On a CPU that takes a C++ compiler and a minute for nothing.
        """
        if self.config.zero_stage > 0 and self.config.optimizer == "muon" and self.device.type == "cpu":
            return self._torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()

    def _start_engine(self) -> Any:
        import deepspeed

        from learner.optimizers import MuonAdamW, parameter_groups, rescale_for_unit_muon

        config = self.config
        groups = parameter_groups(self.model, config)
        if config.zero_stage == 0:
            optimizer: Any = MuonAdamW(groups)
        elif config.optimizer == "adamw":
            optimizer = self._torch.optim.AdamW(groups, fused=True)  # a flat tensor: no temporaries
        else:
            from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

            for group in groups:
                for parameter in group["params"]:
                    parameter.use_muon = group["use_muon"]
            groups = [rescale_for_unit_muon(group) if group["use_muon"] else group for group in groups]
            optimizer = MuonWithAuxAdam(
                [{**group, "ns_method": "standard"} if group["use_muon"] else group for group in groups]
            )
        settings = engine_settings(config)
        engine, *_ = deepspeed.initialize(model=self.student, optimizer=optimizer, config=settings)
        return engine


def _start_torch(config: LearnerConfig) -> Any:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls names that torch 2.13 has renamed: nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return torch


def _start_distributed(config: LearnerConfig, rank: int, world_size: int) -> None:
    """Join the process group. MASTER_ADDR and MASTER_PORT must be set when there is more than one rank."""
    import torch

    if world_size == 1 and not torch.distributed.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if not torch.cuda.is_available():
        # No compiled operator is used; else DeepSpeed probes the compiler for each (with linker errors on the terminal)
        # and the first collective builds a C++ kernel for a minute.
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010  (no attribute until it is set)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, verbose=False, timeout=timedelta(seconds=config.collective_timeout_s)
    )


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _evaluating(engine: Any, torch: Any) -> Any:
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()
