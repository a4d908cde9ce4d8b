"""Failures as HTTP answers, each in the shape of the surface its path belongs to.

Knows no route. A traceback never leaves the process: what nobody foresaw is logged and answered
as a plain 500.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from tgi_cli.errors import EngineUnavailable, Overloaded, TgiError
from tgi_cli.serve.exchange import UnreadableBody, json_response
from tgi_cli.serve.surfaces import Surface, surface_of

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Seconds a client is told to wait while the engine loads or restarts.
ENGINE_RETRY_AFTER = 5

PAYLOAD_LIMIT = web.AppKey("payload_limit", int)


def error_response(error: TgiError, surface: Surface) -> web.Response:
    """The whole answer to a request that failed before any of its answer was sent."""
    status, body = surface.error(error)
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, EngineUnavailable):
        headers["Retry-After"] = str(ENGINE_RETRY_AFTER)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body, status=status, headers=headers)


def http_error_response(
    error: web.HTTPException, request: web.Request, surface: Surface
) -> web.Response:
    """Answer in JSON what aiohttp itself refuses: unknown route, method, size, content type."""
    status = error.status
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    if status == 404:
        message = f"no route {request.path}"
    elif status == 405:
        allowed = ", ".join(sorted(getattr(error, "allowed_methods", ())))
        message = f"{request.path} does not take {request.method}, only {allowed}"
    elif isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request.app[PAYLOAD_LIMIT]
        message = (
            f"the body is larger than the {limit} bytes this server accepts"
            " (hint: shorten it or raise --payload-limit)"
        )
    else:
        message = error.text or error.reason
    response = json_response(surface.refusal(status, message), status=status, headers=headers)
    if isinstance(error, UnreadableBody):
        response.force_close()
    return response


@web.middleware
async def error_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost middleware: every exception becomes a body in the surface's own shape."""
    surface = surface_of(request.path)
    try:
        return await handler(request)
    except TgiError as error:
        return error_response(error, surface)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return http_error_response(error, request, surface)
    except ConnectionResetError:
        raise  # the client has gone: there is nobody to answer
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        message = "internal error; the server's log has the details"
        return json_response(surface.refusal(500, message), status=500)
