"""Length-prefixed JSON frames over a Unix stream socket: the whole language between the driver and its sandboxes.

A frame is four bytes of big-endian length and that many bytes of ASCII JSON. Both sides bound the length before they
allocate anything. Nothing else is ever decoded: no pickle, no `ast`, no `repr`. `receive` and `send` block and are for
sockets that wait for one peer; the driver, which waits for many, uses `Inbox` and `encode`.
"""

from __future__ import annotations

import array
import json
import socket
import struct
from typing import Any

MAX_FRAME_BYTES = 4 << 20
"""Longest frame in either direction."""
MAX_FDS = 64
"""Most descriptors that travel with one frame."""
MAX_ARGUMENT_CHARS = 1 << 19
"""Longest JSON text of one tool call's arguments."""
_HEADER = struct.Struct(">I")
_encode_json = json.JSONEncoder(allow_nan=True).encode
_decode_json = json.JSONDecoder().decode


class WireError(Exception):
    """The peer broke the framing, or a frame is too long."""


def encode(message: Any) -> bytes:
    """One frame. Raises `WireError` when it would be too long, `TypeError`/`ValueError` for what is not JSON."""
    body = _encode_json(message).encode("ascii")
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {len(body)} bytes is longer than {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body)) + body


def confined_frame_bytes(output_chars: int) -> int:
    """Longest frame that a confined process has reason to send: three texts in ASCII JSON, or a tool's arguments."""
    return (1 << 20) + 50 * output_chars


def _reject(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_decode_strict = json.JSONDecoder(parse_constant=_reject).decode


def decode_untrusted(body: bytes) -> dict[str, Any]:
    """Parse a frame's body from a confined process. Raises `WireError` for all that is not a JSON object."""
    try:
        message = _decode_strict(body.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a JSON frame: {type(error).__name__}") from None
    if not isinstance(message, dict):
        raise WireError("a frame must be a JSON object")
    return message


class Inbox:
    """Puts frames together from pieces, so that half a frame of one sender never delays another.

    No frame may be longer than `limit_bytes`: parsed JSON takes many times the memory of its text.
    """

    def __init__(self, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self._data = bytearray()
        self._limit_bytes = min(limit_bytes, MAX_FRAME_BYTES)

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """Add what was received; returns the frames that are now whole. Raises `WireError`."""
        self._data += piece
        frames = []
        at = 0
        while len(self._data) >= at + 4:
            (length,) = _HEADER.unpack_from(self._data, at)
            if length > self._limit_bytes:
                raise WireError(f"a frame of {length} bytes is longer than {self._limit_bytes}")
            if len(self._data) < at + 4 + length:
                break
            frames.append(decode_untrusted(bytes(self._data[at + 4 : at + 4 + length])))
            at += 4 + length
        del self._data[:at]
        return frames


def send(sock: socket.socket, message: Any, fds: list[int] | None = None) -> None:
    """Send one frame, with descriptors if any; blocks until it is written."""
    data = memoryview(encode(message))
    if fds:
        data = data[socket.send_fds(sock, [data], fds) :]
    while data:
        data = data[sock.send(data) :]


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Wait for one frame of a trusted peer, and its descriptors; None when the peer has gone."""
    header, fds = _exactly(sock, 4)
    if header is None:
        return None
    (length,) = _HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
    body, more = _exactly(sock, length)
    if body is None:
        return None
    return _decode_json(body.decode("ascii")), fds + more


def _exactly(sock: socket.socket, size: int) -> tuple[bytes | None, list[int]]:
    data, fds = bytearray(), array.array("i")
    while len(data) < size:
        piece, ancillary, _, _ = sock.recvmsg(size - len(data), socket.CMSG_SPACE(MAX_FDS * fds.itemsize))
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not piece:
            return None, list(fds)
        data += piece
    return bytes(data), list(fds)
