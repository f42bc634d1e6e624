"""Resources: time, processor, memory, output, and what one step tries to leave behind for the next."""

from __future__ import annotations

from hostile import collect

TIME = collect(
    "time",
    "hang",
    {
        "loop": "while True: pass",
        "loop that catches": """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
        "loop in finally": """
def again():
    try: yield
    finally:
        while True:
            try:
                while True: pass
            finally: continue
for _ in again(): pass
""",
        "signals masked": """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: pass
""",
        "signals ignored": """
import signal
for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU, signal.SIGVTALRM): signal.signal(number, signal.SIG_IGN)
while True: pass
""",
        "timer taken away": """
import signal
signal.setitimer(signal.ITIMER_REAL, 0); signal.setitimer(signal.ITIMER_PROF, 0)
while True: pass
""",
        "handler that raises no more": """
import signal
signal.signal(signal.SIGALRM, lambda *_: None); signal.signal(signal.SIGPROF, lambda *_: None)
while True: pass
""",
        "loop in C": "sum(range(10 ** 12))",
        "power": "x = 10 ** 10 ** 9",
        "digits": "x = str(9 ** (1 << 22)) if sys.set_int_max_str_digits(0) is None else 0",
        "regular expression": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
        "factors": "import sympy\nsympy.factorint((2 ** 89 - 1) * (2 ** 107 - 1))",
        "sleep": "import time\ntime.sleep(1e6)",
        "sleep in C": "libc.sleep(1000000); libc.pause()",
        "lock": "import threading\nlock = threading.Lock(); lock.acquire(); lock.acquire()",
        "wait in select": "import select\nselect.select([], [], [])",
        "destructor": """
class Stay:
    def __del__(self):
        while True: pass
stay = Stay(); del stay
""",
        "text of the value": """
class Stay:
    def __str__(self):
        while True: pass
Stay()
""",
        "text of the error": """
class Stay(Exception):
    def __str__(self):
        while True: pass
raise Stay
""",
        "text of the answer": """
class Stay:
    def __str__(self):
        while True: pass
final_answer(Stay())
""",
        "after the answer": """
try: final_answer(1)
finally:
    while True: pass
""",
        "tracer": """
def trace(*_):
    while True: pass
sys.settrace(trace)
(lambda: 1)()
""",
        "profiler that catches": """
def profile(*_):
    try:
        while True: pass
    except BaseException: pass
sys.setprofile(profile)
while True: len('')
""",
        "the step's own timer object": """
import gc, time
for box in gc.get_objects():
    if type(box).__name__ == 'Interpreter': box._armed = False; box._limits['wall_s'] = box._limits['cpu_s'] = 1e9
while True: pass
""",
        "comparison": """
class Stay:
    def __lt__(self, other):
        while True: pass
sorted([Stay(), Stay()])
""",
        "read the driver's socket": """
for fd in frames(): os.read(fd, 1 << 20)
while True: pass
""",
    },
)

MEMORY = collect(
    "memory",
    "escape",
    {
        "text": "x = 'a' * 10 ** 11; escaped()",
        "array": "import numpy\nx = numpy.ones(10 ** 10); escaped()",
        "array that grows": """
import numpy
kept = []
for _ in range(4000): kept.append(numpy.ones(1 << 20, dtype='u1'))
escaped()
""",
        "mapping": """
libc.mmap.restype = ctypes.c_void_p
if libc.mmap(None, 1 << 36, 3, 0x22, -1, 0) != 2 ** 64 - 1: escaped()
""",
        "malloc": """
libc.malloc.restype = ctypes.c_void_p
if libc.malloc(ctypes.c_size_t(1 << 36)): escaped()
""",
        "huge pages": """
libc.mmap.restype = ctypes.c_void_p
if libc.mmap(None, 1 << 21, 3, 0x22 | 0x40000, -1, 0) != 2 ** 64 - 1: escaped()
""",
        "locked": "if libc.mlockall(3) == 0: escaped()",
        "shared memory of System V": """
if libc.shmget(0, 4096, 0o1600) >= 0 or libc.semget(0, 1, 0o1600) >= 0 or libc.msgget(0, 0o1600) >= 0: escaped()
""",
        "shared memory of POSIX": """
from multiprocessing import shared_memory
shared_memory.SharedMemory(create=True, size=9); escaped()
""",
        "shared and anonymous": "import mmap\nmmap.mmap(-1, 4096); escaped()",
        "shared, made writable later": """
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 4096, 1, 0x21, -1, 0)
if page != 2 ** 64 - 1 and libc.mprotect(ctypes.c_void_p(page), 4096, 3) == 0: escaped()
""",
        "file shared, made writable later": """
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 4096, 1, 1, os.open(os.__file__, os.O_RDONLY), 0)
if page != 2 ** 64 - 1 and libc.mprotect(ctypes.c_void_p(page), 4096, 3) == 0: escaped()
""",
        "descriptors": """
kept = []
try:
    while True: kept.append(os.dup(0))
except OSError: pass
if len(kept) > 200: escaped()
""",
        "pipes": "os.pipe(); escaped()",
        "events": "if libc.eventfd(0, 0) >= 0 or libc.epoll_create1(0) >= 0 or libc.inotify_init() >= 0: escaped()",
        "semaphore": "import multiprocessing\nmultiprocessing.Lock(); escaped()",
        "locks of files": "import fcntl\nfcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX); escaped()",
        "leases of files": "import fcntl\nfcntl.fcntl(os.open(os.__file__, os.O_RDONLY), 1024, 0); escaped()",
        "recursion": "def f(): return f()\nf()",
        "recursion without a limit": "sys.setrecursionlimit(10 ** 9)\ndef f(x): return f([x])\nf(0)",
        "nested data": "x = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)",
        "deep source": "eval('-' * 10 ** 5 + '1')",
        "wide source": "compile('x = ' + '+'.join(['1'] * 10 ** 5), 'x', 'exec')",
        "constant folding": "eval('((1 << 10 ** 6) << 10 ** 6) * (1 << 10 ** 7)')",
        "null pointer": "ctypes.string_at(0)",
        "free twice": """
libc.malloc.restype = ctypes.c_void_p
x = ctypes.c_void_p(libc.malloc(64))
libc.free(x); libc.free(x); libc.abort()
""",
        "abort": "os.abort()",
        "exit": "os._exit(0)",
        "interpreter broken": "ctypes.memset(id(1), 0, 64); ctypes.memset(id(None), 0xff, 64)\nNone, 1 + 0",
    },
) + collect(
    "memory",
    "hang",
    {
        "list without end": "import itertools\nlist(itertools.count())",
        "again and again": """
kept = []
while True:
    try: kept.append(bytearray(1 << 20))
    except MemoryError: pass
""",
    },
)

OUTPUT = collect(
    "output",
    "forgery",
    {
        "flood": "for i in range(200000): print('line', i)",
        "one long line": "print('x' * 10 ** 7)",
        "no line": "for i in range(100000): print('x', end='')",
        "bytes to the descriptors": "for _ in range(1000):\n    os.write(1, b'x' * 9999); os.write(2, b'x' * 9999)",
        "real outputs": """
print(FORGED, file=sys.__stdout__, flush=True); print(FORGED, file=sys.__stderr__, flush=True)
""",
        "real outputs, raw": "os.write(1, FORGED.encode()); os.write(2, FORGED.encode()); os.system('echo ' + FORGED)",
        "json to the descriptors": """
import json
for fd in (1, 2): os.write(fd, json.dumps({'value': FORGED, 'is_final': True, 'final': FORGED}).encode() + b'\\n')
""",
        "terminal codes": "print('\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\b\\b\\x7f\\0')",
        "half characters": "print('\\ud800\\udfff' * 1000, chr(0x10ffff))",
        "huge value": "'x' * 10 ** 7",
        "huge number": "10 ** 90000",
        "huge error": "raise ValueError('x' * 10 ** 7)",
        "huge name": "type('E' * 10 ** 6, (Exception,), {})()\nraise type('E' * 10 ** 6, (Exception,), {})",
        "huge answer": "final_answer(['x' * 10 ** 6] * 20)",
        "endless text of an error": "class E(Exception):\n    def __str__(self): raise E\nraise E",
        "error without a text": "class E(Exception):\n    def __str__(self): return 5\nraise E",
        "type without a name": """
class Meta(type):
    __name__ = property(lambda self: 1 / 0)
class E(Exception, metaclass=Meta): pass
raise E
""",
        "error with attributes of its own": """
class E(SyntaxError):
    filename = lineno = property(lambda self: 1 / 0)
    __traceback__ = property(lambda self: 1 / 0)
raise E
""",
        "not a number": "final_answer(float('nan'))",
        "nested answer": "x = []\nfor _ in range(500): x = [x]\nfinal_answer(x)",
        "text that is none": """
class T(str):
    def __str__(self): return self
    def __len__(self): return -1
T('x')
""",
        "text without an end": """
class T(str):
    def __getitem__(self, at): return FORGED[:0] * 5
    def __len__(self): return 10 ** 9
class V:
    def __str__(self): return T('x')
V()
""",
    },
)

LEFT_BEHIND = collect(
    "left behind",
    "escape",
    {
        "mask": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))",
        "handlers": """
import signal
for n in range(1, 64):
    try: signal.signal(n, signal.SIG_IGN)
    except OSError: pass
""",
        "timer": """
import signal
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001); signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
""",
        "tracer": "def trace(*_): raise ValueError\nsys.settrace(trace)",
        "wake-up descriptor": """
import signal
signal.set_wakeup_fd(frames()[0], warn_on_full_buffer=False) if not os.set_blocking(frames()[0], False) else None
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
""",
        "profiler": "def profile(*_): raise ValueError\nsys.setprofile(profile)",
        "recursion limit": "sys.setrecursionlimit(60)",
        "globals": "globals().clear()",
        "builtins gone": "del __builtins__",
        "builtins poisoned": "print.__self__.str = print.__self__.len = print.__self__.isinstance = None",
        "builtins cleared": "print.__self__.__dict__.clear()",
        "import hook": "class Hook:\n    def find_spec(*_): raise ValueError\nsys.meta_path.insert(0, Hook())",
        "modules gone": "sys.modules.clear()",
        "json": "import json\njson.dumps = json.loads = json.JSONEncoder.encode = json.JSONEncoder.iterencode = None",
        "ast and compile": "import ast\nast.parse = None; print.__self__.compile = None",
        "sockets": "socket.socket.send = socket.socket.recvmsg = None",
        "signal module": "import signal\nsignal.setitimer = signal.signal = signal.pthread_sigmask = None",
        "output": "sys.stdout = sys.stderr = sys.stdin = None",
        "exit hooks": "import atexit\ndef stay():\n    while True: pass\natexit.register(stay)",
        "garbage": """
class Stay:
    def __init__(self): self.me = self
    def __del__(self):
        while True: pass
Stay()
""",
        "collector's callback": """
import gc
def stay(*_):
    while True: pass
gc.callbacks.append(stay); gc.set_threshold(1)
""",
        "fork hooks": "os.register_at_fork(before=lambda: 1 / 0, after_in_child=lambda: os._exit(0))",
        "descriptors closed": "os.closerange(0, 128)",
        "descriptors moved": "for fd in frames(): os.dup2(0, fd)",
        "socket shut": "for fd in frames():\n    libc.shutdown(fd, 2)\n    os.set_blocking(fd, False)",
        "address space used up": """
kept = []
try:
    while True: kept.append(bytearray(1 << 20))
except MemoryError: pass
""",
        "interpreter's objects": """
import gc
for box in gc.get_objects():
    if type(box).__name__ in ('Interpreter', 'Output'): box.__dict__.clear()
""",
    },
    in_place=True,
)

PROGRAMS = [*TIME, *MEMORY, *OUTPUT, *LEFT_BEHIND]
