"""What happens around every exchange: its id, the count of open ones, and a line in the log.

`x-request-id` is taken from the client where it is usable and made up otherwise; the answer carries
it, and so does every log record written meanwhile. Knows no route's meaning.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from tgi_cli.log import FIELDS, REQUEST_ID
from tgi_cli.serve.exchange import TENANT
from tgi_cli.serve.prometheus import Metrics

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ID_HEADER = "x-request-id"
ID = web.RequestKey("id", str)

access_log = logging.getLogger("tgi_cli.access")

_USABLE = re.compile(r"[\x21-\x7e]{1,128}")


def request_id(given: str | None) -> str:
    """The id of an exchange: the client's own if it is printable and short, else a new one."""
    if given is not None and _USABLE.fullmatch(given):
        return given
    return secrets.token_hex(16)


def observe(metrics: Metrics) -> Middleware:
    """The outermost middleware. Requests are logged at INFO if they POST, else at DEBUG."""

    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[ID] = request_id(request.headers.get(ID_HEADER))
        token = REQUEST_ID.set(request[ID])
        metrics.in_flight += 1  # draining waits for these
        started = time.perf_counter()
        status = 499  # nginx's code for a client that went away, unless there is an answer
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            metrics.in_flight -= 1
            level = logging.INFO if request.method == "POST" else logging.DEBUG
            if access_log.isEnabledFor(level):
                _write(level, request, status, time.perf_counter() - started)
            REQUEST_ID.reset(token)

    return around


async def stamp_id(request: web.Request, response: web.StreamResponse) -> None:
    """Send the id back (an `on_response_prepare` signal)."""
    if ID in request:  # not what aiohttp refused before any middleware
        response.headers[ID_HEADER] = request[ID]


def _write(level: int, request: web.Request, status: int, seconds: float) -> None:
    milliseconds = round(seconds * 1e3, 3)
    fields = {
        "method": request.method,
        "path": request.rel_url.raw_path,
        "status": status,
        "duration_ms": milliseconds,
    }
    if request.get(TENANT):
        fields["tenant"] = request[TENANT]
    access_log.log(
        level,
        "%s %s %d %.1f ms",
        request.method,
        request.rel_url.raw_path,
        status,
        milliseconds,
        extra={FIELDS: fields},
    )
