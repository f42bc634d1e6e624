"""The system-call filter of confined processes, as classic BPF, for x86_64 and aarch64. No library is needed.

Two filters are stacked. The first sends every `clone` to a supervisor through seccomp's user notification, so that a
confined process forks only while the driver has granted it a fork. The second is an allow-list: calls that are not on
it fail with EPERM, which reads as a `PermissionError` in the code and keeps the episode alive. There are no sockets,
no exec, no signals to others, no threads, no writable files and no shared memory on it, and nothing that asks after
another process.

See seccomp(2), Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct

_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64); None where the architecture does not have the call
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "pread64": (17, 67), "readv": (19, 65),
    "writev": (20, 66), "fstat": (5, 80), "newfstatat": (262, 79), "stat": (4, None), "lstat": (6, None),
    "statx": (332, 291), "getdents64": (217, 61), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "getcwd": (79, 17), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "close_range": (436, 436), "poll": (7, None), "ppoll": (271, 73), "select": (23, None),
    "pselect6": (270, 72), "recvmsg": (47, 212), "brk": (12, 214), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "getrlimit": (97, 163), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "sigaltstack": (131, 132), "setitimer": (38, 103),
    "getitimer": (36, 102), "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98), "set_robust_list": (273, 99),
    "rseq": (334, 293), "sched_yield": (24, 124), "restart_syscall": (219, 128),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getpgrp": (111, None),
    "uname": (63, 160), "sysinfo": (99, 179), "getrusage": (98, 165), "times": (100, 153),
    "getresuid": (118, 148), "getresgid": (120, 150), "getcpu": (309, 168), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "getrandom": (318, 278),
}  # fmt: skip
_CHECKED: dict[str, tuple[int | None, int | None]] = {
    "openat": (257, 56), "mmap": (9, 222), "mprotect": (10, 226), "fcntl": (72, 25), "ioctl": (16, 29),
    "prlimit64": (302, 261), "sendto": (44, 206), "clone": (56, 220), "clone3": (435, 435), "readlink": (89, None),
    "readlinkat": (267, 78), "clock_gettime": (228, 113), "clock_getres": (229, 114), "getpgid": (121, 155),
    "getsid": (124, 156), "sched_getaffinity": (204, 123),
}  # fmt: skip
_SECCOMP = {"x86_64": 317, "aarch64": 277}

_FORK_FLAGS = (0x01200011, 0x11)  # glibc's fork (CHILD_SETTID | CHILD_CLEARTID | SIGCHLD) and musl's (SIGCHLD)
_OPEN_TO_WRITE = 0o3 | os.O_CREAT | os.O_TRUNC | 0o20000000  # access mode, O_CREAT, O_TRUNC, __O_TMPFILE
_PROT_WRITE, _PROT_EXEC, _MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB = 2, 4, 1, 0x20, 0x40000
_F_ALLOWED = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no locks, no leases
_TERMINAL = (0x5401, 0x5413)  # TCGETS, TIOCGWINSZ: "not a terminal"
_FIOCLEX, _FIONCLEX, _FIONBIO = 0x5451, 0x5450, 0x5421

_LOAD, _AND, _JEQ, _JGE, _JSET, _RET = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _NOTIFY = 0x7FFF0000, 0x80000000, 0x7FC00000
_NR, _ARCH = 0, 4  # offsets in struct seccomp_data

_NOTIF_RECV, _NOTIF_SEND = 0xC0502100, 0xC0182101
_NOTIF_BYTES = 80
_FLAG_CONTINUE = 1

Instruction = tuple[int, int, int, int]


def machine() -> str | None:
    """The architecture, if there are tables for it."""
    name = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return name if name in _ARCHES and struct.calcsize("P") == 8 else None


def metering_filter(arch: str) -> bytes:
    """Every `clone` asks the supervisor; the rest is left to the other filter."""
    clone = _number("clone", arch)
    return _pack([*_check_arch(arch), _load(_NR), (_JEQ, 0, 1, clone), _ret(_NOTIFY), _ret(_ALLOW)])


def allow_list_filter(arch: str, *, may_open: bool, may_read_links: bool = True) -> bytes:
    """The allow-list. `may_open=False` denies opening files at all, for kernels without Landlock.

    `may_read_links=False` denies reading the target of a link, which Landlock does not: where the root is the host's.
    """
    program = [*_check_arch(arch), _load(_NR)]
    if arch == "x86_64":
        program += [(_JGE, 0, 1, 0x40000000), _deny(errno.ENOSYS)]  # the x32 calls
    blocks = _checked_blocks(may_open, may_read_links)
    for name in _ALLOWED:
        number = _ALLOWED[name][list(_ARCHES).index(arch)]
        if number is not None:
            program += [(_JEQ, 0, 1, number), _ret(_ALLOW)]
    for name, block in blocks.items():
        checked = _CHECKED[name][list(_ARCHES).index(arch)]
        if checked is not None:
            program += [(_JEQ, 0, len(block), checked), *block]
    return _pack([*program, _deny(errno.EPERM)])


def _checked_blocks(may_open: bool, may_read_links: bool) -> dict[str, list[Instruction]]:
    """What is asked of the arguments of calls that are allowed in part; each block ends in a return."""
    low = lambda index: _load(16 + 8 * index)  # noqa: E731  (both architectures are little-endian)
    high = lambda index: _load(20 + 8 * index)  # noqa: E731
    ok, no = _ret(_ALLOW), _deny(errno.EPERM)
    of_oneself = [low(0), (_JEQ, 0, 1, 0), ok, no]
    read_link = [ok if may_read_links else _deny(errno.EACCES)]
    one_of = lambda values, then: [step for value in values for step in ((_JEQ, 0, 1, value), then)]  # noqa: E731
    return {
        "openat": [
            *([] if may_open else [_deny(errno.EACCES)]),
            low(2), (_JSET, 0, 1, _OPEN_TO_WRITE), _deny(errno.EROFS), ok,
        ],
        # No memory that is both writable and executable, no anonymous code. Shared memory only of files, which cannot
        # be opened to write: anonymous one could be made writable later, and would join candidates to each other.
        "mmap": [
            low(3), (_JSET, 0, 1, _MAP_HUGETLB), no,
            (_AND, 0, 0, _MAP_SHARED | _MAP_ANONYMOUS), (_JEQ, 0, 1, _MAP_SHARED | _MAP_ANONYMOUS), no,
            low(2), (_AND, 0, 0, _PROT_WRITE | _PROT_EXEC), (_JEQ, 0, 1, _PROT_WRITE | _PROT_EXEC), no,
            low(3), (_JSET, 0, 3, _MAP_SHARED), low(2), (_JSET, 0, 1, _PROT_WRITE), no,
            low(3), (_JSET, 0, 3, _MAP_ANONYMOUS), low(2), (_JSET, 0, 1, _PROT_EXEC), no, ok,
        ],
        "mprotect": [low(2), (_JSET, 0, 1, _PROT_EXEC), no, ok],
        "fcntl": [low(1), *one_of(_F_ALLOWED, ok), no],
        "ioctl": [low(1), *one_of(_TERMINAL, _deny(errno.ENOTTY)), *one_of((_FIOCLEX, _FIONCLEX, _FIONBIO), ok), no],
        "prlimit64": [low(2), (_JEQ, 0, 4, 0), high(2), (_JEQ, 0, 2, 0), low(0), (_JEQ, 1, 0, 0), no, ok],
        "sendto": [low(4), (_JEQ, 0, 2, 0), high(4), (_JEQ, 1, 0, 0), no, ok],  # to the connected peer only
        "clone": [low(0), *one_of(_FORK_FLAGS, ok), _deny(errno.EAGAIN)],  # no threads, no namespaces
        "clone3": [_deny(errno.ENOSYS)],
        "readlink": read_link,
        "readlinkat": read_link,
        # negative ids are clocks of processes and threads, others' too
        "clock_gettime": [low(0), (_JGE, 0, 1, 1 << 31), no, ok],
        "clock_getres": [low(0), (_JGE, 0, 1, 1 << 31), no, ok],
        "getpgid": of_oneself,
        "getsid": of_oneself,
        "sched_getaffinity": of_oneself,
    }  # fmt: skip


def install(program: bytes, *, listener: bool = False) -> int:
    """Put a filter in force for this thread and all it forks; no_new_privs must be set. Returns the listener's fd.

    Raises `OSError` when the kernel (or an outer sandbox) refuses.
    """
    arch = machine()
    if arch is None:
        raise OSError(errno.ENOSYS, f"no seccomp tables for {platform.machine()}")
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(_SECCOMP[arch], 1, 8 if listener else 0, header)  # SET_MODE_FILTER, FLAG_NEW_LISTENER
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
    return result


def answer_fork(listener: int, granted: bool) -> bool:
    """Answer one waiting `clone`: let it go on, or fail with EAGAIN. Returns whether a fork was let through."""
    notification = bytearray(_NOTIF_BYTES)
    try:
        fcntl.ioctl(listener, _NOTIF_RECV, notification)
        (cookie,) = struct.unpack_from("Q", notification)
        # CONTINUE is safe here: what the kernel then checks is in registers, which nobody else can change.
        answer = (
            struct.pack("QqiI", cookie, 0, 0, _FLAG_CONTINUE)
            if granted
            else struct.pack("QqiI", cookie, 0, -errno.EAGAIN, 0)
        )
        fcntl.ioctl(listener, _NOTIF_SEND, answer)
    except OSError:  # the process died while it was waiting
        return False
    return granted


def _number(name: str, arch: str) -> int:
    number = _CHECKED[name][list(_ARCHES).index(arch)]
    assert number is not None, f"{arch} has no {name}"
    return number


def _check_arch(arch: str) -> list[Instruction]:
    return [_load(_ARCH), (_JEQ, 1, 0, _ARCHES[arch]), _ret(_KILL)]


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _ret(action: int) -> Instruction:
    return (_RET, 0, 0, action)


def _deny(number: int) -> Instruction:
    return _ret(0x00050000 | number)


def _pack(program: list[Instruction]) -> bytes:
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
