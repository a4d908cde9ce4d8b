"""The socket that HTTP workers share: a TCP port or a Unix path.

Opened by the supervisor before anything else, so that what is wrong with it is said at once. Knows
no HTTP and no TLS.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress

from tgi_cli.errors import TgiError, UsageError

#: Connections the kernel keeps waiting for the workers.
BACKLOG = 1024


def listen(host: str, port: int) -> socket.socket:
    """Open the TCP port. Raises `UsageError` or `TgiError` naming host and port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error}",
            hint="give an address of this machine and a port from 0 to 65535",
        ) from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise _listen_error(host, port, error) from None
    return listener


def _listen_error(host: str, port: int, error: Exception) -> TgiError:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return TgiError(
            f"port {port} on {host} is already in use",
            hint="stop the program that uses it, or take another port: `--port 0` picks a free one",
        )
    if number == errno.EACCES:
        return TgiError(
            f"no permission to listen on port {port}",
            hint="use a port from 1024 on, or `--port 0` for a free one",
        )
    reason = os.strerror(number) if number else str(error)
    return UsageError(
        f"cannot listen on {host} port {port}: {reason.lower()}",
        hint="give an address of this machine and a port from 0 to 65535",
    )


def listen_unix(path: str) -> socket.socket:
    """Open a Unix socket; one that a server left behind is replaced.

    Raises `UsageError` or `TgiError` naming the path. Who may connect is up to the folder's
    permissions and the umask.
    """
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise UsageError(
            f"cannot listen on the Unix socket {path}: {reason}",
            hint="give a path of at most 107 bytes in a folder that exists and may be written to",
        ) from None
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket nobody listens on; anything else in its place is an error."""
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(kind):
        raise UsageError(
            f"--uds {path} is a file that is not a socket", hint="give another path, or remove it"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
    raise TgiError(
        f"the Unix socket {path} is already in use",
        hint="stop the program that uses it, or take another path",
    )
