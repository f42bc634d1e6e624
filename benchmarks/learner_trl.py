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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.learner_ours import GRADIENT_CLIPPING, learner_config
from benchmarks.learner_world import BASE_STUDENT, MAX_ROW_TOKENS, Clock, Measured, Workload, rate_factor
from benchmarks.learner_world import validation_loss as loss_of
from learner.config import OptimizerName


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

    def describe(self) -> str:
        workers = f", {self.loader_workers} loader workers" if self.loader_workers else ""
        return f"{self.batching}, {self.micro_batch_rows} rows a micro-batch, {self.attention} attention{workers}"


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
    TrlSettings(batching="padded", micro_batch_rows=4, attention="eager", loader_workers=1),
)


def run(workload: Workload, settings: TrlSettings, folder: Path) -> Measured:
    """Train once; nothing is saved to `folder`. Raises `RuntimeError` when TRL did not train on what it was given."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from learner.optimizers import MuonAdamW, parameter_groups

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=UserWarning)
    packed = settings.batching == "packed"
    average = workload.tokens / len(workload.rows)
    per_step = max(1, round(workload.rows_per_step * average / MAX_ROW_TOKENS)) if packed else workload.rows_per_step
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=min(settings.micro_batch_rows, per_step),
        gradient_accumulation_steps=max(1, per_step // settings.micro_batch_rows),
        train_sampling_strategy="group_by_length" if settings.batching == "grouped" else "sequential",
        packing=packed,
        padding_free=settings.batching == "padding_free",
        max_length=MAX_ROW_TOKENS if packed else None,
        max_grad_norm=GRADIENT_CLIPPING,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_num_workers=settings.loader_workers,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        BASE_STUDENT, dtype=torch.float32, attn_implementation=settings.attention
    )
    model.config.use_cache = False
    config = learner_config(folder, optimizer=settings.optimizer, rows_per_step=workload.rows_per_step)
    optimizer = MuonAdamW(parameter_groups(model, config))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
    clock, counts = Clock(), _Counts()

    class Trainer(SFTTrainer):
        """Counts what it is fed; TRL's own step."""

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            counts.add(inputs)
            loss = super().training_step(model, inputs, *rest, **named)
            counts.first_loss(loss)
            return loss

    class Steps(TrainerCallback):
        def on_step_end(self, *rest: Any, **named: Any) -> None:
            clock.step(tokens=counts.tokens, trained=counts.trained)
            counts.next_step()

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(
            [
                {
                    "input_ids": list(row.token_ids),
                    "labels": [i if w > 0 else -100 for i, w in zip(row.token_ids, row.loss_weights, strict=True)],
                }
                for row in workload.rows
            ]
        ),
        processing_class=AutoTokenizer.from_pretrained(BASE_STUDENT),
        optimizers=(optimizer, schedule),
        callbacks=[Steps()],
    )
    trainer.train()
    if counts.all_trained != workload.trained_tokens:
        raise RuntimeError(f"TRL trained on {counts.all_trained} tokens of {workload.trained_tokens}")
    model.set_attn_implementation("sdpa")
    return clock.measured(validation_loss=loss_of(model, workload.held_out), first_loss=counts.loss)


class _Counts:
    """Tokens that TRL's steps were fed, padding left out."""

    def __init__(self) -> None:
        self.tokens = self.trained = self.all_trained = self.steps = 0
        self.loss = 0.0

    def add(self, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        self.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        trained = int((inputs["labels"] != -100).sum())
        self.trained += trained
        self.all_trained += trained

    def first_loss(self, loss: Any) -> None:
        if self.steps == 0:
            self.loss += float(loss)

    def next_step(self) -> None:
        self.steps += 1
        self.tokens = self.trained = 0
