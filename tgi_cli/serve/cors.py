"""Cross-origin requests from browsers, as `--cors-allow-origin` says (any origin by default)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Signal = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


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
            response.headers["Access-Control-Allow-Methods"] = "GET, POST"
            response.headers["Access-Control-Allow-Headers"] = "authorization, content-type"

    return preflight, stamp
