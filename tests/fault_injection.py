"""What tests break on purpose while a collection runs as a job of its own: its processes and its disk.

`SmallDisk` is a real file system of a few megabytes that only the job sees, so that one that is full is full; it takes
no privilege where user namespaces are allowed. `Faults` kills a job's processes and fills its disk at moments that are
drawn from a seed, which it prints.

Example::

    disk = SmallDisk(tmp_path / "out", kept=tmp_path / "kept", megabytes=48)
    job = subprocess.Popen(disk.command([sys.executable, "launch/collect.py", f"out={disk.folder}"]), ...)
    Faults(3, kills={"ray::EnvHost": 2}).run(job, mark, done=lambda: share_of_episodes_recorded(), disk=disk)
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from job_processes import processes_of, title

_MOUNT = """
mount -t tmpfs -o size="$1"m,mode=700 tmpfs "$2" || exit 70
from=$2 kept=$3 && shift 3
"$@"
code=$?
cp -a "$from"/. "$kept"/ && exit $code
"""
_FULL_S = 4.0
_IS_ROOT = os.geteuid() == 0
# The job stays the user that it is: the sandbox that it starts does more for root.
_NAMESPACE = ["unshare", "-m"] if _IS_ROOT else ["unshare", "-Um", "--map-current-user", "--keep-caps"]
_WITHOUT_PRIVILEGE = [] if _IS_ROOT else ["setpriv", "--ambient-caps=-all", "--inh-caps=-all"]


class SmallDisk:
    """`folder` as the job sees it. When the job has ended, its content is in `kept`.

    Where no file system can be mounted it is an ordinary folder, and `fill` does nothing.
    """

    def __init__(self, folder: Path, *, kept: Path, megabytes: int) -> None:
        self.folder, self._megabytes = folder, megabytes
        probe = subprocess.run([*_NAMESPACE, "sh", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True, timeout=30)
        self.is_small = probe.returncode == 0
        self.kept = kept if self.is_small else folder
        folder.mkdir(parents=True)
        kept.mkdir(parents=True)

    def command(self, command: list[str]) -> list[str]:
        if not self.is_small:
            return command
        where = [str(self._megabytes), str(self.folder), str(self.kept)]
        return [*_NAMESPACE, "sh", "-c", _MOUNT, "sh", *where, *_WITHOUT_PRIVILEGE, *command]

    def seen_from_outside(self, job: subprocess.Popen) -> Path:
        return Path(f"/proc/{job.pid}/root{self.folder}") if self.is_small else self.folder

    def fill(self, job: subprocess.Popen) -> Path:
        """Until there is no room; returns the file to remove."""
        filler = self.seen_from_outside(job) / "filler"
        with open(filler, "wb", buffering=0) as file:
            while self.is_small:
                try:
                    file.write(bytes(1 << 16))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    break
        return filler


class Faults:
    """Draws what is broken when, and breaks it. `done` counts by name."""

    def __init__(self, seed: int, *, kills: Mapping[str, int], earliest: float = 0.05, latest: float = 0.85) -> None:
        """`kills`: how often, of the processes whose title begins so."""
        print(f"faults are drawn from seed {seed}")
        self._rng = random.Random(seed)
        names = [name for name, count in kills.items() for _ in range(count)]
        self._plan = sorted((self._rng.uniform(earliest, latest), name) for name in names)
        self._full_at = self._rng.uniform(0.3, 0.6)
        self.done: Counter[str] = Counter()

    def run(
        self, job: subprocess.Popen, mark: Path, *, done: Callable[[], float], disk: SmallDisk | None = None
    ) -> None:
        """Until the job ends. Each fault comes when `done()`, the share of the work that is recorded, is as drawn."""
        while job.poll() is None:
            share = done()
            if self._plan and share >= self._plan[0][0] and self.kill(self._plan[0][1], mark):
                self._plan.pop(0)
            if disk is not None and share >= self._full_at and not self.done["full disk"]:
                self._fill(job, disk, mark)
            time.sleep(0.1)

    def kill(self, name: str, mark: Path) -> bool:
        """SIGKILL for one process whose title begins with `name`, if there is one now: whether there was."""
        found = [process for process in processes_of(mark) if title(process).startswith(name)]
        if found:
            os.kill(self._rng.choice(sorted(found, key=lambda each: each.pid)).pid, signal.SIGKILL)
            self.done[name] += 1
        return bool(found)

    def _fill(self, job: subprocess.Popen, disk: SmallDisk, mark: Path) -> None:
        filler = disk.fill(job)
        self.done["full disk"] += 1
        time.sleep(_FULL_S / 2)
        self.kill("ray::RolloutActor", mark)  # what it has finished and cannot write must be done again
        time.sleep(_FULL_S / 2)
        filler.unlink()
