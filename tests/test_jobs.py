"""Jobs as they are submitted to a cluster: a real Ray with its job server, and results in an object store.

Slow: a Ray with a dashboard, and jobs that really train. Everything of the cluster has ports and a folder of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch.bucket.stored_run import StoredRun
from rollout.ledger import Ledger
from rollout.storage import open_storage
from tests.conftest import RAY_ENV_VARS, ROOT

RAY = str(Path(sys.executable).with_name("ray"))
RUNTIME_ENV = ROOT / "launch" / "clusters" / "runtime_env.yaml"
SMALL = [
    "tasks.test_count=2", "learner.checkpoint_every_steps=2", "rollout.queue_capacity=16", "evaluate.candidates=2",
    "evaluate.max_tokens=24", "evaluate.kv_cache_mb=64", "evaluate.engine=in_process", "episode.max_steps=3",
    "retrieval.kind=bm25", "evaluate.rows=[student]",
]  # fmt: skip
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
MARK = "APPRENTICE_TEST_CLUSTER"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Cluster:
    """A Ray with one node, and its job server."""

    url: str
    environment: dict[str, str]
    own: frozenset[int] = frozenset()
    """Processes that were there before the first job."""

    def call(self, *arguments: str) -> str:
        done = subprocess.run(
            [RAY, "job", *arguments], env={**self.environment, "RAY_ADDRESS": self.url}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    def submit(self, name: str, *overrides: str) -> None:
        self.call(
            "submit", "--no-wait", "--submission-id", name, "--working-dir", ".", "--runtime-env", str(RUNTIME_ENV),
            "--", "python", "launch/distill.py", *SMALL, *overrides,
        )  # fmt: skip

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/{path}", timeout=30) as answer:
            return json.load(answer)

    def status(self, name: str) -> str:
        return self.ask(f"jobs/{name}")["status"]

    def logs(self, name: str) -> str:
        return self.ask(f"jobs/{name}/logs")["logs"]

    def wait(self, name: str, condition: Callable[[], object], within_s: float = 240) -> None:
        deadline_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline_s, f"{name} did not come that far: {self.logs(name)}"
            time.sleep(0.5)

    def wait_empty(self, within_s: float) -> None:
        """Until nothing of any job is left."""
        deadline_s = time.monotonic() + within_s
        while left := self.left():
            assert time.monotonic() < deadline_s, left
            time.sleep(0.5)

    def left(self) -> list[str]:
        """Of jobs: actors and placement groups that live, processes that work."""
        found = [f"actor {each['class_name']}" for each in self._listed("actors") if each["state"] != "DEAD"]
        found += ["placement group" for each in self._listed("placement_groups") if each["state"] != "REMOVED"]
        of_ray = ("/ray/", "ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
        for pid, words in self.processes().items():
            if words and pid not in self.own and not any(word in words for word in of_ray):
                found.append(words)
        return found

    def processes(self) -> dict[int, str]:
        """Command lines by process id, of Ray and of jobs."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.environment[MARK]:
                    found[process.pid] = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def _listed(self, what: str) -> list[dict[str, Any]]:
        return self.ask(f"v0/{what}?limit=1000&detail=0")["data"]["result"]["result"]


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def store(bucket: str) -> str:
    return bucket


@pytest.fixture(scope="module")
def cluster(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("cluster") / "head.log"
    for attempt in range(3):
        folder = Path(tempfile.gettempdir()) / f"ray-{os.getpid()}-{attempt}"  # a socket's path has 107 bytes at most
        head, started = start_head(folder, log)
        try:
            if comes_up(head, started):
                yield replace(started, own=frozenset(started.processes()))
                return
        finally:
            end(head, folder)
    pytest.fail(f"Ray did not start: {log.read_text()}")  # it gives itself 30 s, which a busy machine may not keep


def start_head(folder: Path, log: Path) -> tuple[subprocess.Popen, Cluster]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **RAY_ENV_VARS, "PATH": path, MARK: str(folder), "OMP_NUM_THREADS": "1"}
    dashboard = free_port()
    ports = {
        "port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port(),
        "dashboard-agent-grpc-port": free_port(), "metrics-export-port": free_port(),
        "ray-client-server-port": free_port(), "runtime-env-agent-port": free_port(),
    }  # fmt: skip
    with open(log, "w") as output:
        head = subprocess.Popen(
            [
                RAY, "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=200000000",
                "--include-dashboard=true", "--dashboard-host=127.0.0.1", "--disable-usage-stats",
                f"--temp-dir={folder}", *[f"--{name}={port}" for name, port in ports.items()],
            ],
            env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    return head, Cluster(url=f"http://127.0.0.1:{dashboard}", environment=environment)


def comes_up(head: subprocess.Popen, cluster: Cluster) -> bool:
    """Its job server comes up after the rest."""
    job = urllib.request.Request(
        f"{cluster.url}/api/jobs/", data=b'{"entrypoint": "true"}', headers={"Content-Type": "application/json"}
    )
    deadline_s = time.monotonic() + 150
    while head.poll() is None and time.monotonic() < deadline_s:
        try:
            urllib.request.urlopen(job, timeout=30).close()
            return True
        except OSError:
            time.sleep(0.5)
    return False


def end(head: subprocess.Popen, folder: Path) -> None:
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(30)
    except subprocess.TimeoutExpired:
        pass
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(folder):
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    shutil.rmtree(folder, ignore_errors=True)


def test_a_job_that_was_stopped_leaves_nothing_and_goes_on_elsewhere(
    cluster: Cluster, store: str, tmp_path: Path
) -> None:
    run_dir = f"{store}/stopped"
    run = StoredRun(run_dir, str(tmp_path / "reader"))
    # With so few rows ahead of the learner, the workers wait for it: they are not done when it is stopped.
    job = [f"run_dir={run_dir}", "tasks.train_count=600", "learner.epochs=1", "learner.ahead_rows=16"]
    cluster.submit("first", *job, f"scratch={tmp_path / 'a'}")
    cluster.wait("first", lambda: run.checkpoints() or cluster.status("first") in ENDED)
    assert cluster.status("first") == "RUNNING", cluster.logs("first")
    cluster.call("stop", "first")
    assert cluster.status("first") == "STOPPED"
    assert "interrupted; the same command goes on from" in cluster.logs("first")
    cluster.wait_empty(within_s=60)
    lease = sorted(each.name for each in open_storage(run_dir).list("lease"))[-1]
    assert json.loads(open_storage(run_dir).read(lease))["released"] is True
    recorded, step = Ledger(run.ledger).keys(), run.checkpoints()[-1]
    assert recorded

    cluster.submit("second", *job, f"scratch={tmp_path / 'b'}")
    cluster.wait("second", lambda: cluster.status("second") in ENDED, within_s=400)
    logs = cluster.logs("second")
    assert cluster.status("second") == "SUCCEEDED", logs
    assert f"found of an earlier job: {len(recorded)} of 600 trajectories" in logs and step in logs
    cluster.wait_empty(within_s=60)
    ledger = Ledger(run.ledger)
    assert recorded < ledger.keys() and ledger.count() == 600 and ledger.duplicates() == 0
    results = json.loads(open_storage(run_dir).read("results.json"))
    # One pass over all that can be trained on, over both jobs: the second one went on from the first one's checkpoint.
    assert results["learner"]["resumed_from_step"] >= int(step.removeprefix("step-"))
    assert results["learner"]["rows"] == sum(each.trainable for each in ledger.trajectories())
    names = {each.name for each in open_storage(run_dir).walk("")}
    assert {"report.html", "learning_curve.png", "learner/student/model.safetensors"} <= names


def test_a_run_is_refused_to_a_second_job_and_a_driver_that_is_killed_leaves_nothing(
    cluster: Cluster, store: str, tmp_path: Path
) -> None:
    job = [f"run_dir={store}/held", "tasks.train_count=3000", f"scratch={tmp_path}"]
    cluster.submit("holder", *job)
    cluster.wait("holder", lambda: "the teacher acts" in cluster.logs("holder"))
    cluster.submit("intruder", *job)
    cluster.wait("intruder", lambda: cluster.status("intruder") == "FAILED")
    assert "another job is running in s3://test-jobs/held: job holder on" in cluster.logs("intruder")
    assert cluster.status("holder") == "RUNNING"
    os.kill(int(cluster.ask("jobs/holder")["driver_info"]["pid"]), signal.SIGKILL)
    cluster.wait_empty(within_s=60)
    assert cluster.status("holder") == "FAILED"


def test_what_a_job_takes_along_is_small_and_enough() -> None:
    described = yaml.safe_load(RUNTIME_ENV.read_text())
    for folder in (".git", ".venv", "runs", "tests"):
        assert f"/{folder}/" in described["excludes"]
    taken = {path.name for path in ROOT.iterdir()} - {each.strip("/") for each in described["excludes"]}
    assert {"envs", "rollout", "learner", "launch", "configs", "requirements-gpu.lock"} <= taken
