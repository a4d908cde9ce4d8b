"""`GET /openapi.json`, `/api-doc/openapi.json` (TGI's place for it) and `/docs`."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from aiohttp import web

from tgi_cli.serve.openapi import Route, build_document, docs_page

_DOCUMENT = web.AppKey("openapi_document", bytes)
_PAGE = web.AppKey("openapi_page", str)


def set_up_docs(app: web.Application, routes: Sequence[Route]) -> None:
    """Make document and page once, for the handlers below."""
    document = build_document(routes)
    app[_DOCUMENT] = orjson.dumps(document)
    app[_PAGE] = docs_page(document)


async def openapi(request: web.Request) -> web.Response:
    """Answer the OpenAPI document."""
    return web.Response(body=request.app[_DOCUMENT], content_type="application/json")


async def docs(request: web.Request) -> web.Response:
    """Answer a page that lists every operation."""
    return web.Response(text=request.app[_PAGE], content_type="text/html")
