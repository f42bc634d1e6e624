"""A local Ray leaves no process, even where its raylet was killed, its start was interrupted or its driver died."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from job_processes import assert_nothing_left, processes_of, start_marked, title

from launch.local_ray import GRACE_S, end

LOCAL_RAY = """
import sys, time
from launch.cluster import ray_cluster
from launch.config import ClusterConfig

def stop_badly(self, *arguments, **options):
    self.all_processes["raylet"][0].process.send_signal(19)  # it will not end when it is told to
    self.all_processes["gcs_server"][0].process.kill()  # nobody listens to its agents
    stop(self, *arguments, **options)

with ray_cluster(ClusterConfig(num_cpus=1, object_store_mb=100)):
    import ray
    from ray._private.node import Node
    ray.get(ray.remote(lambda: 1).remote())
    print("started", flush=True)
    sys.stdin.readline()
    stop, Node.kill_all_processes = Node.kill_all_processes, stop_badly
print("ended", flush=True)
sys.stdin.readline()
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(1, flush=True)
time.sleep(60)
"""


class LocalRay:
    """A program that starts Ray, stops it badly when it is told to, and ends when it is told to."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark
        self.process = start_marked([sys.executable, "-c", LOCAL_RAY], mark, stdin=subprocess.PIPE)

    def says(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == line + "\n"

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def others(self) -> list[str]:
        return sorted(title(each)[:120] for each in processes_of(self.mark) if each.pid != self.process.pid)


@pytest.mark.timeout(120)
def test_nothing_is_left_where_the_raylet_had_to_be_killed(tmp_path: Path) -> None:
    program = LocalRay(tmp_path)
    program.says("started")
    while not {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} < set(program.others()):
        time.sleep(0.1)
    program.tell()
    program.says("ended")
    assert program.others() == []
    program.tell()
    assert program.process.wait(timeout=30) == 0
    assert_nothing_left(tmp_path, within_s=0)


@pytest.mark.timeout(120)
def test_nothing_is_left_by_a_driver_that_is_killed(tmp_path: Path) -> None:
    program = LocalRay(tmp_path)
    program.says("started")
    program.process.kill()
    program.process.wait(timeout=30)
    assert_nothing_left(tmp_path, within_s=GRACE_S + 10)


@pytest.mark.timeout(120)
def test_a_start_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    program = LocalRay(tmp_path)
    while not any("raylet" in each for each in program.others()):
        assert program.process.poll() is None, program.process.communicate()
        time.sleep(0.02)
    program.process.send_signal(signal.SIGINT)
    output, _ = program.process.communicate(timeout=60)
    assert "KeyboardInterrupt" in output and not output.startswith("started")
    assert_nothing_left(tmp_path, within_s=0)


def test_what_does_not_end_is_killed_and_what_has_ended_is_no_matter() -> None:
    stubborn = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    quick = subprocess.Popen([sys.executable, "-c", ""])
    assert stubborn.stdout is not None and stubborn.stdout.read(1) == b"1"
    handles = [psutil.Process(stubborn.pid), psutil.Process(quick.pid)]
    while handles[1].status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    end(handles, grace_s=0.5)
    assert stubborn.wait(timeout=10) == -signal.SIGKILL
    assert quick.wait(timeout=10) == 0
    stubborn.stdout.close()
    end(handles, grace_s=0.5)
