"""The OpenAPI document of this server, from its table of routes and the structs they read.

Bodies are described by msgspec's own schema of the struct that the route decodes into, so what
the document says is what is read. Knows neither handlers' code nor sockets.
"""

from __future__ import annotations

import html
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from tgi_cli import __version__
from tgi_cli.serve.anthropic.shapes import AnthropicErrorReply
from tgi_cli.serve.surfaces import ANTHROPIC, OPENAI, TGI, Surface, surface_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::[^}]*)?\}")
_JSON, _EVENTS = "application/json", "text/event-stream"


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One operation: what is registered with aiohttp, and what the document says of it.

    `bodies` are the structs its JSON body may be, in the order they are tried. `replies` are the
    types its answer may have (none: not described; no `media`: an empty answer), `events` those
    of its server-sent events. `query` names its optional query parameters. `generates`: it runs
    the model, and can fail as that can.
    Its summary is the handler's own.
    """

    method: str
    path: str
    handler: Handler
    tag: str
    bodies: tuple[type[msgspec.Struct], ...] = ()
    replies: tuple[Any, ...] = ()
    events: tuple[Any, ...] = ()
    media: str = _JSON
    generates: bool = False
    open: bool = False
    query: tuple[str, ...] = ()


class OpenAIError(msgspec.Struct, kw_only=True):
    """What went wrong, inside the `error` of `OpenAIErrorReply`."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorReply(msgspec.Struct, kw_only=True):
    """The error body of every route under `/v1`."""

    error: OpenAIError


class ErrorResponse(msgspec.Struct, kw_only=True):
    """The error body of every other route: Text Generation Inference's."""

    error: str
    error_type: str


_ERROR_BODIES: dict[Surface, type[msgspec.Struct]] = {
    OPENAI: OpenAIErrorReply,
    ANTHROPIC: AnthropicErrorReply,
    TGI: ErrorResponse,
}
_OPENAI_STATUSES = {
    400: "A field has a wrong type or value, or the body is not JSON",
    404: "No such model here",
}
_TGI_STATUSES = {
    400: "The body is not JSON",
    404: "No such model or adapter here",
    422: "A field has a wrong type or value",
}
_BODY_STATUSES = {413: "The body is too large", 415: "The body is not declared as JSON"}
_GENERATION_STATUSES = {
    429: "The server is full; `Retry-After` says when to come back",
    503: "The model is loading, restarting or shutting down",
}


def build_document(routes: Sequence[Route]) -> dict[str, Any]:
    """Describe `routes` as an OpenAPI 3.1 object."""
    types = [t for route in routes for t in (*route.bodies, *route.replies, *route.events)]
    types += _ERROR_BODIES.values()
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    paths: dict[str, Any] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tgi",
            "description": "OpenAI's API and Text Generation Inference's over one engine.",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"api_key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.replies or (route.media and not route.events):
        content[route.media] = _any_of(route.replies)
    if route.events:
        content[_EVENTS] = _any_of(route.events)
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": (route.handler.__doc__ or "").strip().partition("\n")[0],
        "tags": [route.tag],
        "responses": {
            "200": {"description": "The answer", **({"content": content} if content else {})},
            **_errors(route),
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(route.path)
    ] + [{"name": name, "in": "query", "schema": {"type": "string"}} for name in route.query]
    if parameters:
        operation["parameters"] = parameters
    if route.bodies:
        operation["requestBody"] = {"required": True, "content": {_JSON: _any_of(route.bodies)}}
    if not route.open:
        operation["security"] = [{}, {"api_key": []}]
    return operation


def _any_of(types: tuple[Any, ...]) -> dict[str, Any]:
    """A media type whose content is one of `types`."""
    schemas, _ = msgspec.json.schema_components(types, ref_template=_REF)
    if not schemas:
        return {}
    return {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}}


def _operation_id(route: Route) -> str:
    """Unique also where one handler serves several paths: the path's words."""
    words = re.findall(r"\w+", _PARAMETER.sub(r"\1", route.path))
    return "_".join([route.method.lower(), *words])


def _errors(route: Route) -> dict[str, Any]:
    openai = surface_of(route.path) is not TGI
    statuses: dict[int, str] = {}
    if not route.open:
        statuses[401] = "The API key is missing or wrong"
    if route.bodies:
        statuses |= _OPENAI_STATUSES if openai else _TGI_STATUSES
        statuses |= _BODY_STATUSES | {503: _GENERATION_STATUSES[503]}
    elif _PARAMETER.search(route.path):
        statuses[404] = "Nothing of this name here"
        if not route.open:
            statuses[400] = "It cannot be asked of this one, or a query parameter is wrong"
    elif route.path in ("/", "/health", "/ping", "/info"):
        statuses[503] = _GENERATION_STATUSES[503]
    if route.generates:
        statuses |= _GENERATION_STATUSES
        statuses[500] = "The engine gave up on this request" if openai else "An internal error"
        if not openai:
            statuses[424] = "The engine gave up on this request"
    kind = _ERROR_BODIES[surface_of(route.path)]
    content = {_JSON: {"schema": {"$ref": _REF.format(name=kind.__name__)}}}
    return {
        str(status): {"description": statuses[status], "content": content}
        for status in sorted(statuses)
    }


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tgi {version}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
code {{ font-size: 0.95em }}
td {{ padding: 0.1rem 0.8rem 0.1rem 0; vertical-align: top }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #16181c; color: #dde }}
  a {{ color: #8bf }}
}}
</style>
</head>
<body>
<h1>tgi {version}</h1>
<p>{description} The machine-readable document is <a href="openapi.json">openapi.json</a>.</p>
<dl>
{operations}
</dl>
{schemas}
</body>
</html>
"""


def docs_page(document: dict[str, Any]) -> str:
    """A page that lists the document's operations and their fields; it loads nothing else."""
    parts: list[str] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            bodies = " or ".join(f'<a href="#{name}">{name}</a>' for name in _body_names(operation))
            parts.append(
                f"<dt><code>{method.upper()} {html.escape(path)}</code> {bodies}</dt>"
                f"<dd>{html.escape(operation['summary'])} "
                f"Statuses: {', '.join(operation['responses'])}.</dd>"
            )
    schemas = document["components"]["schemas"].items()
    return _PAGE.format(
        version=html.escape(document["info"]["version"]),
        description=html.escape(document["info"]["description"]),
        operations="\n".join(parts),
        schemas="\n".join(_table(name, schema) for name, schema in schemas),
    )


def _body_names(operation: dict[str, Any]) -> list[str]:
    body = operation.get("requestBody")
    if body is None:
        return []
    schema = body["content"][_JSON]["schema"]
    return [ref["$ref"].rpartition("/")[2] for ref in schema.get("anyOf", [schema])]


def _table(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{html.escape(field)}</code></td>"
        f"<td>{html.escape(_type_name(of))}</td>"
        f"<td>{'required' if field in required else ''}</td></tr>"
        for field, of in schema["properties"].items()
    )
    return f'<h3 id="{name}">{name}</h3><table>{rows}</table>'


def _type_name(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_name(one) for one in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if schema.get("type") == "array":
        return f"array of {_type_name(schema.get('items', {}))}"
    return str(schema.get("type", "any"))
