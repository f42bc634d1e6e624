"""What hostile programs may try to reach, made real: listeners, files, a victim process. Tells what was reached."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SECRET = "sk-" + "the-secret-of-the-host"
NOBODY = 65534  # what sandboxed code of root becomes: the victim is no better protected than a process of that user
_VICTIM_ANSWERS_S = 10.0

_VICTIM = f"""
import ctypes, os, signal, sys
heard = []
for number in range(1, 65):
    try:
        signal.signal(number, lambda number, frame: heard.append(number))
    except (OSError, ValueError):
        pass
memory = ctypes.create_string_buffer(sys.argv[1].encode())
if os.geteuid() == 0:
    os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: may be traced by its own user
print(ctypes.addressof(memory), flush=True)
for line in sys.stdin:
    print(heard, memory.value.decode("latin-1"), flush=True)
"""

_PRELUDE = """
import ctypes, os, select, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def escaped(what=""): print("ESC" + "APED", what)
FORGED = "a " + "forged answer"
def frames():
    poller = select.poll()
    for fd in range(3, 128): poller.register(fd, select.POLLIN)
    return [fd for fd, event in poller.poll(0) if not event & select.POLLNVAL] or list(range(3, 128))
def frame(body):
    body = body if isinstance(body, bytes) else body.encode()
    return struct.pack(">I", len(body)) + body
def write_frame(body):
    for fd in range(3, 128):
        try: os.write(fd, frame(body))
        except OSError: pass
"""

EFFECTS = ("connection", "file", "secret", "signal", "memory", "escape", "forgery")


class World:
    """Made once for many programs; `reached(text)` names the effects since the last call, and sets all up again."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        self.folder.chmod(0o777)
        (self.folder / "secret.txt").write_text(SECRET)
        (self.folder / "secret.txt").chmod(0o666)
        (self.folder / "link").symlink_to(SECRET)
        (self.folder / f"{SECRET}.name").touch()
        self._listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self._unix = str(self.folder / "listener")
        self._listeners[1].bind(self._unix)
        os.chmod(self._unix, 0o777)
        self._abstract = f"\0hostile-{os.getpid()}-{id(self)}"
        self._listeners.append(socket.socket(socket.AF_UNIX))
        self._listeners[2].bind(self._abstract)
        for listener in self._listeners:
            listener.listen(64)
            listener.setblocking(False)
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", 0))
        self._udp.setblocking(False)
        self._start_victim()
        self._files = self._look_at_files()

    def _start_victim(self) -> None:
        self.victim = subprocess.Popen(
            [sys.executable, "-c", _VICTIM, SECRET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.victim.stdout is not None
        self._address = int(self.victim.stdout.readline())

    def prelude(self) -> str:
        values = {
            "PORT": self._listeners[0].getsockname()[1],
            "UDP": self._udp.getsockname()[1],
            "UNIX": self._unix,
            "ABSTRACT": self._abstract,
            "FOLDER": str(self.folder),
            "SECRET_FILE": str(self.folder / "secret.txt"),
            "SECRET_LINK": str(self.folder / "link"),
            "VICTIM": self.victim.pid,
            "DRIVER": os.getpid(),
            "ADDRESS": self._address,
            "SIZE": len(SECRET),
        }
        return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + _PRELUDE

    def reached(self, text: str) -> set[str]:
        """Effects that are there now; `text` is all that the program could say."""
        found = {
            effect
            for effect, word in (("secret", SECRET), ("escape", "ESC" + "APED"), ("forgery", "a " + "forged answer"))
            if word in text
        }
        if self._heard_something():
            found.add("connection")
        if (files := self._look_at_files()) != self._files:
            found.add("file")
            self._files = files
        return found | self._harm_to_victim()

    def close(self) -> None:
        for listener in (*self._listeners, self._udp):
            listener.close()
        self._end_victim()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _heard_something(self) -> bool:
        heard = False
        for listener in self._listeners:
            try:
                listener.accept()[0].close()
                heard = True
            except BlockingIOError:
                pass
        try:
            self._udp.recv(1)
            heard = True
        except BlockingIOError:
            pass
        return heard

    def _look_at_files(self) -> list[tuple]:
        """All that a program could change in the folder and in the library it is shown."""
        library = Path(os.__file__)
        seen: list[tuple] = [(library.stat().st_size, library.stat().st_mtime_ns, sorted(os.listdir(library.parent)))]
        for path in sorted(self.folder.iterdir()):
            state = path.lstat()
            content = path.read_bytes() if path.is_file() else b""
            seen.append((path.name, state.st_mode, state.st_uid, state.st_mtime_ns, content))
        return seen

    def _harm_to_victim(self) -> set[str]:
        assert self.victim.stdin is not None and self.victim.stdout is not None
        try:
            state = Path(f"/proc/{self.victim.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in "tTZ":
                raise BrokenPipeError
            self.victim.stdin.write("?\n")
            self.victim.stdin.flush()
            answer = self.victim.stdout.readline()
        except (BrokenPipeError, FileNotFoundError):
            answer = ""
        found = set()
        if not answer.startswith("[] "):
            found.add("signal")
        elif answer != f"[] {SECRET}\n":
            found.add("memory")
        if found:
            self._end_victim()
            self._start_victim()
        return found

    def _end_victim(self) -> None:
        assert self.victim.stdin is not None and self.victim.stdout is not None
        self.victim.kill()
        self.victim.wait(_VICTIM_ANSWERS_S)
        self.victim.stdin.close()
        self.victim.stdout.close()


def may_trace() -> bool:
    """Whether a process may read the memory of another of its user here, so that a control can."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return ctypes.CDLL(None).geteuid() == 0 or not scope.exists() or scope.read_text().strip() == "0"
