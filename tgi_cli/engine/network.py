"""TCP between nodes: one address to listen on, patience to dial, notice when a host is gone.

Knows nothing of what is sent. Connections are neither encrypted nor authenticated, as those of
gloo and NCCL beside them: the network between the nodes is trusted.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress

from tgi_cli.errors import EngineError, UsageError

_RETRY = 0.25  # seconds between two attempts
_ATTEMPT = 5.0  # seconds one attempt may take
#: Seconds: a silent connection is probed after the first, then each second, this many times.
_IDLE, _PROBES = 2, 3


def listen(host: str, port: int) -> socket.socket:
    """Listen on one address of this machine, and on no other.

    Raises:
        UsageError: it is not an address of this machine, or the port is taken.
    """
    try:
        return socket.create_server(_address(host, port), family=_family(host), backlog=128)
    except OSError as error:
        raise UsageError(
            f"node 0 cannot listen on {show(host, port)}: {error.strerror or error}",
            hint="--master-addr is an address of node 0 that the other nodes reach, "
            "--master-port a free port there",
        ) from None


def dial(host: str, port: int, patience: float) -> socket.socket:
    """Connect, trying again until `patience` seconds have passed.

    Raises:
        EngineError: nobody answered.
    """
    deadline = time.monotonic() + patience
    while True:
        left = deadline - time.monotonic()
        try:
            connected = socket.create_connection((host, port), max(0.1, min(_ATTEMPT, left)))
        except OSError as error:
            if left <= _RETRY:
                raise EngineError(
                    f"node 0 does not answer at {show(host, port)} after {patience:g} seconds: "
                    f"{error.strerror or error}",
                    hint="check --master-addr and --master-port, and that node 0 runs",
                ) from None
            time.sleep(_RETRY)
            continue
        connected.settimeout(None)
        notice_death(connected)
        return connected


def notice_death(connection: socket.socket) -> None:
    """Have the kernel end this connection some seconds after the other host has gone silent."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with suppress(AttributeError, OSError):  # Linux
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        milliseconds = (_IDLE + _PROBES) * 1000
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def show(host: str, port: int) -> str:
    """`host:port`, with brackets where they are needed."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _family(host: str) -> socket.AddressFamily:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return found[0][0]


def _address(host: str, port: int) -> tuple[str, int]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return str(found[0][4][0]), port
