"""API keys: who may ask, and under which tenant's name the engine's fair queue counts it.

One key for now; its tenant is `default`, and without a key everyone is the nameless tenant. Which
routes are open follows TGI. Comparison takes the same time whatever was sent.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from tgi_cli.errors import Unauthorized
from tgi_cli.serve.exchange import TENANT

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Answered without a key. `POST /` generates, so only its GET is open.
OPEN_PATHS = frozenset(
    {
        "/chat_tokenize",
        "/info",
        "/health",
        "/ping",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/api-doc/openapi.json",
        "/v1/models",
        "/v1/models/{id}",
    }
)


def is_open(request: web.Request) -> bool:
    """Whether the matched route needs no key (an unknown route answers 404, not 401)."""
    resource = request.match_info.route.resource
    if resource is None:
        return True
    return resource.canonical in OPEN_PATHS or (
        resource.canonical == "/" and request.method in ("GET", "HEAD")
    )


def api_key(key: str | None) -> Middleware:
    """Middleware that demands `Authorization: Bearer <key>` (or lets everyone in without one)."""
    expected = None if key is None else _digest(key)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if expected is None:
            request[TENANT] = ""
            return await handler(request)
        request[TENANT] = "default"
        if not is_open(request):
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if not scheme and "x-api-key" in request.headers:  # Anthropic's header
                scheme, given = "bearer", request.headers["x-api-key"]
            if scheme.lower() != "bearer" or not given:
                raise Unauthorized(
                    "no API key given", hint="send the header `Authorization: Bearer <key>`"
                )
            if not hmac.compare_digest(_digest(given.strip()), expected):
                raise Unauthorized("the API key is wrong")
        return await handler(request)

    return check


def _digest(key: str) -> bytes:
    # Equal lengths for compare_digest, so not even the key's length can be timed.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
