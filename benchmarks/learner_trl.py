"""TRL's side of the learner benchmarks: `trl.SFTTrainer` on the same rows, with the settings that suit it best.

It is given everything ready: the rows' token ids, and labels that are -100 wherever the student only reads (what
`assistant_only_loss` would make, minus its time and minus its template's stray newlines), the same optimizer object
over the same parameter groups, the same schedule, and the same precision (bf16 autocast over fp32 weights). Gradient
checkpointing, its default, is off. Its loss head picks out the trained positions on GPUs alone (TRL 1.16,
`add_fused_lm_head`): on a CPU it works out the vocabulary's product at every position, and again in the backward pass.
No setting changes that, and it is part of the distance between the two here; `benchmarks/learner_gpu.py` is the
comparison where it is not.

What is left to choose is in `TrlSettings`; `CANDIDATES` is what was tried, `benchmarks/learner.py --tune` tries it
again.

Example::

    measured = run(workload, TrlSettings(micro_batch_rows=4), folder)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.learner_ours import GRADIENT_CLIPPING, learner_config
from benchmarks.learner_world import BASE_STUDENT, MAX_ROW_TOKENS, Clock, Measured, Workload, rate_factor
from benchmarks.learner_world import validation_loss as loss_of
from learner.config import OptimizerName
from learner.examples import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlSettings:
    """What a user of TRL may choose for such data."""

    optimizer: OptimizerName = "adamw"
    """"muon": our optimizer object, as TRL has none."""
    batching: Literal["padded", "padding_free", "packed", "grouped"] = "padded"
    """"padded": rows in their order; "padding_free": the same rows end to end; "packed": `packing=True`, best-fit
    decreasing, to 1,024 tokens; "grouped": padded, similar lengths together, in another order."""
    micro_batch_rows: int = 16
    """`per_device_train_batch_size`; packed rows where packed."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    loader_workers: int = 0
    compile: bool = False
    """torch.compile the model."""

    def describe(self) -> str:
        workers = f", {self.loader_workers} loader workers" if self.loader_workers else ""
        compiled = ", compiled" if self.compile else ""
        rows = "row" if self.micro_batch_rows == 1 else "rows"
        return (
            f"{self.batching}, {self.micro_batch_rows} {rows} a micro-batch, {self.attention} attention"
            f"{workers}{compiled}"
        )


BEST = TrlSettings(batching="padded", micro_batch_rows=1)
"""Of `CANDIDATES`, the fastest on one core that trains right."""

CANDIDATES = (
    *(
        TrlSettings(batching="padded", micro_batch_rows=rows, attention=attention)
        for attention in ("sdpa", "eager")
        for rows in (1, 2, 4, 8, 16)
    ),
    *(TrlSettings(batching="grouped", micro_batch_rows=rows, attention="eager") for rows in (4, 8, 16)),
    TrlSettings(batching="grouped", micro_batch_rows=8),
    TrlSettings(batching="padding_free", micro_batch_rows=2),
    TrlSettings(batching="padding_free", micro_batch_rows=4),
    TrlSettings(batching="packed", micro_batch_rows=1),
    TrlSettings(batching="packed", micro_batch_rows=2),
    TrlSettings(batching="packed", micro_batch_rows=1, attention="eager"),
    TrlSettings(batching="padded", micro_batch_rows=1, loader_workers=1),
    TrlSettings(batching="padded", micro_batch_rows=1, compile=True),
)


def run(workload: Workload, settings: TrlSettings, folder: Path) -> Measured:
    """Train once; nothing is saved to `folder`. Raises `RuntimeError` when TRL did not train on what it was given."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_config import SFTConfig

    from learner.optimizers import MuonAdamW, parameter_groups

    packed = settings.batching == "packed"
    average = workload.tokens / len(workload.rows)
    per_step = max(1, round(workload.rows_per_step * average / MAX_ROW_TOKENS)) if packed else workload.rows_per_step
    rows = min(settings.micro_batch_rows, per_step)
    arguments = SFTConfig(
        num_train_epochs=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=per_step // rows,
        train_sampling_strategy="group_by_length" if settings.batching == "grouped" else "sequential",
        packing=packed,
        padding_free=settings.batching == "padding_free",
        max_length=MAX_ROW_TOKENS if packed else None,
        max_grad_norm=GRADIENT_CLIPPING,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_num_workers=settings.loader_workers,
        torch_compile=settings.compile,
        **common_arguments(folder),
    )
    model = AutoModelForCausalLM.from_pretrained(
        BASE_STUDENT, dtype=torch.float32, attn_implementation=settings.attention
    )
    config = learner_config(folder, optimizer=settings.optimizer, rows_per_step=workload.rows_per_step)
    optimizer = MuonAdamW(parameter_groups(model, config))
    steps = fit(model, workload.rows, arguments, optimizer=optimizer, student=BASE_STUDENT)
    if sum(steps.trained) != workload.trained_tokens:
        raise RuntimeError(f"TRL trained on {sum(steps.trained)} tokens of {workload.trained_tokens}")
    model.set_attn_implementation("sdpa")
    return steps.measured(validation_loss=loss_of(model, workload.held_out))


def common_arguments(folder: Path) -> dict[str, Any]:
    """Of `SFTConfig`: bf16 products, and nothing written or told while the clock runs."""
    return {
        "output_dir": str(folder),
        "bf16": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def fit(model: Any, rows: Sequence[Example], arguments: Any, *, optimizer: Any, student: Path) -> TrlSteps:
    """Train `model` in place with TRL's own steps, under the schedule of all sides."""
    import datasets
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.sft_trainer import SFTTrainer

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=UserWarning)
    model.config.use_cache = False
    steps = TrlSteps()

    class Trainer(SFTTrainer):
        """Notes what it is fed."""

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            steps.fed(inputs)
            loss = super().training_step(model, inputs, *rest, **named)
            steps.lost(loss)
            return loss

    class Steps(TrainerCallback):
        def on_step_end(self, *rest: Any, **named: Any) -> None:
            steps.ended()

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(
            [
                {
                    "input_ids": list(row.token_ids),
                    "labels": [i if w > 0 else -100 for i, w in zip(row.token_ids, row.loss_weights, strict=True)],
                }
                for row in rows
            ]
        ),
        processing_class=AutoTokenizer.from_pretrained(student),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)),
        callbacks=[Steps()],
    )
    trainer.train()
    return steps


class TrlSteps:
    """What TRL's steps were fed, padding left out. Sums stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._clock = Clock()
        self._tokens: list[Any] = [0]
        self._trained: list[Any] = [0]
        self._losses: list[Any] = [0.0]

    def fed(self, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        self._tokens[-1] += inputs["input_ids"].numel() if mask is None else mask.sum()
        self._trained[-1] += (inputs["labels"] != -100).sum()

    def lost(self, loss: Any) -> None:
        self._losses[-1] += loss.detach()

    def ended(self) -> None:
        self._clock.step()
        for sums in (self._tokens, self._trained, self._losses):
            sums.append(0)

    @property
    def trained(self) -> list[int]:
        """[steps]"""
        return [int(count) for count in self._trained[:-1]]

    def measured(self, **measured: float) -> Measured:
        return self._clock.measured(
            tokens=[int(count) for count in self._tokens[:-1]],
            trained=self.trained,
            losses=[float(loss) for loss in self._losses[:-1]],
            **measured,
        )
