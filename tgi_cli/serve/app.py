"""The aiohttp application of one HTTP worker: routes, middlewares, shared state.

Everything it needs comes in through `build_app`; it knows neither processes nor sockets.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import msgspec
from aiohttp import web

from tgi_cli.config import ServerConfig
from tgi_cli.engine.client import EngineClient
from tgi_cli.serve.api_docs import set_up_docs
from tgi_cli.serve.api_keys import ApiKeys
from tgi_cli.serve.auth import Guard
from tgi_cli.serve.cors import cors
from tgi_cli.serve.error_pages import PAYLOAD_LIMIT, error_pages
from tgi_cli.serve.exchange import STRICT_FIELDS, name_ignored_fields
from tgi_cli.serve.frontdoor import FrontDoor
from tgi_cli.serve.keys import DOOR, METRICS, PULSE, SERVED, Pulse, Served
from tgi_cli.serve.ledger import Ledger
from tgi_cli.serve.observe import observe, stamp_id
from tgi_cli.serve.openapi import Route
from tgi_cli.serve.prometheus import Metrics
from tgi_cli.serve.responses.peers import PEERS, Peers
from tgi_cli.serve.responses.store import RESPONSES, ResponseStore
from tgi_cli.serve.routes import ROUTES
from tgi_cli.serve.tenants import Tenants


def build_app(
    config: ServerConfig,
    client: EngineClient,
    *,
    model_id: str,
    worker: int = 0,
    ledger: Ledger | None = None,
    peers: Peers | None = None,
) -> web.Application:
    """Build the application for one engine; `app[DOOR].open` lets requests in.

    `ledger` is where workers count together, `peers` are the others; without both this is the only
    worker.
    """
    ledger, peers = ledger or Ledger(), peers or Peers()
    routes = _routes(config)
    metric = Metrics(client, worker=worker, num_workers=config.http_workers)
    tenants = Tenants(ledger)
    guard = Guard(
        ApiKeys(config.api_key, config.api_key_file, on_limits=tenants.limit),
        tenants,
        metric,
        open_routes=_pairs(route for route in routes if route.open),
        generating=_pairs(route for route in routes if route.generates),
    )
    preflight, stamp_cors = cors(config.cors_allow_origin)
    app = web.Application(
        client_max_size=config.payload_limit,
        middlewares=[
            observe(metric),
            error_pages,
            preflight,
            *(() if peers.alone else (peers.middleware,)),
            guard.middleware,
        ],
    )
    pulse = Pulse()
    metric.step_age = lambda: pulse.step_age
    app[PAYLOAD_LIMIT] = config.payload_limit
    app[STRICT_FIELDS] = config.strict_fields
    app[METRICS] = metric
    app[PULSE] = pulse
    app[DOOR] = FrontDoor(client, config, metric, tenants, ledger)
    app[RESPONSES] = ResponseStore(config.max_stored_responses, num_workers=config.http_workers)
    app[PEERS] = peers
    app[SERVED] = Served(config.served_model_name or model_id, model_id, int(time.time()))
    app.on_response_prepare.extend((stamp_id, name_ignored_fields, guard.stamp, stamp_cors))
    app.on_cleanup.append(_close_door)
    if config.otlp_endpoint is not None:
        _trace(app, config)
    set_up_docs(app, ROUTES)
    app.add_routes([web.route(route.method, route.path, route.handler) for route in routes])
    return app


def _routes(config: ServerConfig) -> tuple[Route, ...]:
    """All routes, and those a hosting platform wants under other names (Vertex AI does)."""
    routes = list(ROUTES)
    for name, like in ((config.health_route, "/health"), (config.predict_route, "/vertex")):
        for route in ROUTES:
            named = any(r.path == name and r.method == route.method for r in routes)
            if name is not None and route.path == like and not named:
                routes.append(msgspec.structs.replace(route, path=name))
    return tuple(routes)


def _trace(app: web.Application, config: ServerConfig) -> None:
    """Put traces around everything; without them not even the packages are imported."""
    from tgi_cli.serve.telemetry import Tracing

    tracing = Tracing(config, app[SERVED].name)
    app.middlewares.insert(1, tracing.middleware)  # inside `observe`, which knows the id
    app.on_response_prepare.append(tracing.stamp)
    app[DOOR].on_end = tracing.answered

    async def close(_: web.Application) -> None:
        await tracing.close()

    app.on_cleanup.append(close)


def _pairs(routes: Iterable[Route]) -> frozenset[tuple[str, str]]:
    """Method and canonical path, as aiohttp knows them."""
    return frozenset((r.method, re.sub(r":[^}]*}", "}", r.path)) for r in routes)


async def _close_door(app: web.Application) -> None:
    await app[RESPONSES].close()
    await app[PEERS].close()
    app[DOOR].close()
