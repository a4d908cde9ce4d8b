"""Access: who may ask, whose request it is, and whether that tenant has any left.

Which routes are open follows TGI. A tenant is what its API key stands for (`serve.api_keys`);
without keys everyone is the nameless tenant. Only routes that generate count against limits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from tgi_cli.errors import Overloaded, Unauthorized
from tgi_cli.serve.api_keys import ApiKeys
from tgi_cli.serve.exchange import TENANT
from tgi_cli.serve.prometheus import Metrics
from tgi_cli.serve.tenants import Tenants

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Guard:
    """Keys, tenants and routes of one application; `middleware` is what aiohttp calls.

    `open_routes` and `generating` are (method, canonical path) pairs.
    """

    def __init__(
        self,
        keys: ApiKeys,
        tenants: Tenants,
        metrics: Metrics,
        *,
        open_routes: frozenset[tuple[str, str]],
        generating: frozenset[tuple[str, str]],
    ) -> None:
        self._keys = keys
        self._tenants = tenants
        self._metrics = metrics
        self._open = open_routes
        self._generating = generating

    @property
    def middleware(self) -> Middleware:
        """Demands a key where one is needed, and counts a tenant's requests."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            route = _route(request)
            request[TENANT] = self._tenant(request, route)
            if route not in self._generating:
                return await handler(request)
            with self._counted(request[TENANT]):
                return await handler(request)

        return check

    async def stamp(self, request: web.Request, response: web.StreamResponse) -> None:
        """Tell a limited tenant what it has left (an `on_response_prepare` signal)."""
        name = request.get(TENANT)
        if name:
            response.headers.update(self._tenants[name].headers())

    def _tenant(self, request: web.Request, route: tuple[str, str] | None) -> str:
        if not self._keys.needed:
            return ""
        if route is None or route in self._open:  # an unknown route answers 404, not 401
            return ""
        given = given_key(request)
        if not given:
            raise Unauthorized(
                "no API key given", hint="send the header `Authorization: Bearer <key>`"
            )
        tenant = self._keys.tenant(given)
        if tenant is None:
            raise Unauthorized("the API key is wrong")
        return tenant

    def _counted(self, name: str) -> _Counted:
        return _Counted(self._tenants, name, self._metrics)


class _Counted:
    """One request of a tenant; a refusal counts as a failed generation request."""

    __slots__ = ("_metrics", "_request")

    def __init__(self, tenants: Tenants, name: str, metrics: Metrics) -> None:
        self._request = tenants[name].request()
        self._metrics = metrics

    def __enter__(self) -> None:
        try:
            self._request.__enter__()
        except Overloaded as error:
            self._metrics.accepted()
            self._metrics.failed(error)
            raise

    def __exit__(self, *exception: object) -> None:
        self._request.__exit__(*exception)  # type: ignore[arg-type]


def given_key(request: web.Request) -> str:
    """The key a client sent: as OpenAI's clients do, or in Anthropic's `x-api-key`."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and given.strip():
        return given.strip()
    return request.headers.get("x-api-key", "").strip()


def _route(request: web.Request) -> tuple[str, str] | None:
    resource = request.match_info.route.resource
    if resource is None:
        return None
    method = "GET" if request.method == "HEAD" else request.method
    return method, resource.canonical
