"""Cores of an engine's own: claimed once a machine, one left for the rest, given back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to share out"
)


def in_child(code: str) -> str:
    """What `code` prints in a process of its own, where affinities may be changed."""
    program = f"import os\nfrom rollout.engine_cores import reserve_cores\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, text=True, capture_output=True, check=True, timeout=60
    ).stdout.strip()


@needs_two
def test_a_reserved_core_is_left_by_this_process_and_its_children_until_it_is_released():
    told = in_child(
        "import subprocess, sys\n"
        "before = os.sched_getaffinity(0)\n"
        "cores = reserve_cores(1)\n"
        "if cores is None: print('taken'); sys.exit()\n"
        "child = subprocess.run(['nproc'], capture_output=True, text=True).stdout\n"
        "print(len(cores.numbers), before - os.sched_getaffinity(0) == set(cores.numbers),\n"
        "      int(child) == len(before) - 1)\n"
        "cores.release(); cores.release()\n"
        "print(os.sched_getaffinity(0) == before)"
    )
    assert told in ("1 True True\nTrue", "taken")  # an engine of somebody else may have the machine's cores


def test_no_process_gives_all_its_cores_away():
    told = in_child("n = len(os.sched_getaffinity(0))\nprint(reserve_cores(n), os.sched_getaffinity(0).__len__() == n)")
    assert told == "None True"


@needs_two
def test_two_engines_never_share_a_reserved_core():
    told = in_child(
        "first, second = reserve_cores(1), reserve_cores(1)\n"
        "a = set(first.numbers) if first else set()\n"
        "b = set(second.numbers) if second else set()\n"
        "print(a & b, len(os.sched_getaffinity(0)) >= 1)"
    )
    assert told == "set() True"
