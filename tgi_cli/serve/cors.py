"""Cross-origin requests from browsers, as `--cors-allow-origin` says (any origin by default).

Whatever header a page wants to send is allowed: SDKs send more of them every year, and none has a
meaning that an origin could misuse. Credentials in cookies are never allowed, because none exist.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Signal = Callable[[web.Request, web.StreamResponse], Awaitable[None]]

_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]+(?:, ?[A-Za-z0-9-]+)*")
#: Seconds a browser may remember the answer to a preflight.
_MAX_AGE = "600"


def cors(origins: tuple[str, ...]) -> tuple[Middleware, Signal]:
    """Build the preflight middleware and the signal that stamps every answer, streams too."""

    def allowed(origin: str | None) -> str | None:
        if origin is None:
            return None
        if not origins or "*" in origins:
            return "*"
        return origin if origin in origins else None

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return web.Response(status=200)
        return await handler(request)

    async def stamp(request: web.Request, response: web.StreamResponse) -> None:
        origin = allowed(request.headers.get("Origin"))
        if origin is None:
            return
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Vary"] = "Origin"
        if request.method == "OPTIONS":
            asked = request.headers.get("Access-Control-Request-Headers", "")
            named = asked if _HEADER_NAMES.fullmatch(asked) else "authorization, content-type"
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
            response.headers["Access-Control-Allow-Headers"] = named
            response.headers["Access-Control-Max-Age"] = _MAX_AGE
        else:
            response.headers["Access-Control-Expose-Headers"] = "*"

    return preflight, stamp
