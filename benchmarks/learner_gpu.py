"""The learner on a GPU: tokens/s, MFU and memory beside TRL's SFTTrainer, for students of 0.5 and 1.5 B parameters.

python benchmarks/learner_gpu.py                                  # both sizes, full and LoRA; half an hour on one GPU
python benchmarks/learner_gpu.py --sizes 0.5B --modes lora --repeats 1
python benchmarks/learner_gpu.py --tiny                           # on a CPU, in minutes: shows that the script works

The students have Qwen2.5's shapes and random weights; rows are made-up trajectories of up to 4,096 tokens. bf16, AdamW,
about 65,536 tokens a step on both sides. First each side tries its ways to lay the rows out (`tries`), one short run
each; the fastest that fits into memory is then run again, in turns. MFU counts what the mathematics needs, without
padding and recomputation, against the device's dense bf16 peak (`learner.tracking.flops`), alike for both sides.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.learner_gpu_sides import GpuSettings
from benchmarks.learner_gpu_world import SHAPES, long_workload, save_student
from benchmarks.learner_side import run_side, save
from benchmarks.learner_world import WARM_STEPS, Measured
from benchmarks.scoreboard import Row

SIZES = ("0.5B", "1.5B")
MODES = ("full", "lora")
SIDES = {"gpu_ours": "ours", "gpu_trl": "TRL"}
TINY_ROW_TOKENS, TINY_STEP_TOKENS = 256, 1024


def tries(side: str, base: GpuSettings, *, tiny: bool) -> list[GpuSettings]:
    """The ways that a side may lay the same rows out; the first steps of each decide."""
    layouts: list[dict[str, Any]] = [
        {"batching": "packed", "micro_rows": 1},
        {"batching": "packed", "micro_rows": 4},
        {"batching": "packed", "micro_rows": 4, "checkpointing": True},
    ]
    if not tiny:
        layouts += [{"batching": "padded", "micro_rows": rows} for rows in (1, 4)]
    if side == "gpu_ours":
        return [dataclasses.replace(base, **layout) for layout in layouts]
    engines = ("amp",) if base.lora else ("amp", "deepspeed")
    # Packed rows want an attention that knows where each ends; padded ones are sdpa's own.
    kernels = [
        name
        for name, package in (("flash_attention_2", "flash_attn"), ("flex_attention", "triton"))
        if importlib.util.find_spec(package) is not None and not tiny
    ]
    packed = [layout for layout in layouts if layout["batching"] == "packed"]
    chosen = [*layouts, *({**layout, "attention": name} for name in kernels for layout in packed)]
    return [dataclasses.replace(base, engine=engine, **layout) for engine in engines for layout in chosen]


def measure(options: Any, folder: Path, device: str) -> Iterator[Row]:
    for size in options.sizes:
        student = folder / size
        save_student(student, SHAPES[size], device=device)
        base = GpuSettings(student=str(student), steps=WARM_STEPS + options.steps)
        if options.tiny:
            base = dataclasses.replace(base, row_tokens=TINY_ROW_TOKENS, step_tokens=TINY_STEP_TOKENS)
        rows = 2 * base.steps * base.step_tokens // (base.row_tokens // 2)
        workload = long_workload(student, rows=rows, row_tokens=base.row_tokens)
        file = folder / f"{size}.workload"
        save(workload, file)
        print(f"{size}: {workload.describe()}", flush=True)
        for mode in options.modes:
            settings = dataclasses.replace(base, lora=mode == "lora")
            yield from compared(f"{size}, {mode}", settings, file, options)


def compared(group: str, base: GpuSettings, workload: Path, options: Any) -> Iterator[Row]:
    """Both sides at one size and mode."""
    best = {side: fastest(group, side, tries(side, base, tiny=options.tiny), workload) for side in SIDES}
    runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side, settings in best.items():
            if settings is not None:
                runs[side].append(run_side(side, workload, dataclasses.asdict(settings)))
    for side, name in SIDES.items():
        chosen = best[side]
        if chosen is None:
            yield Row(what=f"{name}: tokens/s", measured="does not fit", group=group)
            continue
        yield Row(
            what=f"{name}: tokens/s, padding left out",
            measured=statistics.median(run.tokens / run.wall_s for run in runs[side]),
            unit="tokens/s",
            beside=f"MFU {_extra(runs[side], 'mfu', '.1%')}, "
            f"peak memory {_extra(runs[side], 'peak_memory_mb', ',.0f')} MiB, "
            f"last loss {statistics.median(run.last_loss for run in runs[side]):.3f}; {chosen.describe(side)}",
            group=group,
        )
    if all(runs.values()):
        ours, theirs = (statistics.median(run.trained_per_s for run in runs[side]) for side in SIDES)
        yield Row(
            what="useful tokens/s, times TRL's",
            measured=ours / theirs,
            unit="x",
            beside=f"{ours:,.0f} beside {theirs:,.0f} trained tokens/s",
            group=group,
        )


def fastest(group: str, side: str, candidates: Sequence[GpuSettings], workload: Path) -> GpuSettings | None:
    """By one run each; None when none fits into memory. Raises `RuntimeError` when all that fit fail otherwise."""
    rates: list[tuple[float, GpuSettings]] = []
    failed: RuntimeError | None = None
    for settings in candidates:
        name = f"{group}, {SIDES[side]}, {settings.describe(side)}"
        try:
            measured = run_side(side, workload, dataclasses.asdict(settings))
        except RuntimeError as error:
            fits = "out of memory" not in str(error).lower()
            failed = error if fits else failed
            print(f"{name}: {f'failed: {error}' if fits else 'does not fit into memory'}", flush=True)
            continue
        rates.append((measured.trained_per_s, settings))
        memory = _extra([measured], "peak_memory_mb", ",.0f")
        print(f"{name}: {measured.tokens / measured.wall_s:,.0f} tokens/s, {memory} MiB", flush=True)
    if failed is not None and not rates:
        raise failed
    return max(rates, key=lambda rate: rate[0])[1] if rates else None


def _extra(runs: Sequence[Measured], name: str, form: str) -> str:
    values = [run.extra[name] for run in runs if name in run.extra]
    return format(statistics.median(values), form) if values else "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"comma-separated of: {', '.join(SIZES)}")
    parser.add_argument("--modes", default=",".join(MODES), help=f"comma-separated of: {', '.join(MODES)}")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side's best; the medians are printed")
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps of a run that are counted")
    parser.add_argument("--tiny", action="store_true", help="a tiny student on the CPU: shows that the script works")
    options = parser.parse_args(arguments)
    for name, allowed in (("sizes", SIZES), ("modes", MODES)):
        chosen = getattr(options, name).split(",")
        if unknown := set(chosen) - set(allowed):
            parser.error(f"--{name} {unknown.pop()!r} is unknown; there are {', '.join(allowed)}")
        setattr(options, name, chosen)
    for name in ("repeats", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    import torch

    if options.tiny:
        options.sizes, device, machine = ["tiny"], "cpu", "a CPU: these numbers mean nothing"
    elif torch.cuda.is_available():
        device, machine = "cuda", torch.cuda.get_device_name()
    else:
        print(
            "learner_gpu.py needs a GPU, and torch sees none here; --tiny shows on a CPU that it works", file=sys.stderr
        )
        return 2
    title = f"The learner on {machine}, medians of {options.repeats}"
    print(title, flush=True)
    with tempfile.TemporaryDirectory(prefix="learner-benchmark-") as folder:
        return scoreboard.publish(list(measure(options, Path(folder), device)), options, title=title)


if __name__ == "__main__":
    sys.exit(main())
