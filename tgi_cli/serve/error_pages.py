"""Failures as HTTP answers: OpenAI's error object under `/v1`, TGI's everywhere else.

Walks the class attributes drawn in `tgi_cli.errors`; knows no route. A traceback never leaves the
process: what nobody foresaw is logged and answered as a plain 500.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from tgi_cli.errors import EngineError, EngineUnavailable, Overloaded, RequestError, TgiError
from tgi_cli.serve.exchange import json_response

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Seconds a client is told to wait while the engine loads or restarts.
ENGINE_RETRY_AFTER = 5

_TGI_PREFIX = {
    "validation": "Input validation error: ",
    "template_error": "Template error: ",
    "generation": "Request failed during generation: ",
}
_HTTP_CODES = {
    400: "invalid_json",
    404: "unknown_url",
    405: "method_not_allowed",
    413: "payload_too_large",
    415: "unsupported_media_type",
}
_TGI_HTTP_TYPES = {404: "not_found", 405: "method_not_allowed"}


def is_openai(path: str) -> bool:
    """Whether this path answers in OpenAI's shape."""
    return path == "/v1" or path.startswith("/v1/")


def sentence(error: TgiError) -> str:
    """The message, with its way out when there is one."""
    return f"{error.message} (hint: {error.hint})" if error.hint else error.message


def openai_error(error: TgiError) -> tuple[int, dict[str, Any]]:
    """Status and body in OpenAI's shape."""
    if isinstance(error, RequestError):
        return error.status, openai_object(
            sentence(error), error.openai_type, code=error.code, param=error.param
        )
    if isinstance(error, EngineError):
        return error.status, openai_object(sentence(error), error.openai_type, code=error.code)
    return 500, openai_object(sentence(error), "server_error", code="internal_error")


def openai_object(
    message: str, kind: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def tgi_error(error: TgiError) -> tuple[int, dict[str, Any]]:
    """Status and body in TGI's shape."""
    if isinstance(error, RequestError):
        prefix = _TGI_PREFIX.get(error.tgi_type, "")
        return error.tgi_status, {"error": prefix + sentence(error), "error_type": error.tgi_type}
    if isinstance(error, EngineError):
        return error.status, {"error": sentence(error), "error_type": error.tgi_type}
    return 500, {"error": sentence(error), "error_type": "internal"}


def error_event(error: TgiError, *, openai: bool) -> bytes:
    """One SSE event that ends a stream which has already begun."""
    body = (openai_error if openai else tgi_error)(error)[1]
    return b"data: " + orjson.dumps(body) + b"\n\n"


def error_response(error: TgiError, *, openai: bool) -> web.Response:
    """The whole answer to a request that failed before any of its answer was sent."""
    status, body = (openai_error if openai else tgi_error)(error)
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, EngineUnavailable):
        headers["Retry-After"] = str(ENGINE_RETRY_AFTER)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body, status=status, headers=headers)


def http_error_response(error: web.HTTPException, request: web.Request) -> web.Response:
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
    if is_openai(request.path):
        body = openai_object(message, "invalid_request_error", code=_HTTP_CODES.get(status))
    else:
        body = {"error": message, "error_type": _TGI_HTTP_TYPES.get(status, "validation")}
    return json_response(body, status=status, headers=headers)


PAYLOAD_LIMIT = web.AppKey("payload_limit", int)


@web.middleware
async def error_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost middleware: every exception becomes a body in the surface's own shape."""
    openai = is_openai(request.path)
    try:
        return await handler(request)
    except TgiError as error:
        return error_response(error, openai=openai)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return http_error_response(error, request)
    except ConnectionResetError:
        raise  # the client has gone: there is nobody to answer
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        message = "internal error; the server's log has the details"
        if openai:
            return json_response(
                openai_object(message, "server_error", code="internal_error"), status=500
            )
        return json_response({"error": message, "error_type": "internal"}, status=500)
