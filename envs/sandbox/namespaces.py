"""Namespaces and a private root for the zygote and all that it forks; each is tried by itself and reported.

As root the namespaces are taken directly (processes that run code then become nobody); as an ordinary user they hang
off a user namespace. What is refused (most containers refuse all of it) is left out: seccomp and Landlock stand
without it.

See user_namespaces(7), mount_namespaces(7), pivot_root(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Sequence

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MS_NOEXEC = 8  # the same bit in mount(2) and statvfs(3)
_MNT_DETACH = 2
_CLONE = {"x86_64": 56, "aarch64": 220}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)
_api = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock: needed around a raw clone


def enter(without: set[str]) -> dict[str, str | bool]:
    """Leave the host's namespaces, before anything else is imported. Returns which could be left."""
    layers: dict[str, str | bool] = {}
    if os.geteuid() == 0:
        layers["user_namespace"] = "not needed"  # root leaves the others directly, and confined code is not root
    else:
        layers["user_namespace"] = "user_namespace" not in without and _enter_user_namespace()
    for name, flag in (
        ("mount_namespace", _NEWNS),
        ("network_namespace", _NEWNET),
        ("ipc_namespace", _NEWIPC),
        ("uts_namespace", _NEWUTS),
        ("cgroup_namespace", _NEWCGROUP),
    ):
        layers[name] = name not in without and _libc.unshare(flag) == 0
    layers["pid_namespace"] = "pid_namespace" not in without and _probe_pid_namespace()
    return layers


def _enter_user_namespace() -> bool:
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_NEWUSER) != 0:
        return False
    try:
        for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    except OSError:
        return False
    return True


def fork_in_pid_namespace() -> int:
    """`os.fork()`, with the child as process 1 of a new pid namespace. Raises `OSError`."""
    _api.PyOS_BeforeFork()
    pid = _api.syscall(_CLONE[platform.machine()], _NEWPID | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        _api.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    _api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


def _probe_pid_namespace() -> bool:
    if platform.machine() not in _CLONE:
        return False
    try:
        pid = fork_in_pid_namespace()
    except OSError:
        return False
    if pid == 0:
        os._exit(0 if os.getpid() == 1 else 1)
    return os.waitpid(pid, 0)[1] == 0


def enter_private_root(visible: Sequence[str]) -> bool:
    """Make a read-only root that holds nothing but `visible` (read-only) and an empty /tmp, and move there.

    Needs a mount namespace of our own. False when the kernel refuses; the old root is then still in place.
    """
    base = next((path for path in ("/tmp", "/mnt", "/var") if os.path.isdir(path)), None)
    if base is None or platform.machine() not in _PIVOT_ROOT:
        return False
    try:
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        sources = _open_all(visible)  # before the new root hides what may lie beneath its mount point
        _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
        for link in ("/lib", "/lib64"):
            if os.path.islink(link):
                os.makedirs(os.path.join(base, os.readlink(link).lstrip("/")), exist_ok=True)
                os.symlink(os.readlink(link), base + link)
        for path, source in sources:
            _bind(source, base + path)
        os.makedirs(base + "/tmp", exist_ok=True)
        _mount(None, base, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
        os.chdir(base)
        _check(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
        _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
        os.chdir("/tmp")
    except OSError:
        return False
    return True


def _open_all(paths: Sequence[str]) -> list[tuple[str, int]]:
    opened = []
    for path in paths:
        try:
            opened.append((path, os.open(path, os.O_PATH | os.O_CLOEXEC)))
        except OSError:
            continue
    return opened


def _bind(source: int, target: str) -> None:
    if os.path.isdir(f"/proc/self/fd/{source}"):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))
    _mount(f"/proc/self/fd/{source}", target, None, _MS_BIND | _MS_REC)
    os.close(source)
    kept = os.statvfs(target).f_flag & _MS_NOEXEC  # a remount in a user namespace may not take it away
    _mount(None, target, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | kept)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encode = lambda text: None if text is None else os.fsencode(text)  # noqa: E731
    _check(
        _libc.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data)),
        f"mount {target}",
    )


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
