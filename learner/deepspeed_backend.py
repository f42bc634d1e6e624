"""The engine under the learner: DeepSpeed, and the only file that imports it.

`DeepSpeedBackend` is one rank: it builds the student and its engine (ZeRO stage 0 to 3, fp32 / bf16 products / bf16),
runs micro-batches, steps, saves and loads checkpoints, and gathers full weights. It knows nothing of trajectories or
schedules.

What works on CPU and GPU with DeepSpeed 0.19 (`refuse_what_does_not_work` says so before a model loads):

- ZeRO 0: fp32 and autocast, AdamW and Muon. Not bf16 weights: there is no fp32 master copy to step on.
- ZeRO 1, 2, 3: all precisions, AdamW and Muon. Muon under ZeRO is DeepSpeed's (torch's wants matrices; a shard is
  flat), and DeepSpeed measures and clips the norm of Muon's update instead of the gradient's: gradient_clipping must
  be 0 there.

Example::

    backend = DeepSpeedBackend(config, rank=0, world_size=1)
    logits = backend.forward(micro_batch)           # [n, vocabulary] at the trained positions
    backend.backward(loss, last=True); backend.step(lr_factor=1.0)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.base import LearnerError
from learner.config import ConfigError, LearnerConfig

if TYPE_CHECKING:
    import torch

    from learner.packing import MicroBatch

STATE_FILE = "learner_state.json"


def refuse_what_does_not_work(config: LearnerConfig) -> None:
    """Raises `ConfigError` for a combination that DeepSpeed would get wrong, naming what works."""
    if config.zero_stage == 0 and config.precision == "bf16":
        raise ConfigError(
            "precision is 'bf16' with zero_stage 0, which keeps no fp32 master weights; "
            "use precision 'autocast', or zero_stage 1, 2 or 3"
        )
    if config.zero_stage > 0 and config.optimizer == "muon" and config.gradient_clipping > 0:
        raise ConfigError(
            f"gradient_clipping is {config.gradient_clipping} with optimizer 'muon' and zero_stage "
            f"{config.zero_stage}, where DeepSpeed clips Muon's update instead of the gradient; set gradient_clipping "
            "to 0, zero_stage to 0, or optimizer to 'adamw'"
        )
    if config.batching == "packed" and config.compile:
        raise ConfigError("compile is true with batching 'packed'; use batching 'bucketed', or compile false")


class DeepSpeedBackend:
    """One rank's engine. Raises `ConfigError` (settings), `LearnerError` (checkpoints of another run), OSError (no
    model)."""

    def __init__(self, config: LearnerConfig, *, rank: int, world_size: int) -> None:
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
        self._group = torch.distributed.new_group(backend="gloo", timeout=_timeout(config)) if world_size > 1 else None
        self.batching = config.batching
        if self.batching == "auto":
            self.batching = "packed" if self.device.type == "cuda" else "bucketed"
        self.model = self._load_model()
        self.student = _student_module(self.model, config, self.device)
        self.engine = self._start_engine()

    # -- a step

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Logits [n, vocabulary] at the micro-batch's selected positions."""
        positions = None if batch.position_ids is None else self.to_device(batch.position_ids)
        return self.engine(self.to_device(batch.input_ids), positions, self.to_device(batch.selected))

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add to the gradient. `loss` is this rank's share of the step's loss; `last` when the step's last
        micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        # Ranks are averaged by the engine; the loss is a sum over all of them.
        with self._eager_muon():
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> float:
        """Clip, update the weights, clear the gradient. Returns the gradient's norm before clipping (0.0 if
        unknown)."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        norm = 0.0
        if self.config.zero_stage == 0:
            limit = self.config.gradient_clipping or float("inf")
            norm = float(self._torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit))
        with self._eager_muon():
            self.engine.step()
        if self.config.zero_stage > 0 and self.config.optimizer == "adamw":
            norm = float(self.engine.get_global_grad_norm() or 0.0)
        return norm

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
        if self.world_size == 1:
            return objects[0] if objects else None
        received: list[Any] = [None]
        try:
            self._torch.distributed.scatter_object_list(received, objects, src=0, group=self._group)
        except RuntimeError as error:
            raise LearnerError(f"rank {self.rank} lost another rank: {error}") from error
        return received[0]

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Element by element, in fp64. Raises `LearnerError`."""
        if self.world_size == 1:
            return values
        total = self._torch.tensor(values, dtype=self._torch.float64)
        try:
            self._torch.distributed.all_reduce(total, group=self._group)
        except RuntimeError as error:
            raise LearnerError(f"rank {self.rank} lost another rank: {error}") from error
        return total.tolist()

    # -- checkpoints and weights: every rank calls these together

    def save_checkpoint(self, folder: Path, step: int, state: dict[str, Any] | None) -> None:
        """Write `folder/step-<n>` whole or not at all, point `folder/latest` at it, remove the oldest beyond those
        kept."""
        tag = f"step-{step:07d}"
        partial = f".partial-{tag}"
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / partial, ignore_errors=True)
        self._barrier()
        self.engine.save_checkpoint(str(folder), tag=partial, save_latest=False, exclude_frozen_parameters=False)
        self._barrier()
        if self.rank == 0:
            (folder / partial / STATE_FILE).write_text(json.dumps({**(state or {}), "shape": self._shape()}))
            shutil.rmtree(folder / tag, ignore_errors=True)
            os.replace(folder / partial, folder / tag)
            (folder / ".latest").write_text(tag)
            os.replace(folder / ".latest", folder / "latest")
            kept = sorted(path for path in folder.glob("step-*") if path.is_dir())
            for old in kept[: -self.config.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)
        self._barrier()

    def load_checkpoint(self, folder: Path) -> dict[str, Any] | None:
        """Load what `folder/latest` points at and return its state; None when there is no checkpoint."""
        pointer = folder / "latest"
        if not pointer.is_file():
            return None
        tag = pointer.read_text().strip()
        state = json.loads((folder / tag / STATE_FILE).read_text())
        if state["shape"] != self._shape():
            raise LearnerError(
                f"checkpoint {folder / tag} was written with {state['shape']}, this run has {self._shape()}; "
                "resume with the same settings, or start anew in another output_dir"
            )
        path, _ = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise LearnerError(
                f"checkpoint {folder / tag} cannot be read; remove it and the file 'latest' to start anew"
            )
        return state

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Name -> whole tensor on the CPU, with LoRA merged, as the plain model names them; None on ranks other than
        0."""
        if self.config.zero_stage == 3:
            weights = self.engine._zero3_consolidated_16bit_state_dict()
        else:
            weights = self.student.state_dict()
        if self.rank != 0 or weights is None:
            return None
        prefix = "model."
        plain = {name.removeprefix(prefix): value.detach().to("cpu", copy=True) for name, value in weights.items()}
        if self.config.lora is not None:
            merged = _with_lora(_pretrained(self.config), self.config)
            missing, unexpected = merged.load_state_dict(plain, strict=False)
            if unexpected or any("lora_" in name for name in missing):
                raise LearnerError(f"cannot merge LoRA: missing {missing[:3]}, unexpected {unexpected[:3]}")
            plain = dict(merged.merge_and_unload().state_dict())
        if self.model_config.tie_word_embeddings:
            plain.pop("lm_head.weight", None)
        return {name: value.contiguous() for name, value in plain.items()}

    def close(self) -> None:
        """Leave the other ranks; may be called twice. A rank of its own stays, as DeepSpeed cannot start twice."""
        if self.world_size > 1 and self._torch.distributed.is_initialized():
            self._torch.distributed.destroy_process_group()

    # -- how it is built

    @property
    def model_config(self) -> Any:
        return self.model.config

    def _shape(self) -> dict[str, Any]:
        c = self.config
        lora = None if c.lora is None else [c.lora.rank, c.lora.alpha, c.lora.target]
        return {
            "ranks": self.world_size,
            "zero_stage": c.zero_stage,
            "precision": c.precision,
            "optimizer": c.optimizer,
            "objective": c.objective,
            "lora": lora,
        }

    def _barrier(self) -> None:
        self.sum_over_ranks([0.0])

    def _eager_muon(self) -> contextlib.AbstractContextManager[Any]:
        """DeepSpeed compiles Muon's kernels, and runs them in `backward` or in `step`, depending on the stage.

        On a CPU that takes a C++ compiler and a minute for nothing.
        """
        if self.config.zero_stage > 0 and self.config.optimizer == "muon" and self.device.type == "cpu":
            return self._torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()

    def _load_model(self) -> Any:
        config = self.config
        model = _pretrained(config)
        model.config.use_cache = False
        short_rows = config.precision != "fp32" and self.batching == "bucketed" and self.device.type == "cpu"
        if short_rows:
            from learner.attention import use_short_row_attention

            use_short_row_attention(model)
        _check_head(model, self._torch)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            if config.gradient_checkpointing:
                model.enable_input_require_grads()
            model = _with_lora(model, config)
        model.train()
        return model

    def _start_engine(self) -> Any:
        import deepspeed

        from learner.optimizers import MuonAdamW, parameter_groups, rescale_for_unit_muon

        config = self.config
        groups = parameter_groups(self.model, config)
        if config.zero_stage == 0:
            optimizer: Any = MuonAdamW(groups)
        elif config.optimizer == "adamw":
            optimizer = self._torch.optim.AdamW(groups)
        else:
            from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

            for group in groups:
                for parameter in group["params"]:
                    parameter.use_muon = group["use_muon"]
            groups = [rescale_for_unit_muon(group) if group["use_muon"] else group for group in groups]
            optimizer = MuonWithAuxAdam(
                [{**group, "ns_method": "standard"} if group["use_muon"] else group for group in groups]
            )
        zero: dict[str, Any] = {"stage": config.zero_stage}
        if config.zero_stage > 0 and config.optimizer == "muon":
            zero["reduce_scatter"] = False
        if config.zero_stage == 3:
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,  # more than one; the true number varies and is told by the boundary
            "gradient_clipping": config.gradient_clipping if config.zero_stage > 0 else 0.0,
            "steps_per_print": 10**9,
            "zero_optimization": zero,
            "bf16": {"enabled": config.precision == "bf16"},
            "zero_allow_untested_optimizer": True,
        }
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


def _timeout(config: LearnerConfig) -> Any:
    from datetime import timedelta

    return timedelta(seconds=config.collective_timeout_s)


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
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=_timeout(config))


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _pretrained(config: LearnerConfig) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(config.model_path, dtype=torch.float32, attn_implementation="sdpa")


def _with_lora(model: Any, config: LearnerConfig) -> Any:
    """Low-rank adapters put into `model`, whose other weights are frozen."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    lora = config.lora
    assert lora is not None
    target = lora.target if lora.target == "all-linear" else [name.strip() for name in lora.target.split(",")]
    settings = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (declared int; a float works)
        lora_dropout=lora.dropout,
        target_modules=target,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def _student_module(model: Any, config: LearnerConfig, device: torch.device) -> Any:
    """The module that the engine runs: trained positions are picked out before the vocabulary's product, the largest
    one."""
    import torch
    from torch import nn

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            plain = model.get_base_model() if config.lora is not None else model
            self._decoder = [plain.get_decoder()]  # in lists: the same modules, not registered a second time
            self._head = [plain.get_output_embeddings()]
            if config.compile:
                for layer in self._decoder[0].layers:
                    layer.compile(dynamic=True)

        def forward(
            self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, selected: torch.Tensor
        ) -> torch.Tensor:
            """input_ids, position_ids: [rows, width]; selected: [n] flat positions -> logits [n, vocabulary]."""
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "autocast"):
                # No mask and no cache: only then are packed rows kept apart by their positions.
                hidden = self._decoder[0](
                    input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
                ).last_hidden_state
                return self._head[0](hidden.reshape(-1, hidden.shape[-1])[selected])

    return Student()


def _check_head(model: Any, torch: Any) -> None:
    """Refuse a model whose logits are more than its head's product (scaled, capped): we would train another model."""
    ids = torch.arange(8)[None] % model.config.vocab_size
    model.eval()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        ours = model.get_output_embeddings()(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(whole, ours, atol=1e-3, rtol=1e-3):
        raise ConfigError(
            f"model_path {model.name_or_path!r} ({type(model).__name__}) does more after its decoder than multiply by "
            "its head; use a model such as Qwen2, Qwen3, Llama or Mistral"
        )


@contextlib.contextmanager
def _evaluating(engine: Any, torch: Any) -> Any:
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()
