"""One run of one side of the learner benchmarks, in a process of its own: `run_side`.

A process each, because accelerate and DeepSpeed leave marks on the process that they ran in. The child of a CPU side
keeps to one core and one thread; its dataloader workers, if any, share that core.

Example::

    measured = run_side("trl", workload_file, {"batching": "padded", "micro_batch_rows": 4})
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.learner_world import Measured, Workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """Where a side is run from; `one_core`: on one core and no GPU."""

    module: str
    settings: str
    run: str = "run"
    one_core: bool = True


SIDES = {
    "ours": _Side(module="benchmarks.learner_ours", settings="OurSettings"),
    "trl": _Side(module="benchmarks.learner_trl", settings="TrlSettings"),
    "bare": _Side(module="benchmarks.learner_bare_loop", settings="BareSettings"),
    "gpu_ours": _Side(module="benchmarks.learner_gpu_sides", settings="GpuSettings", run="run_ours", one_core=False),
    "gpu_trl": _Side(module="benchmarks.learner_gpu_sides", settings="GpuSettings", run="run_trl", one_core=False),
}
TIMEOUT_S = 1800.0
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
_MARK = "measured "


def save(workload: Workload, file: Path) -> None:
    file.write_bytes(pickle.dumps(workload))


def run_side(side: str, workload: Path, settings: Mapping[str, Any]) -> Measured:
    """Raises `RuntimeError` with the end of what the process said when it fails."""
    command = [sys.executable, __file__, side, str(workload), json.dumps(dict(settings))]
    environment = {**os.environ, **ENVIRONMENT}
    if SIDES[side].one_core:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a CPU's number, also on a machine with GPUs
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not found:
        raise RuntimeError(f"{side} with {dict(settings)} failed ({done.returncode}):\n{done.stdout[-3000:]}")
    return Measured(**json.loads(found[-1].removeprefix(_MARK)))


def _keep_to_one_core() -> None:
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("side", choices=sorted(SIDES))
    parser.add_argument("workload", type=Path)
    parser.add_argument("settings", type=json.loads)
    options = parser.parse_args()
    side = SIDES[options.side]
    if side.one_core:
        _keep_to_one_core()
    module = importlib.import_module(side.module)
    workload = pickle.loads(options.workload.read_bytes())
    with tempfile.TemporaryDirectory(prefix="learner-benchmark-") as folder:
        settings = getattr(module, side.settings)(**options.settings)
        measured = getattr(module, side.run)(workload, settings, Path(folder))
    print(_MARK + json.dumps(dataclasses.asdict(measured)), flush=True)


if __name__ == "__main__":
    main()
