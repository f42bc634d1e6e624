"""Hosts on one machine: network namespaces joined by a switch, so that the link between two of them can really be cut.

Each host is a namespace with one network card, `eth0`, whose other end is a port of a bridge that lives in a namespace
of its own: nothing of the machine's network is touched, and everything is gone with the processes that hold the
namespaces. All hosts share one small file system that only they see, as machines share a network disk. It takes root.
Where namespaces are not allowed, all hosts are this machine, nothing can be cut and the disk is an ordinary folder;
`Hosts.why` then says why.

Example::

    with Hosts(folder, names=["head", "a", "b"], disk_mb=256) as hosts:
        subprocess.Popen(hosts.command("a", ["python", "-m", "http.server"]))
        hosts.cut("a", "b")                      # both still reach the head
        hosts.heal()
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

NETWORK = "10.77.0"
_HOLD = "import sys; print('here', flush=True); sys.stdin.read()"
"""Holds a namespace until whoever started it has ended."""


class Hosts:
    """`names` in the order of their addresses. `folder` is created; `disk` in it is the shared file system."""

    def __init__(self, folder: Path, *, names: Sequence[str], disk_mb: int) -> None:
        self.names, self.folder, self.disk = list(names), folder, folder / "disk"
        self.why = _why_not()
        """Why there are no namespaces; "" where there are."""
        self._disk_mb = disk_mb
        self._holders: dict[str, subprocess.Popen] = {}
        self._cut: tuple[str, str] | None = None

    def __enter__(self) -> Hosts:
        self.disk.mkdir(parents=True)
        if self.why:
            return self
        try:
            self._hold("switch", "--mount")
            self._run("switch", "mount", "-t", "tmpfs", "-o", f"size={self._disk_mb}m", "tmpfs", str(self.disk))
            self._run("switch", "ip", "link", "add", "name", "bridge0", "type", "bridge")
            self._run("switch", "ip", "link", "set", "bridge0", "up")
            for i, name in enumerate(self.names):
                holder = self._hold(name)
                plug = f"port{i}"
                self._run(
                    "switch", "ip", "link", "add", "name", plug, "type", "veth", "peer", "name", "eth0", "netns",
                    str(holder.pid),
                )  # fmt: skip
                self._run("switch", "ip", "link", "set", plug, "master", "bridge0", "up")
                self._run(name, "ip", "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
                self._run(name, "ip", "link", "set", "eth0", "up")
                self._run(name, "ip", "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Namespaces end with the last process in them; the processes of hosts are their starter's to end."""
        for holder in self._holders.values():
            holder.kill()
            holder.wait(10)
        self._holders.clear()

    def address(self, name: str) -> str:
        """Where processes of that host are reached."""
        return "127.0.0.1" if self.why else f"{NETWORK}.{self.names.index(name) + 1}"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """`command` as it runs on that host."""
        if self.why:
            return list(command)
        mounts, network = (f"/proc/{self._holders[each].pid}/ns/" for each in ("switch", name))
        return ["nsenter", f"--mount={mounts}mnt", f"--net={network}net", f"--wd={os.getcwd()}", "--", *command]

    def seen(self, path: Path) -> Path:
        """A path of the shared disk as this process sees it."""
        return path if self.why else Path(f"/proc/{self._holders['switch'].pid}/root{path}")

    def cut(self, one: str, other: str) -> bool:
        """From now on nothing passes between these two, and nobody is told; all others reach both. One cut at a time.
        False where nothing can be cut."""
        if self.why:
            return False
        self.heal()
        self._cut = (one, other)
        self._isolate("on")
        return True

    def heal(self) -> None:
        if self._cut is not None:
            self._isolate("off")
            self._cut = None

    def fill(self) -> Path | None:
        """Use up the shared disk; returns the file to remove, None where there is no small disk."""
        if self.why:
            return None
        filler = self.seen(self.disk) / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        return filler

    def _isolate(self, state: str) -> None:
        assert self._cut is not None
        for name in self._cut:  # ports that are isolated reach only those that are not
            port = f"port{self.names.index(name)}"
            self._run("switch", "ip", "link", "set", "dev", port, "type", "bridge_slave", "isolated", state)

    def _hold(self, name: str, *more: str) -> subprocess.Popen:
        holder = subprocess.Popen(
            ["unshare", "--net", *more, "--", sys.executable, "-c", _HOLD],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._holders[name] = holder
        assert holder.stdout is not None and holder.stdout.readline() == b"here\n"
        return holder

    def _run(self, name: str, *command: str) -> None:
        done = subprocess.run(self._inside(name, command), capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise OSError(f"{' '.join(command)} on host {name}: {done.stderr.strip()}")

    def _inside(self, name: str, command: Sequence[str]) -> list[str]:
        mounts, network = (f"/proc/{self._holders[each].pid}/ns/" for each in ("switch", name))
        return ["nsenter", f"--mount={mounts}mnt", f"--net={network}net", "--", *command]


def _why_not() -> str:
    """Why this machine cannot have hosts of its own; "" when it can."""
    if os.geteuid() != 0:
        return "network namespaces that are joined by a bridge take root"
    try:
        probe = subprocess.run(
            ["unshare", "--net", "--mount", "--", "sh", "-ec",
             "mount -t tmpfs tmpfs /mnt; ip link add name bridge0 type bridge;"
             "ip link add name port0 type veth peer name eth0;"
             "ip link set port0 master bridge0 up; ip link set dev port0 type bridge_slave isolated on"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    lines = probe.stderr.strip().splitlines()
    return "" if probe.returncode == 0 else (lines[-1] if lines else f"unshare ended with {probe.returncode}")


def wait_until(condition, within_s: float, what: str, every_s: float = 0.1) -> None:
    """Raises `TimeoutError`, naming `what`."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: not within {within_s:g} s")
        time.sleep(every_s)
