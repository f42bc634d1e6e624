"""Reaching out: the network, files to read, files to change, links, /proc, descriptors that were left open."""

from __future__ import annotations

from hostile import collect

_IN = "struct.pack('<H', socket.AF_INET) + struct.pack('>H', {port}) + bytes([127, 0, 0, 1]) + bytes(8)"

NETWORK = collect(
    "network",
    "connection",
    {
        "tcp": "socket.create_connection(('127.0.0.1', PORT), 1)",
        "tcp from a class": "socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect(('127.0.0.1', PORT))",
        "tcp over IPv6": "socket.socket(socket.AF_INET6).connect(('::ffff:127.0.0.1', PORT))",
        "urllib": "import urllib.request\nurllib.request.urlopen(f'http://127.0.0.1:{PORT}/', timeout=1)",
        "http client": """
import http.client
http.client.HTTPConnection('127.0.0.1', PORT, timeout=1).request('GET', '/')
""",
        "asyncio": "import asyncio\nasyncio.run(asyncio.wait_for(asyncio.open_connection('127.0.0.1', PORT), 1))",
        "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))",
        "unix": "socket.socket(socket.AF_UNIX).connect(UNIX)",
        "abstract unix": "socket.socket(socket.AF_UNIX).connect(ABSTRACT)",
        "raw calls": f"""
fd = libc.socket(2, 1, 0)
address = {_IN.format(port="PORT")}
libc.connect(fd if fd >= 0 else 3, address, len(address))
""",
        "connect on every descriptor": f"""
address = {_IN.format(port="PORT")}
for fd in range(128):
    libc.connect(fd, address, len(address))
""",
        "sendto on every descriptor": f"""
address = {_IN.format(port="UDP")}
for fd in range(128):
    libc.sendto(fd, b'x', 1, 0, address, len(address))
""",
        "logging to a socket": """
import logging.handlers
handler = logging.handlers.DatagramHandler('127.0.0.1', UDP)
handler.send(b'x')
""",
        "syslog to a socket": """
import logging.handlers
logging.handlers.SysLogHandler(UNIX, socktype=socket.SOCK_STREAM).emit(logging.makeLogRecord({'msg': 'x'}))
""",
        "multiprocessing client": """
from multiprocessing.connection import Client
Client(UNIX, family='AF_UNIX')
""",
    },
) + collect(
    "network",
    "escape",
    {
        "families": """
for family in range(46):
    for kind in (1, 2, 3, 5):
        if libc.socket(family, kind, 0) >= 0: escaped(family)
""",
        "socketpair": "socket.socketpair(); escaped()",
        "listen": "socket.create_server(('127.0.0.1', 0)); escaped()",
        "io_uring": "if libc.syscall(425, 8, bytes(120)) >= 0: escaped()",
        "pass a descriptor away": """
for fd in frames():
    try:
        socket.send_fds(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd), [b'x'], [1])
        escaped()
    except OSError: pass
""",
        "accept and getpeername": """
for fd in range(128):
    if libc.syscall(43, fd, None, None) >= 0 or libc.syscall(49, fd, bytes(16), 16) >= 0: escaped(fd)
""",
    },
)

FILES = collect(
    "files",
    "secret",
    {
        "open": "open(SECRET_FILE).read()",
        "pathlib": "import pathlib\npathlib.Path(SECRET_FILE).read_text()",
        "linecache": "import linecache\nlinecache.getline(SECRET_FILE, 1)",
        "numpy memmap": "import numpy\nbytes(numpy.memmap(SECRET_FILE, mode='r'))",
        "numpy fromfile": "import numpy\nbytes(numpy.fromfile(SECRET_FILE, dtype='u1'))",
        "numpy genfromtxt": "import numpy\nnumpy.genfromtxt(SECRET_FILE, dtype=str, delimiter='|')",
        "import loader": """
from importlib.machinery import SourceFileLoader
SourceFileLoader('x', SECRET_FILE).get_data(SECRET_FILE)
""",
        "run it": "exec(compile(open(SECRET_FILE).read(), 'x', 'exec'))",
        "error message of a run": "import runpy\nrunpy.run_path(SECRET_FILE)",
        "traversal": "open(os.path.dirname(os.__file__) + '/..' * 20 + SECRET_FILE).read()",
        "raw open": "fd = libc.syscall(2, SECRET_FILE.encode(), 0)\nos.read(fd, 99)",
        "openat2": "fd = libc.syscall(437, -100, SECRET_FILE.encode(), bytes(24), 24)\nos.read(fd, 99)",
        "O_PATH and again": """
fd = os.open(SECRET_FILE, os.O_PATH)
open(f'/proc/self/fd/{fd}').read()
""",
        "handle": """
handle = ctypes.create_string_buffer(struct.pack('Ii', 128, 0) + bytes(128))
mount = ctypes.c_int()
libc.syscall(303, -100, SECRET_FILE.encode(), handle, ctypes.byref(mount), 0)
os.read(libc.syscall(304, -100, handle, 0), 99)
""",
        "root of another process": "open(f'/proc/{VICTIM}/root' + SECRET_FILE).read()",
        "root of the first process": "open('/proc/1/root' + SECRET_FILE).read()",
        "chroot": "os.chroot(FOLDER)\nopen('/secret.txt').read()",
        "chdir": "os.chdir(FOLDER)\nopen('secret.txt').read()",
        "list a folder": "os.listdir(FOLDER)",
        "glob a folder": "import glob\nglob.glob(FOLDER + '/*')",
        "walk a folder": "[entry.name for entry in os.scandir(FOLDER)]",
        "link": "os.readlink(SECRET_LINK)",
        "real path of a link": "os.path.realpath(SECRET_LINK)",
        "link, raw": """
buffer = ctypes.create_string_buffer(200)
libc.syscall(267, -100, SECRET_LINK.encode(), buffer, 200)
buffer.value
""",
        "link made to it": "os.symlink(SECRET_FILE, '/tmp/link')\nopen('/tmp/link').read()",
        "copy": "import shutil\nshutil.copyfile(SECRET_FILE, '/tmp/copy')\nopen('/tmp/copy').read()",
        "sqlite": """
import importlib
sqlite3 = importlib.import_module('sqlite3')
try:
    sqlite3.connect(SECRET_FILE).execute('select * from x')
except sqlite3.DatabaseError as error:
    error, open(SECRET_FILE).read()
""",
        "mmap": "import mmap\nmmap.mmap(os.open(SECRET_FILE, os.O_RDONLY), 0, prot=mmap.PROT_READ)[:]",
        "sendfile": """
fd = os.open(SECRET_FILE, os.O_RDONLY)
for target in frames(): libc.sendfile(target, fd, None, 99)
""",
        "left-over descriptors": """
found = b''
for fd in range(256):
    try: found += os.pread(fd, 99, 0)
    except OSError: pass
found
""",
        "environment": "dict(os.environ)",
        "environment of C": """
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')
index = 0
while environ[index]:
    print(environ[index]); index += 1
""",
        "environment in proc": """
for pid in ('self', '1', os.getppid(), VICTIM, DRIVER):
    try: print(open(f'/proc/{pid}/environ').read())
    except OSError: pass
""",
        "command line of the victim": "open(f'/proc/{VICTIM}/cmdline').read()",
        "objects of the collector": """
import gc
found = [text for box in gc.get_objects() if type(box) is dict for text in box.values() if type(text) is str]
[text for text in found if text.startswith('sk' + '-the')]
""",
    },
)

_CREATE = "os.O_WRONLY | os.O_CREAT"
WRITES = collect(
    "files",
    "file",
    {
        "write": "open(FOLDER + '/mark', 'w').write('x')",
        "append to the secret": "open(SECRET_FILE, 'a').write('x')",
        "write anywhere": """
for folder in ('/tmp', '/var/tmp', '/dev/shm', '/run', '/root', '/', '.', FOLDER, os.path.dirname(os.__file__)):
    for name in ('mark', 'mark.py'):
        try:
            open(folder + '/' + name, 'w'); escaped(folder)
        except OSError: pass
""",
        "temporary file": f"os.open(FOLDER, os.O_TMPFILE | os.O_RDWR); escaped()\nos.open(FOLDER + '/mark', {_CREATE})",
        "tempfile": "import tempfile\ntempfile.mkstemp(dir=FOLDER)",
        "mkdir": "os.mkdir(FOLDER + '/mark')",
        "mkfifo": "os.mkfifo(FOLDER + '/mark')",
        "mknod": "os.mknod(FOLDER + '/mark')",
        "symlink": "os.symlink('/', FOLDER + '/mark')",
        "hard link": "os.link(SECRET_FILE, FOLDER + '/mark')",
        "rename": "os.rename(SECRET_FILE, FOLDER + '/mark')",
        "unlink": "os.unlink(SECRET_FILE)",
        "chmod": "os.chmod(SECRET_FILE, 0o777)",
        "truncate": "os.truncate(SECRET_FILE, 0)",
        "utime": "os.utime(SECRET_FILE, (1, 1))",
        "extended attribute": "os.setxattr(SECRET_FILE, 'user.x', b'x'); escaped()",
        "raw creat": "libc.syscall(85, (FOLDER + '/mark').encode(), 0o666)",
        "legacy rename and unlink": """
libc.syscall(82, SECRET_FILE.encode(), (FOLDER + '/mark').encode())
libc.syscall(87, SECRET_FILE.encode())
""",
        "numpy tofile": "import numpy\nnumpy.arange(3).tofile(FOLDER + '/mark')",
        "numpy memmap to write": "import numpy\nnumpy.memmap(SECRET_FILE, mode='r+')[0] = 0",
        "sqlite database": """
import importlib
importlib.import_module('sqlite3').connect(FOLDER + '/mark').execute('create table x (y)')
""",
        "log file": "import logging\nlogging.FileHandler(FOLDER + '/mark')",
        "poison the library": "open(os.__file__, 'a').close()\nescaped()",
        "add to the library": """
import py_compile
py_compile.compile(os.__file__, doraise=True, cfile=os.path.dirname(os.__file__) + '/mark.pyc')
""",
        "writable mapping": """
import mmap
fd = os.open(SECRET_FILE, os.O_RDONLY)
mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)[0] = 0
""",
        "mount over it": "libc.mount(b'tmpfs', FOLDER.encode(), b'tmpfs', 0, None)",
    },
)

PROGRAMS = [*NETWORK, *FILES, *WRITES]
