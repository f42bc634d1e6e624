"""What a confined process gives up, layer by layer: identity, limits, privileges, files, system calls.

Used by the zygote (which prepares) and by each state holder (which gives up, before any untrusted code). Every layer
tells whether it is in force; `Confinement.enter` refuses to go on when the minimum (no_new_privs and seccomp) is
missing.

Landlock: Documentation/userspace-api/landlock.rst; see `seccomp.py` for system calls and `namespaces.py` for
namespaces.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable, Sequence

from envs.sandbox import seccomp

NOBODY = 65534
MAX_OPEN_FILES = 128
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_CAPSET = {"x86_64": 126, "aarch64": 91}
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

_libc = ctypes.CDLL(None, use_errno=True)


class ConfinementError(RuntimeError):
    """The minimum of confinement is not available here."""


def prctl(option: int, value: int, third: int = 0) -> None:
    """prctl(2). Raises `OSError`."""
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(third), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def _syscall(number: int, *arguments) -> int:
    result = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def landlock_abi() -> int:
    """The kernel's Landlock version, 0 without."""
    try:
        return max(0, _syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))
    except OSError:
        return 0


def landlock_ruleset(readable: Sequence[str]) -> int:
    """A ruleset that allows reading beneath `readable` and nothing else that this kernel handles. Returns its fd."""
    abi = landlock_abi()
    if abi == 0:
        raise OSError(errno.ENOSYS, "Landlock is not available")
    filesystem = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attributes = struct.pack("QQQ", filesystem, 0b11, 0b11)  # TCP bind and connect; abstract sockets and signals
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _syscall(_LANDLOCK_CREATE, attributes[:size], ctypes.c_size_t(size), 0)
    for path in readable:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        try:
            _syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
        finally:
            os.close(fd)
    return ruleset


class Confinement:
    """Prepared once by the zygote, entered by each state holder. `without` names layers to leave out, for tests."""

    def __init__(
        self,
        *,
        readable: Sequence[str],
        private_root: bool,
        address_space_bytes: int,
        cpu_s: int,
        unsafe: bool,
        without: set[str],
    ) -> None:
        self._unsafe, self._without = unsafe, without
        self._arch = seccomp.machine()
        self._address_space = address_space_bytes
        # The driver enforces the limit of a step. This one bounds a process that no driver watches any more.
        self._lifetime_cpu_s = 60 + 100 * cpu_s
        self._ruleset: int | None = None
        if "landlock" not in without:
            try:
                self._ruleset = landlock_ruleset(readable)
            except OSError:
                self._ruleset = None
        self._metering = self._allow_list = b""
        if self._arch is not None:
            self._metering = seccomp.metering_filter(self._arch)
            self._allow_list = seccomp.allow_list_filter(
                self._arch, may_open=self._ruleset is not None or private_root, may_read_links=private_root
            )

    def enter(self, supervisor: socket.socket) -> dict[str, str | bool]:
        """Give everything up; the fork listener goes to `supervisor`. Returns which layers are in force.

        Raises `ConfinementError` when the minimum is missing, unless the sandbox is `unsafe`.
        """
        layers: dict[str, str | bool] = {}
        self._layer(layers, "rlimits", self._limit_resources, required=True)
        self._layer(layers, "unprivileged_uid", _drop_identity, required=os.geteuid() == 0)
        self._layer(layers, "no_capabilities", self._drop_capabilities, required=True)
        self._layer(layers, "no_new_privs", lambda: prctl(_PR_SET_NO_NEW_PRIVS, 1), required=True)
        self._layer(layers, "landlock", self._restrict_files, required=False)
        self._layer(layers, "fork_metering", lambda: self._meter_forks(supervisor), required=True)
        self._layer(layers, "seccomp", self._filter_calls, required=True)
        return layers

    def _layer(self, layers: dict[str, str | bool], name: str, enter: Callable[[], object], *, required: bool) -> None:
        if name in self._without:
            problem: object = "left out"
        else:
            try:
                detail = enter()
                layers[name] = detail if isinstance(detail, str) else True
                return
            except OSError as error:
                problem = error
        layers[name] = False
        if required and not self._unsafe:
            raise ConfinementError(
                f"layer {name} of the sandbox is not available here: {problem}; unsafe=True would go without"
            )

    def _limit_resources(self) -> None:
        for kind, value in (
            (resource.RLIMIT_AS, self._address_space),
            (resource.RLIMIT_CPU, self._lifetime_cpu_s),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
            (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
            (resource.RLIMIT_STACK, 64 << 20),
        ):
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))

    def _drop_capabilities(self) -> None:
        try:
            prctl(_PR_CAP_AMBIENT, 4)  # CLEAR_ALL
            for capability in range(64):
                prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # past the last one, or none to drop from: what counts is the empty set below
            pass
        if self._arch is None:
            raise OSError(errno.ENOSYS, "unknown architecture")
        header, empty = struct.pack("Ii", 0x20080522, 0), bytes(24)
        _syscall(_CAPSET[self._arch], header, empty)

    def _restrict_files(self) -> str:
        if self._ruleset is None:
            raise OSError(errno.ENOSYS, "Landlock is not available")
        _syscall(_LANDLOCK_RESTRICT, self._ruleset, 0)
        os.close(self._ruleset)
        return f"ABI {landlock_abi()}"

    def _meter_forks(self, supervisor: socket.socket) -> None:
        listener = seccomp.install(self._metering, listener=True)
        try:
            socket.send_fds(supervisor, [b"f"], [listener])
        finally:
            os.close(listener)

    def _filter_calls(self) -> str:
        seccomp.install(self._allow_list)
        return str(self._arch)


def _drop_identity() -> str:
    """Become nobody when we are the host's root; a process of an ordinary user stays that user."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(_PR_SET_DUMPABLE, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # again: the change of user has cleared it
    return str(os.geteuid())


def own_address_space() -> int:
    """Bytes of address space this process has now; the limit on memory counts from here. Needs /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 512 << 20


def verify() -> dict[str, bool]:
    """Try what must not work, from inside. True means that it failed, as it must."""
    attempts: dict[str, Callable[[], object]] = {
        "no_network": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close(),
        "no_host_files": lambda: os.close(os.open("/etc/passwd", os.O_RDONLY)),
        "no_writing": lambda: os.close(os.open("probe", os.O_WRONLY | os.O_CREAT)),
        "no_exec": lambda: os.execv("/bin/true", ["true"]),
        "no_signals": lambda: os.kill(os.getppid(), signal.SIGCONT),
        "no_fork": _try_fork,
    }
    return {name: _fails(attempt) for name, attempt in attempts.items()}


def _try_fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _fails(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return True
    return False
