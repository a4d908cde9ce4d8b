"""The control channel between the supervisor and each child: a stream socket, one struct a frame.

Carries `Status` messages (and the child's configuration as its first frame). It is also the death
pipe: when either side goes away the other reads end-of-file. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

_LENGTH = struct.Struct("<I")


class ControlChannel:
    """Blocking side of the channel; `send` may be called from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._lock = threading.Lock()
        self._encode = msgspec.msgpack.Encoder().encode

    @classmethod
    def from_fd(cls, fd: int) -> ControlChannel:
        """Adopt an inherited file descriptor."""
        return cls(socket.socket(fileno=fd))

    def send(self, message: Any) -> None:
        """Send one struct. Raises `BrokenPipeError` or `ConnectionResetError`: the peer is gone."""
        data = self._encode(message)
        with self._lock:
            self._sock.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, *, limit: int | None = None) -> bytes | None:
        """Return the next frame, or None at end-of-file or where it is longer than `limit`."""
        head = self._read(_LENGTH.size)
        if head is None:
            return None
        (size,) = _LENGTH.unpack(head)
        return None if limit is not None and size > limit else self._read(size)

    @property
    def local_address(self) -> str:
        """This machine's address on the way to the peer, of a TCP connection."""
        return str(self._sock.getsockname()[0])

    def close(self) -> None:
        """Close the socket; the peer reads end-of-file."""
        self._sock.close()

    def hang_up(self) -> None:
        """End the connection in both directions, also for a thread that is reading from it."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._sock.recv(size - len(data))
            except OSError:  # reset, or closed by another thread
                return None
            if not part:
                return None
            data += part
        return bytes(data)


async def receive_frames(reader: asyncio.StreamReader) -> bytes | None:
    """Asyncio twin of `ControlChannel.receive`."""
    try:
        head = await reader.readexactly(_LENGTH.size)
        return await reader.readexactly(_LENGTH.unpack(head)[0])
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None


def frame(message: Any) -> bytes:
    """Encode one struct as a frame, for an asyncio writer."""
    data = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(data)) + data


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended, in words; `killed` if by SIGKILL, as the kernel does to get memory."""

    how: str
    killed: bool = False

    @classmethod
    def of(cls, code: int) -> Ending:
        """The ending of a process with this exit code, negative for a signal."""
        return cls(how_it_ended(code), killed=code == -signal.SIGKILL)


def how_it_ended(code: int) -> str:
    """A process's exit code in words; negative for a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
