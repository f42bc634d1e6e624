"""The exec'd program that episodes are forked from: a clean process with one thread, no secrets and the modules loaded.

It never runs agent code and never reads from a process that does. Per episode it forks a *keeper* (process 1 of the
episode's pid namespace where there is one), and the keeper forks the *state holder*, which gives up its privileges
and serves the driver. The keeper answers the holder's forks (only as many as the driver granted) and takes the whole
episode down with it when the driver lets go of the control socket, or dies.

    driver --control--> zygote --clone--> keeper --fork--> state holder --fork--> candidates
       |________________________control____|                |______________________|
       |________________________frames______________________|

The driver starts it as `python -s -P -S -B -c BOOT <fd>`; see `session.py`. Nothing here is imported by the driver.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import os
import random
import select
import signal
import socket
import sys
import tempfile
import types
from typing import Any

from envs.sandbox import confine, namespaces, seccomp, wire

_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache")
_LISTENER_WAIT_S = 10.0
_HUGE_BYTES, _MADV_COLLAPSE = 2 << 20, 25


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    received = wire.receive(control)
    if received is None:
        return
    try:
        zygote = Zygote(control, received[0])
    except Exception as error:
        wire.send(control, {"failed": f"{type(error).__name__}: {error}"})
        return
    wire.send(control, {"ready": True})
    zygote.serve()


class Zygote:
    """`config`: paths, modules, sources, tool_names, limits, unsafe, without; see `session.Sandbox`."""

    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self._control, self._config = control, config
        limits, without = config["limits"], set(config["without"])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.argv = [""]
        sys.path[:] = config["paths"]
        _prefer_for_oom_kill()
        self._layers = namespaces.enter(without)
        _load(config["modules"], config["sources"])
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            raise RuntimeError(
                f"loading {config['modules']} started {threads - 1} threads; a process with threads cannot be forked"
            )
        gc.collect()
        _use_huge_pages()
        address_space_bytes = confine.own_address_space() + (limits["memory_mb"] << 20)
        visible = _visible(config["paths"])
        private_root = bool(self._layers["mount_namespace"]) and namespaces.enter_private_root(visible)
        self._layers["private_root"] = private_root
        if self._layers["uts_namespace"]:
            socket.sethostname("sandbox")
        self._scratch = None
        if not private_root:
            self._scratch = tempfile.mkdtemp(prefix="sandbox-")
            os.chmod(self._scratch, 0o755)
            os.chdir(self._scratch)
        self._confinement = confine.Confinement(
            readable=[*visible, os.getcwd()],
            private_root=private_root,
            address_space_bytes=address_space_bytes,
            cpu_s=limits["cpu_s"],
            unsafe=config["unsafe"],
            without=without,
        )
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
        gc.collect()
        gc.disable()
        gc.freeze()  # a collection in a fork would touch, and so copy, every page

    def serve(self) -> None:
        """Fork an episode per request until the driver goes away."""
        while (received := wire.receive(self._control)) is not None:
            request, fds = received
            if len(fds) != 2:
                raise wire.WireError(f"an episode needs 2 descriptors, got {len(fds)}")
            pid = namespaces.fork_in_pid_namespace() if self._layers["pid_namespace"] else os.fork()
            if pid == 0:
                try:
                    self._control.close()
                    self._keep(socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1]), request)
                finally:
                    os._exit(1)
            for fd in fds:
                os.close(fd)
        if self._scratch is not None:
            os.rmdir(self._scratch)

    def _keep(self, control: socket.socket, frames: socket.socket, request: dict[str, Any]) -> None:
        os.setsid()
        confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            try:
                control.close()
                ours.close()
                self._hold(frames, theirs, request)
            finally:
                os._exit(1)
        frames.close()
        theirs.close()
        _supervise(control, ours)

    def _hold(self, frames: socket.socket, supervisor: socket.socket, request: dict[str, Any]) -> None:
        from envs.sandbox import child

        confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
        _seed(request["seed"])
        try:
            layers = self._confinement.enter(supervisor)
        except confine.ConfinementError as error:
            wire.send(frames, {"failed": str(error)})
            return
        supervisor.close()
        hello: dict[str, Any] = {"hello": True}
        if request["probe"]:
            libraries = {"lazy_imports": _readable(self._config["paths"])}
            hello["layers"] = {**self._layers, **layers, **confine.verify(), **libraries}
        gc.enable()
        wire.send(frames, hello)
        child.serve(
            frames,
            tool_names=self._config["tool_names"],
            limits=self._config["limits"],
            modules=self._config["modules"],
        )


def _supervise(control: socket.socket, holder: socket.socket) -> None:
    """Answer forks from the driver's grants until the driver goes away, then end the episode. Never returns.

    Each packet on `control` is one byte: how many forks are granted from now on.
    """
    listener = _receive_listener(holder)
    holder.close()
    grants = 0
    poller = select.poll()
    poller.register(control, select.POLLIN)
    if listener is not None:
        poller.register(listener, select.POLLIN)
    control.setblocking(False)
    while True:
        ready = dict(poller.poll())
        # Grants first: the driver sends a grant before the command that needs it, and revokes it before code runs.
        try:
            while packet := control.recv(1):
                grants = packet[0]
            break
        except BlockingIOError:
            pass
        except OSError:
            break
        if listener is not None and listener in ready:
            if ready[listener] & select.POLLIN:
                grants -= seccomp.answer_fork(listener, grants > 0)
            else:  # no process is left under the filter
                poller.unregister(listener)
    os.killpg(0, signal.SIGKILL)  # everything, where no pid namespace dies with us
    os._exit(0)


def _receive_listener(holder: socket.socket) -> int | None:
    holder.settimeout(_LISTENER_WAIT_S)
    try:
        _, fds, _, _ = socket.recv_fds(holder, 1, 1)
    except OSError:
        return None
    return fds[0] if fds else None


def _load(modules: list[str], sources: dict[str, str]) -> None:
    for name, text in sources.items():
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(text, f"<{name}>", "exec", dont_inherit=True), module.__dict__)
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:  # allowed, but not installed here: the code's own import will say so
            continue
    if "numpy" in sys.modules:
        for name in ("numpy.random", "numpy.linalg", "numpy.fft"):
            importlib.import_module(name)
    for name in ("encodings.idna", "unicodedata", "linecache", "traceback", "envs.sandbox.child"):
        importlib.import_module(name)


def _seed(seed: int) -> None:
    """`random` and `numpy.random` start from the seed, and so do generators that code makes without one."""
    random.seed(seed)
    if "numpy" not in sys.modules:
        return
    from numpy import random as numpy_random

    numpy_random.seed(seed % 2**32)
    seeds, make = numpy_random.RandomState(seed % 2**32), numpy_random.default_rng

    @functools.wraps(make)
    def default_rng(seed: Any = None) -> Any:
        return make(seeds.randint(1 << 32, size=4, dtype="uint64") if seed is None else seed)

    numpy_random.default_rng = default_rng


def _use_huge_pages() -> None:
    """Put what is loaded on huge pages: a fork then copies, and an exit frees, a few entries instead of thousands.

    Works on what this process holds now, whatever the machine's setting. Kernels before 6.1 refuse it; nothing is lost.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with open("/proc/self/maps") as file:
            regions = [line.split() for line in file]
    except OSError:
        return
    for span, rights, *rest in regions:
        if rights == "rw-p" and (len(rest) == 3 or rest[3] == "[heap]"):  # anonymous
            start, end = (int(address, 16) for address in span.split("-"))
            for address in range(-(-start // _HUGE_BYTES) * _HUGE_BYTES, end - _HUGE_BYTES + 1, _HUGE_BYTES):
                libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(_HUGE_BYTES), _MADV_COLLAPSE)


def _visible(paths: list[str]) -> list[str]:
    """The directories a lazy import may need, without those that lie beneath another."""
    candidates = {os.path.abspath(path) for path in (*paths, os.path.join(sys.base_prefix, "lib"))} | set(_LIBRARIES)
    candidates |= {os.path.realpath(path) for path in candidates}
    links = {path for path in ("/lib", "/lib64") if os.path.islink(path)}  # made again as links
    kept: list[str] = []
    for path in sorted(path for path in candidates - links if os.path.exists(path) and path != "/"):
        if not any(path.startswith(parent + "/") for parent in kept):
            kept.append(path)
    return kept


def _readable(paths: list[str]) -> bool:
    try:
        for path in paths:
            os.listdir(path)
    except OSError:
        return False
    return True


def _prefer_for_oom_kill() -> None:
    """When the machine runs out of memory, sandboxes go before whatever started them."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass
