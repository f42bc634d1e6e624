"""What the backend's tests share: batches of random tokens, and a few optimizer steps on them. Also a program of its
own: one rank of several (see `main`)."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from learner.config import EmaConfig, LearnerConfig, LoraConfig
from learner.deepspeed_backend import DeepSpeedBackend
from learner.packing import MicroBatch

LORA = LoraConfig(rank=4, alpha=8.0, target="q_proj,v_proj,down_proj")


def config_of(base: Path, out: Path, **changes: Any) -> LearnerConfig:
    """fp32 and AdamW, where every engine computes the same."""
    settings: dict[str, Any] = {
        "epochs": 1,
        "optimizer": "adamw",
        "precision": "fp32",
        "lr": 5e-3,
        "warmup_steps": 0,
        "collective_timeout_s": 120.0,
        "batching": "bucketed",
    }
    if isinstance(changes.get("lora"), dict):
        changes["lora"] = LoraConfig(**changes["lora"])
    if isinstance(changes.get("ema"), dict):
        changes["ema"] = EmaConfig(**changes["ema"])
    return LearnerConfig(model_path=str(base), output_dir=str(out), **{**settings, **changes})


def batches_of(step: int, *, rows: int = 6, width: int = 16) -> list[MicroBatch]:
    """One micro-batch per row; the same for everybody who asks for the step. Six go into 1, 2 and 3 ranks, which must
    do the same number of them."""
    rng = np.random.default_rng(step)
    batches = []
    for _ in range(rows):
        ids = rng.integers(3, 300, (1, width), dtype=np.int64)
        batches.append(
            MicroBatch(
                input_ids=ids,
                position_ids=None,
                selected=np.arange(width - 1, dtype=np.int64),
                targets=ids[0, 1:].copy(),
                weights=np.ones(width - 1, np.float32),
                spans=np.zeros(width - 1, np.int64),
                tokens=width,
            )
        )
    return batches


def loss_of(backend: DeepSpeedBackend, batch: MicroBatch) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(backend.forward(batch).float(), backend.to_device(batch.targets), reduction="sum")


def take_step(backend: DeepSpeedBackend, step: int, *, spoil: float | None = None) -> tuple[float, Any]:
    """Mean loss over all ranks and the outcome; every third step has the same tokens. `spoil` multiplies the last
    micro-batch's loss."""
    backend.seed(step)
    batches = batches_of(step % 3)
    total = sum(len(batch.targets) for batch in batches)
    mine = batches[backend.rank :: backend.world_size]
    summed = 0.0
    for i, batch in enumerate(mine):
        last = i + 1 == len(mine)
        loss = loss_of(backend, batch)
        summed += float(loss.detach())
        backend.backward((loss * spoil if spoil is not None and last else loss) / total, last=last)
    outcome = backend.step(1.0)
    return backend.sum_over_ranks([summed])[0] / total, outcome


def train(backend: DeepSpeedBackend, steps: range) -> list[float]:
    return [take_step(backend, step)[0] for step in steps]


def size_of(backend: DeepSpeedBackend) -> float:
    """Of all weights as they would be exported; 0.0 on ranks other than 0. All ranks together."""
    weights = backend.full_weights() or {}
    return sum(float(value.double().abs().sum()) for value in weights.values())


def main() -> None:
    """argv: base, folder, rank, ranks, first step, last step, port, result file, settings as JSON (name -> changes).

    For each of the settings: resumes from `folder/name` where there is something, trains, takes a step that the last
    rank's gradient spoils for all, and saves a checkpoint there. The result is name -> [losses, size of the weights].
    """
    base, folder, rank, ranks, first, last, port, result, settings = sys.argv[1:]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    results: dict[str, tuple[list[float], float]] = {}
    backend = None
    for name, changes in json.loads(settings).items():
        config = config_of(Path(base), Path(folder), ranks=int(ranks), **changes)
        backend = DeepSpeedBackend(config, rank=int(rank), world_size=int(ranks))
        backend.load_checkpoint(Path(folder) / name)
        losses = train(backend, range(int(first), int(last)))
        if not take_step(backend, 0, spoil=math.nan if int(rank) + 1 == int(ranks) else None)[1].skipped:
            raise SystemExit(f"{name}: rank {rank} did not skip the step that rank {int(ranks) - 1} spoilt")
        results[name] = (losses, size_of(backend))
        backend.save_checkpoint(Path(folder) / name, int(last), {"step": int(last)})
    if int(rank) == 0:
        Path(result).write_text(json.dumps(results))
    if backend is not None:
        backend.close()


if __name__ == "__main__":
    main()
