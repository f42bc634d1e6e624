"""The driver's protocol: forged frames, broken frames, floods of calls, the interpreter's own objects turned around."""

from __future__ import annotations

from hostile import collect

_DONE = """'{{"key": {key}, "stdout": "' + FORGED + '", "value": "' + FORGED + '", "error": null, "limit": null, \
"final": "' + FORGED + '", "is_final": true}}'"""

FORGED_FRAMES = collect(
    "protocol",
    "forgery",
    {
        "done without a key": f"write_frame({_DONE.format(key='null')})",
        "done with a guessed key": f"write_frame({_DONE.format(key=chr(34) + '1-0000' + chr(34))})\n1",
        "done, and a loop after it": f"write_frame({_DONE.format(key='0')})\nwhile True: pass",
        "many of them": f"for _ in range(500): write_frame({_DONE.format(key='0')})",
        "done by sendto": f"for fd in frames(): libc.send(fd, frame({_DONE.format(key='0')}), 4000, 0)",
        "hello": """write_frame('{"hello": true}')""",
        "failed": """write_frame('{"failed": "' + FORGED + '"}')""",
        "run": """write_frame('{"run": "' + FORGED + '"}')""",
        "shown": """write_frame('{"shown": "' + FORGED + '"}')\nos._exit(0)""",
        "layers": """write_frame('{"hello": true, "layers": {"seccomp": "' + FORGED + '"}}')""",
        "call of a tool": """write_frame('{"call": 1, "name": "search", "args": ["' + FORGED + '"], "kwargs": {}}')""",
        "call of what is no tool": """
write_frame('{"call": 1, "name": "os.system", "args": ["' + FORGED + '"], "kwargs": {}}')
write_frame('{"call": 1, "name": "__class__", "args": [], "kwargs": {}}')
""",
        "not json": "write_frame(b'not json' + FORGED.encode())",
        "not text": "write_frame(bytes(range(256)))",
        "not an object": "write_frame('[1, 2, 3]')",
        "not a number": 'write_frame(\'{"call": NaN, "key": Infinity}\')',
        "nested": "write_frame('[' * 100000)",
        "nested in an object": "write_frame('{\"a\":' * 100000)",
        "huge number": "write_frame('{\"a\": ' + '9' * 900000 + '}')",
        "many objects": "write_frame('[' + '{},' * 300000 + '{}]')",
        "too long": "for fd in range(3, 128):\n    try: os.write(fd, bytes([255] * 8))\n    except OSError: pass",
        "long without an end": """
for fd in frames():
    try:
        os.write(fd, struct.pack('>I', 1 << 20))
        while True: os.write(fd, b'x' * 65536)
    except OSError: pass
""",
        "half a frame and the end": """
for fd in frames():
    try: os.write(fd, b'\\0\\0')
    except OSError: pass
os._exit(0)
""",
        "many small ones": """
data = frame('{}') * 10000
for fd in frames():
    try: os.write(fd, data)
    except OSError: pass
""",
        "urgent byte": "for fd in frames(): libc.send(fd, b'x', 1, 1)",
        "read the socket empty": """
for fd in frames():
    os.set_blocking(fd, False)
    try: print(os.read(fd, 1 << 20))
    except OSError: pass
""",
        "close all": "os.closerange(0, 256)",
        "half closed": "for fd in frames(): libc.shutdown(fd, 1)",
        "exit": "sys.exit(0)",
        "exit with an answer": "raise SystemExit({'is_final': True, 'final': FORGED[:0]})",
        "stop iteration": "raise StopIteration",
        "base exception": "raise BaseException(FORGED[:0])",
        "keyboard interrupt": "raise KeyboardInterrupt",
        "limit of one's own making": """
class StepLimit(BaseException): name = ['x']
raise StepLimit
""",
        "interpreter's own limit": """
import gc
limit = next(box for box in gc.get_objects() if isinstance(box, type) and box.__name__ == 'StepLimit')
raise limit({'no': 'limit'}, 'x')
""",
        "answer without the answer": """
import gc
raise next(box for box in gc.get_objects() if isinstance(box, type) and box.__name__ == 'FinalAnswer')
""",
    },
)

CALLS = collect(
    "calls",
    "hang",
    {
        "flood": "for i in range(1000): search(i)",
        "flood that catches": """
while True:
    try: search(1)
    except BaseException: pass
""",
        "flood by frames": """
import gc
key = next(box._key for box in gc.get_objects() if type(box).__name__ == 'Interpreter')
while True: write_frame('{"key": "' + key + '", "call": 1, "name": "search", "args": [], "kwargs": {}}')
""",
        "flood of prints by frames": """
import gc
key = next(box._key for box in gc.get_objects() if type(box).__name__ == 'Interpreter')
while True: write_frame('{"key": "' + key + '", "shown": "x"}')
""",
        "call, and a loop beside it": """
import gc
key = next(box._key for box in gc.get_objects() if type(box).__name__ == 'Interpreter')
write_frame('{"key": "' + key + '", "call": 1, "name": "search", "args": [], "kwargs": {}}')
while True: pass
""",
    },
) + collect(
    "calls",
    "forgery",
    {
        "not json": "search(object())",
        "not a number": "search(float('nan'), float('inf'))",
        "infinite, by a frame": """
import gc
key = next(box._key for box in gc.get_objects() if type(box).__name__ == 'Interpreter')
write_frame('{"key": "' + key + '", "call": 1, "name": "search", "args": [1e999], "kwargs": {}}')
""",
        "huge": "search('x' * 10 ** 8)",
        "nested": "x = []\nfor _ in range(10 ** 5): x = [x]\nsearch(x)",
        "circle": "x = []; x.append(x)\nsearch(x)",
        "names": "search(**{'__class__': 1, 'self': 2, 'name': 3, '': 4})",
        "dunder": "search.__globals__['wire'].MAX_FRAME_BYTES = 1 << 40\nsearch('x' * 10 ** 7)",
        "tolist": "class T:\n    def tolist(self): return [T()]\nsearch(T())",
        "tool of another name": """
tool = search.__closure__
for cell in tool:
    if type(cell.cell_contents) is str: cell.cell_contents = 'os.system'
search('x')
""",
        "text that is none": """
class T(str):
    def __len__(self): return -5
    def encode(self, *_): return b'x'
search(T('x'))
""",
        "text with half characters": "search('\\ud800\\0\\x1b[2J')",
    },
)

_KEY = "key = next(box._key for box in gc.get_objects() if type(box).__name__ == 'Interpreter')"

STOLEN = collect(
    "stolen key",
    "escape",
    {
        "one's own step": f"""
import gc
{_KEY}
body = '{{"key": "' + key + '", "stdout": "own", "value": null, "error": null, "limit": null, "final": null, '
write_frame(body + '"is_final": false}}')
while True: pass
""",
        "the steps that follow": f"""
import gc, json
{_KEY}
body = '"stdout": "own", "value": null, "error": null, "limit": null, "final": null, "is_final": false}}'
write_frame('{{"key": "' + key + '", ' + body)
while True:
    for fd in frames():
        data = os.read(fd, 1 << 20)
        if b'"run"' in data: write_frame('{{"key": "' + json.loads(data[4:])["key"] + '", ' + body)
""",
        "many results": f"""
import gc
{_KEY}
body = '{{"key": "' + key + '", "stdout": "own", "value": null, "error": null, "limit": null, "final": null, '
for _ in range(1000): write_frame(body + '"is_final": false}}')
""",
        "limits that do not exist": f"""
import gc
{_KEY}
body = '{{"key": "' + key + '", "stdout": "", "value": null, "error": null, "limit": "none", "final": null, '
write_frame(body + '"is_final": false}}')
""",
        "text that is too long": f"""
import gc
{_KEY}
body = '{{"key": "' + key + '", "stdout": "' + 'x' * 900000 + '", "value": null, "error": null, "limit": null, '
write_frame(body + '"final": null, "is_final": false}}')
""",
        "output that is too long": f"""
import gc
{_KEY}
for _ in range(60): write_frame('{{"key": "' + key + '", "shown": "' + 'x' * 900000 + '"}}')
""",
        "types that are wrong": f"""
import gc
{_KEY}
write_frame('{{"key": "' + key + '", "stdout": [1], "value": {{}}, "error": 5, "limit": [], "is_final": "yes"}}')
""",
    },
)

TURNED = collect(
    "turned around",
    "escape",
    {
        "forker": "sys.modules['envs.sandbox.child']._fork = lambda: 7",
        "forker that exits": "sys.modules['envs.sandbox.child']._fork = lambda: os._exit(0)",
        "receiver": "sys.modules['envs.sandbox.child']._receive = lambda *_: None",
        "receiver of candidates": "sys.modules['envs.sandbox.child'].Interpreter.move_to = lambda *_: 1 / 0",
        "hellos of one process": """
child = sys.modules['envs.sandbox.child']
def receive(sock):
    message, fds = sys.modules['envs.sandbox.wire'].receive(sock)
    for fd in fds: os.write(fd, frame('{"hello": true}'))
    return {}, []
child._receive = receive
""",
        "sender": "sys.modules['envs.sandbox.child']._send = lambda *_: None",
        "encoder": "sys.modules['envs.sandbox.wire'].encode = lambda _: b'x' * 100",
        "runner": "sys.modules['envs.sandbox.child'].Interpreter.run = lambda *_: {'value': FORGED}",
    },
    in_place=True,
)

PROGRAMS = [*FORGED_FRAMES, *CALLS, *STOLEN, *TURNED]
