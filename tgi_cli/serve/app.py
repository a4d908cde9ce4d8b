"""The aiohttp application of one HTTP worker: routes, middlewares, shared state.

Everything it needs comes in through `build_app`; it knows neither processes nor sockets.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from tgi_cli.config import ServerConfig
from tgi_cli.engine.client import EngineClient
from tgi_cli.serve.api_docs import set_up_docs
from tgi_cli.serve.auth import api_key
from tgi_cli.serve.cors import cors
from tgi_cli.serve.error_pages import PAYLOAD_LIMIT, error_pages
from tgi_cli.serve.exchange import STRICT_FIELDS, name_ignored_fields
from tgi_cli.serve.frontdoor import FrontDoor
from tgi_cli.serve.keys import DOOR, METRICS, PULSE, SERVED, Pulse, Served
from tgi_cli.serve.prometheus import Metrics
from tgi_cli.serve.routes import ROUTES

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(
    config: ServerConfig, client: EngineClient, *, model_id: str, worker: int = 0
) -> web.Application:
    """Build the application for one engine; `app[DOOR].open` lets requests in."""
    preflight, stamp_cors = cors(config.cors_allow_origin)
    app = web.Application(
        client_max_size=config.payload_limit,
        middlewares=[error_pages, count_in_flight, preflight, api_key(config.api_key)],
    )
    metric = Metrics(client, worker=worker, num_workers=config.http_workers)
    pulse = Pulse()
    metric.step_age = lambda: pulse.step_age
    app[PAYLOAD_LIMIT] = config.payload_limit
    app[STRICT_FIELDS] = config.strict_fields
    app[METRICS] = metric
    app[PULSE] = pulse
    app[DOOR] = FrontDoor(client, config, metric)
    app[SERVED] = Served(config.served_model_name or model_id, model_id, int(time.time()))
    app.on_response_prepare.append(name_ignored_fields)
    app.on_response_prepare.append(stamp_cors)
    app.on_cleanup.append(_close_door)
    set_up_docs(app, ROUTES)
    app.add_routes([web.route(route.method, route.path, route.handler) for route in ROUTES])
    return app


@web.middleware
async def count_in_flight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Know how many exchanges are open: draining waits for them."""
    metric = request.app[METRICS]
    metric.in_flight += 1
    try:
        return await handler(request)
    finally:
        metric.in_flight -= 1


async def _close_door(app: web.Application) -> None:
    app[DOOR].close()
