"""Other processes and the kernel: starting them, signalling and tracing them, more privilege, native code."""

from __future__ import annotations

from hostile import collect

# system calls by number exist for x86_64; elsewhere these fail for another reason, which is no worse
_MARK = "['touch', FOLDER + '/mark']"

STARTS = collect(
    "start",
    "file",
    {
        "subprocess": f"import subprocess\nsubprocess.run({_MARK})",
        "system": "os.system(f'touch {FOLDER}/mark')",
        "popen": "os.popen(f'touch {FOLDER}/mark').read()",
        "exec": f"os.execvp('touch', {_MARK})",
        "posix_spawn": f"os.waitpid(os.posix_spawnp('touch', {_MARK}, {{}}), 0)",
        "system of C": "libc.system(f'touch {FOLDER}/mark'.encode())",
        "popen of C": "libc.popen(f'touch {FOLDER}/mark'.encode(), b'r')",
        "asyncio": f"import asyncio\nasyncio.run(asyncio.create_subprocess_exec(*{_MARK}))",
        "pty": f"import pty\npty.spawn({_MARK})",
        "sympify": """import sympy\nsympy.sympify("__import__('os').system('touch " + FOLDER + "/mark')")""",
        "lambdify": """import sympy\nsympy.lambdify([], "__import__('os').system('touch " + FOLDER + "/mark')")()""",
        "pickle": """
import pickle
class Payload:
    def __reduce__(self): return os.system, (f'touch {FOLDER}/mark',)
pickle.loads(pickle.dumps(Payload()))
""",
        "numpy load": """
import io, numpy
class Payload:
    def __reduce__(self): return os.system, (f'touch {FOLDER}/mark',)
stream = io.BytesIO()
numpy.save(stream, numpy.array([Payload()], dtype=object)); stream.seek(0)
numpy.load(stream, allow_pickle=True)
""",
        "answer that is a payload": """
class Payload(str):
    def __reduce__(self): return os.system, (f'touch {FOLDER}/mark',)
    def __str__(self): return Payload('x')
    def __reduce_ex__(self, version): return os.system, (f'touch {FOLDER}/mark',)
final_answer(Payload('x'))
""",
        "value that looks like code": """
class Text:
    def __str__(self): return f"__import__('os').system('touch {FOLDER}/mark')"
Text()
""",
        "value that looks like a pickle": """
class Text:
    def __str__(self): return f"cos\\nsystem\\n(S'touch {FOLDER}/mark'\\ntR."
Text()
""",
        "subclasses": f"""
popen = [found for found in object.__subclasses__() if found.__name__ == 'Popen']
import subprocess
(popen or [subprocess.Popen])[0]({_MARK}).wait()
""",
        "frames of the callers": """
import inspect
for info in inspect.stack():
    for value in info.frame.f_globals.values():
        if value is os: value.system(f'touch {FOLDER}/mark')
""",
        "builtins of a function": "print.__self__.__import__('os').system(f'touch {FOLDER}/mark')",
        "webbrowser": "import webbrowser\nwebbrowser.GenericBrowser(['touch', '%s']).open(FOLDER + '/mark')",
    },
) + collect(
    "start",
    "escape",
    {
        "fork": "if os.fork() >= 0: escaped()",
        "fork bomb": """
for _ in range(300):
    try:
        os.fork(); escaped()
    except OSError: pass
""",
        "vfork": "if libc.syscall(58) > 0: escaped()",
        "double fork that outlives the step": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time; time.sleep(30)
    os._exit(0)
escaped()
""",
        "forkpty": "import pty\npty.fork(); escaped()",
        "clone with memory shared": "if libc.syscall(56, 0x100 | 0x4000 | 17, 0, 0, 0, 0) > 0: escaped()",
        "clone into namespaces": "if libc.syscall(56, 0x10000000 | 0x20000000 | 17, 0, 0, 0, 0) > 0: escaped()",
        "clone with the parent's parent": "if libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0) > 0: escaped()",
        "clone with a pidfd": "if libc.syscall(56, 0x1000 | 17, 0, bytes(8), 0, 0) > 0: escaped()",
        "clone3": "if libc.syscall(435, struct.pack('8Q', 0, 0, 0, 0, 17, 0, 0, 0), 64) > 0: escaped()",
        "multiprocessing": """
import multiprocessing
process = multiprocessing.get_context('fork').Process(target=print)
process.start(); escaped()
""",
        "process pool": """
import concurrent.futures
with concurrent.futures.ProcessPoolExecutor(1) as pool: pool.submit(abs, 1).result(1)
escaped()
""",
        "execveat of memory": """
fd = libc.syscall(319, b'x', 0)
if fd >= 0: escaped()
if libc.syscall(322, fd, b'', 0, 0, 0x1000) >= 0: escaped()
""",
        "exec of a library": """
libc.execv(b'/lib64/ld-linux-x86-64.so.2', None)
os.execv(sys.executable, ['x'])
escaped()
""",
    },
)

THREADS = collect(
    "threads",
    "escape",
    {
        "thread": "import threading\nthreading.Thread(target=print, daemon=True).start(); escaped()",
        "raw thread": "import _thread\n_thread.start_new_thread(print, ()); escaped()",
        "thread pool": """
import concurrent.futures
concurrent.futures.ThreadPoolExecutor(1).submit(abs, 1).result(1); escaped()
""",
        "pthread": """
run = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: 0)
if libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, run, None) == 0: escaped()
""",
        "clone a thread": "if libc.syscall(56, 0x3D0F00, 0, 0, 0, 0) > 0: escaped()",
        "timer that outlives the step": "import threading\nthreading.Timer(0.1, print).start(); escaped()",
        "faulthandler's watchdog": "import faulthandler\nfaulthandler.dump_traceback_later(0.1); escaped()",
        "asyncio to_thread": "import asyncio\nasyncio.run(asyncio.to_thread(abs, 1)); escaped()",
        "timer of the kernel": """
event = struct.pack('QiiQ', 0, 9, 0, 0) + bytes(48)
if libc.syscall(222, 1, event, bytes(8)) >= 0: escaped()
""",
    },
)

SIGNALS = collect(
    "signals",
    "signal",
    {
        "terminate": "os.kill(VICTIM, 15)",
        "kill": "os.kill(VICTIM, 9)",
        "stop": "os.kill(VICTIM, 19)",
        "everybody": "os.kill(-1, 15)",
        "a group": "os.killpg(os.getpgrp(), 0); os.killpg(VICTIM, 15)",
        "everybody in C": "libc.kill(-1, 10)",
        "raw tgkill": "libc.syscall(234, VICTIM, VICTIM, 15)",
        "raw tkill": "libc.syscall(200, VICTIM, 15)",
        "queued": "libc.syscall(129, VICTIM, 15, struct.pack('iii', 15, 0, -1) + bytes(116))",
        "queued to a thread": "libc.syscall(297, VICTIM, VICTIM, 15, struct.pack('iii', 15, 0, -1) + bytes(116))",
        "by pidfd": """
import signal
signal.pidfd_send_signal(os.pidfd_open(VICTIM), 15)
""",
        "by the owner of a descriptor": """
for fd in frames():
    libc.fcntl(fd, 8, VICTIM); libc.fcntl(fd, 10, 15); libc.fcntl(fd, 4, 0o20000)
""",
        "by a limit": "libc.syscall(302, VICTIM, 0, struct.pack('QQ', 0, 0), None)",
        "by a limit, Python's": "import resource\nresource.prlimit(VICTIM, resource.RLIMIT_CPU, (0, 0))",
        "by tracing": "libc.ptrace(16, VICTIM, 0, 0)",
        "by seizing": "libc.ptrace(0x4206, VICTIM, 0, 0); libc.ptrace(0x4207, VICTIM, 0, 0)",
        "by a message queue": """
queue = libc.syscall(240, b'hostile', 0o102, 0o600, None)
libc.syscall(244, queue, struct.pack('QiiQ', 0, 15, 0, 0) + bytes(48))
if queue >= 0: escaped()
""",
    },
) + collect(
    "signals",
    "escape",
    {
        "the parent": "os.kill(os.getppid(), 9); escaped()",
        "the keeper": "os.kill(1, 9); escaped()",
        "stop the parent": "os.kill(os.getppid(), 19); escaped()",
        "the driver": "os.kill(DRIVER, 0); escaped()",
        "a new session": "os.setsid(); escaped()",
        "a new group": "os.setpgid(0, 0); escaped()",
        "priority": "os.nice(-5); escaped()",
        "priority of the victim": "os.setpriority(os.PRIO_PROCESS, VICTIM, 19); escaped()",
        "scheduler": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)); escaped()",
        "affinity": "os.sched_setaffinity(VICTIM, {0}); escaped()",
    },
)

TRACING = (
    collect(
        "tracing",
        "memory",
        {
            "process_vm_writev": """
data = ctypes.create_string_buffer(b'X' * SIZE)
local = struct.pack('PN', ctypes.addressof(data), SIZE)
libc.syscall(311, VICTIM, local, 1, struct.pack('PN', ADDRESS, SIZE), 1, ctypes.c_ulong(0))
""",
            "memory in proc": """
with open(f'/proc/{VICTIM}/mem', 'r+b', 0) as memory:
    memory.seek(ADDRESS); memory.write(b'X' * SIZE)
""",
        },
    )
    + collect(
        "tracing",
        "secret",
        {
            "process_vm_readv": """
data = ctypes.create_string_buffer(SIZE)
local = struct.pack('PN', ctypes.addressof(data), SIZE)
libc.syscall(310, VICTIM, local, 1, struct.pack('PN', ADDRESS, SIZE), 1, ctypes.c_ulong(0))
data.raw
""",
            "memory in proc to read": """
with open(f'/proc/{VICTIM}/mem', 'rb', 0) as memory:
    memory.seek(ADDRESS); print(memory.read(SIZE))
""",
            "memory of the machine": """
print(open('/dev/mem', 'rb').read(99), open('/proc/kcore', 'rb').read(99))
escaped()
""",
        },
    )
    + collect(
        "tracing",
        "escape",
        {
            "trace oneself": "if libc.ptrace(0, 0, 0, 0) == 0: escaped()",
            "descriptor of another": """
pidfd = libc.syscall(434, VICTIM, 0)
if pidfd >= 0 or libc.syscall(438, pidfd, 1, 0) >= 0: escaped()
""",
            "compare with another": "if libc.syscall(312, os.getpid(), VICTIM, 0, 0, 0) >= 0: escaped()",
            "clock of another": "import time\ntime.clock_gettime((~VICTIM << 3) | 2); escaped()",
            "clock of the first": "import time\ntime.clock_gettime((~1 << 3) | 2); escaped()",
            "session of another": "os.getsid(VICTIM); escaped()",
            "group of another": "os.getpgid(VICTIM); escaped()",
            "affinity of another": "os.sched_getaffinity(VICTIM); escaped()",
            "list processes": "os.listdir('/proc'); escaped()",
            "perf": "if libc.syscall(298, bytes(128), VICTIM, -1, -1, 0) >= 0: escaped()",
            "bpf": "if libc.syscall(321, 0, bytes(128), 128) >= 0: escaped()",
            "userfaultfd": "if libc.syscall(323, 1) >= 0: escaped()",
            "move pages": "if libc.syscall(279, VICTIM, 0, None, None, None, 0) >= 0: escaped()",
            "kernel log": "if libc.syscall(103, 3, bytes(999), 999) > 0: escaped()",
        },
    )
)

PRIVILEGE = collect(
    "privilege",
    "escape",
    {
        "root again": "os.setuid(0); escaped()",
        "group again": "os.setgid(0); escaped()",
        "groups": "os.setgroups([0]); escaped()",
        "is it root": "if 0 in (os.getuid(), os.geteuid(), os.getgid(), os.getegid(), *os.getgroups()): escaped()",
        "capabilities": "if libc.syscall(126, struct.pack('Ii', 0x20080522, 0), b'\\xff' * 24) == 0: escaped()",
        "prctl": "if any(libc.prctl(option, 1, 0, 0, 0) == 0 for option in (4, 8, 15, 22, 36, 38, 59)): escaped()",
        "another filter": """
program = struct.pack('HBBI', 6, 0, 0, 0x7fff0000)
header = struct.pack('HxxxxxxP', 1, ctypes.addressof(ctypes.create_string_buffer(program)))
if libc.syscall(317, 1, 0, header) >= 0 or libc.syscall(444, None, 0, 1) >= 0: escaped()
""",
        "unshare": "if libc.unshare(0x10000000) == 0 or libc.unshare(0x40000000) == 0: escaped()",
        "setns": """
for kind in ('mnt', 'pid', 'net', 'user'):
    try: libc.setns(os.open(f'/proc/1/ns/{kind}', os.O_RDONLY), 0); escaped()
    except OSError: pass
""",
        "mounts": """
if libc.mount(None, b'/', None, 1 << 18, None) == 0 or libc.umount2(b'/', 2) == 0: escaped()
if libc.syscall(155, b'.', b'.') == 0 or libc.syscall(430, b'tmpfs', 0) >= 0: escaped()
""",
        "chroot": "os.chroot('/tmp'); escaped()",
        "keys": """
if libc.syscall(248, b'user', b'x', b'y', 1, -3) >= 0 or libc.syscall(250, 1, b'x') >= 0: escaped()
""",
        "the machine": """
if any(libc.syscall(number, *arguments) == 0 for number, arguments in {
    169: (0xfee1dead, 672274793, 0), 170: (b'x', 1), 171: (b'x', 1), 227: (0, bytes(16)), 163: (None,),
    175: (b'', 0, b''), 313: (0, b'', 0), 246: (0, 0, None, 0)}.items()): escaped()
""",
        "limits": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
    try: resource.setrlimit(kind, (-1, -1)); escaped(kind)
    except (OSError, ValueError): pass
""",
        "terminal": """
import fcntl
for fd in range(8):
    try: fcntl.ioctl(fd, 0x5412, b'x'); escaped()
    except OSError: pass
""",
        "name of the machine": "socket.sethostname('x'); escaped()",
        "personality": "if libc.personality(0x0400000) >= 0: escaped()",
        "ports": "if libc.iopl(3) == 0 or libc.syscall(154, 1, bytes(16), 16) >= 0: escaped()",
        "x32 calls": """
if libc.syscall(0x40000000 + 39) > 0: escaped()
if libc.syscall(0x40000000 + 520, b'/bin/true', 0, 0) >= 0: escaped()
""",
    },
)

NATIVE = collect(
    "native",
    "escape",
    {
        "code in fresh memory": """
libc.mmap.restype = ctypes.c_void_p
if libc.mmap(None, 4096, 7, 0x22, -1, 0) != 2 ** 64 - 1: escaped()
""",
        "code in memory made executable": """
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 4096, 3, 0x22, -1, 0)
if libc.mprotect(ctypes.c_void_p(page), 4096, 5) == 0: escaped()
if libc.syscall(329, ctypes.c_void_p(page), 4096, 5, -1) == 0: escaped()
""",
        "code over a library": """
address = ctypes.cast(libc.getpid, ctypes.c_void_p).value & ~4095
if libc.mprotect(ctypes.c_void_p(address), 4096, 7) == 0: escaped()
""",
        "code of a file of one's own": """
import tempfile
path = tempfile.mktemp(dir='/tmp')
open(path, 'wb').write(b'x'); ctypes.CDLL(path); escaped()
""",
        "compiler": "import _ctypes, sysconfig\n_ctypes.dlopen(FOLDER + '/x.so', 2); escaped()",
    },
)

PROGRAMS = [*STARTS, *THREADS, *SIGNALS, *TRACING, *PRIVILEGE, *NATIVE]
