"""A Ray cluster of several nodes on this machine, each on a host of its own (`benchmarks.chaos_hosts`), to be broken.

Every node is `ray start --block` in a process of its own, and is started again some seconds after it has died, as a
cloud or a supervisor would. Whatever runs on the cluster carries two marks in its environment: of which cluster it is
(`MARK`), and on which host. A sandbox starts with a clean environment; it is found as a child of one that has them.

Example::

    with ChaosCluster(folder, workers=3) as cluster:
        job = cluster.start_job([sys.executable, "launch/distill.py", f"cluster.address={cluster.address}"], log)
        cluster.kill(cluster.processes("a"))
        while job.poll() is None:
            cluster.tend()                       # nodes that died come back
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import psutil

from benchmarks.chaos_hosts import Hosts, wait_until

ROOT = Path(__file__).resolve().parent.parent
MARK, HOST_MARK = "APPRENTICE_CHAOS", "APPRENTICE_CHAOS_HOST"
RAY = str(Path(sys.executable).with_name("ray"))
HEAD = "head"
PORT = 6399
BACK_S = 4.0
"""After so long a dead node is started again."""
START_S = 300.0
OF_RAY = (
    "site-packages/ray/",
    "ray.util.client.server",
    "ray::IDLE",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "bin/ray start",
)
"""In the command lines of a cluster's own processes."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "OMP_NUM_THREADS": "1",
    # A node that is silent is given up after some 10 s instead of 30: the faults here are short.
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


class ChaosCluster:
    """A head without work, where the driver runs, and `workers` nodes. `folder` must not exist; it is left there."""

    def __init__(self, folder: Path, *, workers: int = 3, cpus: int = 6, disk_mb: int = 256) -> None:
        self.folder, self._cpus = folder, cpus
        self.workers = [chr(ord("a") + i) for i in range(workers)]
        self.hosts = Hosts(folder / "hosts", names=[HEAD, *self.workers], disk_mb=disk_mb)
        self.address = ""
        self._nodes: dict[str, subprocess.Popen] = {}
        self._died_at_s: dict[str, float] = {}
        self._seen: dict[psutil.Process, str] = {}
        """Process -> its host."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT), "PATH": path,
            MARK: str(folder),
        }  # fmt: skip

    def __enter__(self) -> ChaosCluster:
        self.folder.mkdir(parents=True)
        self.hosts.__enter__()
        self.address = f"{self.hosts.address(HEAD)}:{PORT}"
        try:
            self.start_node(HEAD)
            self._wait_for_head()
            for name in self.workers:
                self.start_node(name)
            self.wait_whole()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything that carries the mark."""
        deadline_s = time.monotonic() + 30
        while left := self.processes():
            self.kill(left)
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"processes of the cluster do not end: {[title(each)[:80] for each in left]}")
            time.sleep(0.2)
        for node in self._nodes.values():
            node.wait(10)
        self.hosts.close()

    # -- nodes

    def start_node(self, name: str) -> None:
        """Start Ray on that host; returns before it is up."""
        ip = self.hosts.address(name)
        where = ["--head", f"--port={PORT}", f"--temp-dir={self.folder / 'ray'}", "--include-dashboard=false"]
        if name != HEAD:
            where = [f"--address={self.address}"]
        command = [
            RAY, "start", "--block", "--disable-usage-stats", f"--node-ip-address={ip}", *where,
            f"--num-cpus={0 if name == HEAD else self._cpus}", "--object-store-memory=100000000",
            f"--labels={json.dumps({'host': name})}",
        ]  # fmt: skip
        with open(self.folder / f"{name}.log", "w") as log:
            self._nodes[name] = self._popen(name, command, log)
        self._died_at_s.pop(name, None)

    def tend(self) -> list[str]:
        """Starts nodes again that have been dead for `BACK_S`; returns them. Call it often."""
        self.processes()
        back = []
        for name, node in self._nodes.items():
            if node.poll() is None:
                continue
            died_at_s = self._died_at_s.setdefault(name, time.monotonic())
            if time.monotonic() - died_at_s >= BACK_S:
                self.kill(self.processes(name))
                back.append(name)
        for name in back:
            self.start_node(name)
        return back

    def wait_whole(self) -> None:
        """All nodes are up."""

        def started() -> bool:
            self.tend()
            return all(map(self.is_up, self._nodes))

        def whole() -> bool:
            return started() and self.alive() == set(self._nodes)

        wait_until(started, START_S, "the nodes start")
        wait_until(whole, START_S, "the nodes take part", every_s=1.0)

    def is_up(self, name: str) -> bool:
        """Ray says so of its start on that host, and runs."""
        return self._nodes[name].poll() is None and "Ray runtime started" in self._log(name)

    def alive(self) -> set[str]:
        """Hosts whose node takes part."""
        code = (
            f"import json, ray; ray.init(address={self.address!r}, log_to_driver=False, logging_level='ERROR');"
            "print('nodes', json.dumps([n['Labels'].get('host') for n in ray.nodes() if n['Alive']]))"
        )
        done = subprocess.run(
            self.hosts.command(HEAD, [sys.executable, "-c", code]), env=self._environment(HEAD), capture_output=True,
            text=True, timeout=START_S,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("nodes ")]
        return set(json.loads(lines[-1][6:])) if lines else set()

    def _wait_for_head(self) -> None:
        """Ray gives itself 30 s to start, which a busy machine may not keep: then it is started again."""

        def up() -> bool:
            self.tend()
            return self.is_up(HEAD)

        wait_until(up, START_S, "the head starts")

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    # -- jobs and processes

    def start_job(self, command: list[str], log: Path) -> subprocess.Popen:
        """A driver, on the head's host; what it says is added to `log`."""
        with open(log, "ab") as output:
            return self._popen(HEAD, command, output)

    def processes(self, host: str = "") -> list[psutil.Process]:
        """All that carry the mark, and what was ever seen as a child of one, as far as they still run; of one host, or
        of all."""
        for process in psutil.process_iter():
            if process in self._seen:
                continue
            try:
                environment = process.environ()
                if environment.get(MARK) == str(self.folder) and process.pid != os.getpid():
                    self._seen[process] = environment.get(HOST_MARK, "")
                elif (parent := process.parent()) is not None and parent in self._seen:
                    self._seen[process] = self._seen[parent]
            except psutil.Error:
                continue
        self._seen = {each: at for each, at in self._seen.items() if _runs(each)}
        return sorted((each for each, at in self._seen.items() if host in ("", at)), key=lambda each: each.pid)

    def of_jobs(self) -> list[str]:
        """What runs and is not Ray itself, in words."""
        words = [title(each) for each in self.processes()]
        return [each for each in words if each and not any(part in each for part in OF_RAY)]

    def kill(self, processes: Iterable[psutil.Process]) -> int:
        """SIGKILL; how many were still there."""
        count = 0
        for process in processes:
            try:
                process.send_signal(signal.SIGKILL)
                count += 1
            except psutil.Error:
                continue
        return count

    def _popen(self, host: str, command: list[str], log) -> subprocess.Popen:
        return subprocess.Popen(
            self.hosts.command(host, command), cwd=ROOT, env=self._environment(host), stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def _environment(self, host: str) -> dict[str, str]:
        return {**self.environment, HOST_MARK: host}


def title(process: psutil.Process) -> str:
    """Its command line; "" when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
