"""One HTTP exchange, for every route: read a JSON body into a struct, answer with JSON.

Knows aiohttp and msgspec, but no route's fields: a struct type comes in, a filled struct goes out,
and what the client sent beyond it is remembered for the `x-tgi-ignored-fields` header.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
import orjson
from aiohttp import web

from tgi_cli.errors import InvalidRequest
from tgi_cli.serve.keys import METRICS

log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)

IGNORED = web.RequestKey("ignored", list[str])
TENANT = web.RequestKey("tenant", str)
STRICT_FIELDS = web.AppKey("strict_fields", bool)

#: Levels of a body: what comes later (templates, JSON's writers) recurses over it.
MAX_DEPTH = 200

_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?P<at>.*))?$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]+)`$")
_HEADER_UNSAFE = re.compile(r"[^\x21-\x2b\x2d-\x7e]")
_MAX_HEADER = 1024


class MalformedBody(web.HTTPBadRequest):
    """The body is not JSON at all (400 on every surface)."""


class UnreadableBody(MalformedBody):
    """Not even its bytes can be had, so the connection is of no more use."""


async def read_struct(request: web.Request, kind: type[T]) -> T:
    """Read the request's JSON body as a `kind`; `null` counts as absent.

    Raises `InvalidRequest` naming the field that has a wrong type, `MalformedBody` for anything
    that is not JSON in UTF-8, 415 for another content type and 413 for too large a body.
    """
    raw = await read_json(request)
    parsed = to_struct(raw, kind)
    if isinstance(raw, dict):
        ignore_fields(request, ignored_fields(without_nulls(raw), parsed))
    return parsed


def ignore_fields(request: web.Request, names: Iterable[str]) -> None:
    """Take note of fields that have no effect: for the header, `/metrics` and the log.

    Raises `InvalidRequest` instead where `--strict-fields` says so.
    """
    ignored = list(dict.fromkeys(names))
    if not ignored:
        return
    if request.app[STRICT_FIELDS]:
        listed = ", ".join(f"`{name}`" for name in ignored[:8])
        raise InvalidRequest(
            f"{listed} would have no effect here",
            hint="leave it out; this server was started with --strict-fields",
            param=ignored[0],
        )
    request.setdefault(IGNORED, []).extend(ignored)
    metrics = request.app[METRICS]
    for name in ignored:
        if metrics.ignored_field(name):
            log.warning("%s: `%s` is not a field with an effect here", request.path, name)


async def read_json(request: web.Request) -> Any:
    """Read the request's body as JSON of any shape; raises as `read_struct` does."""
    if not _is_json(request.content_type):
        raise web.HTTPUnsupportedMediaType(
            text=f"expected `Content-Type: application/json`. Given: {request.content_type}"
        )
    try:
        body = await request.read()
    except web.RequestPayloadError as error:  # such as a wrong `Content-Encoding`
        request.content.feed_eof()  # or aiohttp would go on reading, and fail once more
        what = str(error).strip().rpartition("\n")[2].strip()
        raise UnreadableBody(text=f"the body cannot be read: {what}") from None
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedBody(text=f"the body is not valid JSON: {error}") from None
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH:
        _check_depth(raw)
    return raw


def _check_depth(raw: Any) -> None:
    level = [raw] if isinstance(raw, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep")


def to_struct(raw: Any, kind: type[T]) -> T:
    """Convert decoded JSON to a `kind`; `null` counts as absent.

    Raises `InvalidRequest` naming the field that has a wrong type.
    """
    if isinstance(raw, dict):
        raw = without_nulls(raw)
    try:
        return msgspec.convert(raw, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise field_error(str(error)) from None


def _is_json(content_type: str) -> bool:
    return content_type == "application/json" or content_type.endswith("+json")


def without_nulls(raw: dict[str, Any]) -> dict[str, Any]:
    """Drop top-level nulls, and those of the two nested option objects: clients send many."""
    kept = {key: value for key, value in raw.items() if value is not None}
    for name in ("parameters", "stream_options"):
        if isinstance(kept.get(name), dict):
            kept[name] = {k: v for k, v in kept[name].items() if v is not None}
    return kept


def field_error(text: str) -> InvalidRequest:
    """Turn msgspec's ``Expected `int`, got `str` - at `$.a.b` `` into our sentence."""
    match = _PATH.match(text)
    what = match["what"] if match else text
    at = (match["at"] if match else None) or ""
    path = ".".join(reversed(re.findall(r"`\$?\.?([^`]*)`", at))).strip(".")
    missing = _MISSING.match(what)
    if missing:
        field = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidRequest(f"`{field}` is required", param=field)
    sentence = what[:1].lower() + what[1:]
    if not path:
        return InvalidRequest(f"the body must be a JSON object: {sentence}")
    return InvalidRequest(f"`{path}`: {sentence}", param=path)


def ignored_fields(raw: dict[str, Any], parsed: msgspec.Struct, prefix: str = "") -> list[str]:
    """Name the keys of `raw` that the struct does not have, nested structs included."""
    known = parsed.__struct_fields__
    ignored = [prefix + key for key, value in raw.items() if key not in known and value is not None]
    for name in known:
        below, value = raw.get(name), getattr(parsed, name)
        if isinstance(value, msgspec.Struct) and isinstance(below, dict):
            ignored += ignored_fields(below, value, f"{prefix}{name}.")
        elif isinstance(value, list) and isinstance(below, list):
            for raw_item, item in zip(below, value, strict=True):
                if isinstance(item, msgspec.Struct) and isinstance(raw_item, dict):
                    ignored += ignored_fields(raw_item, item, f"{prefix}{name}[].")
    return list(dict.fromkeys(ignored))


async def name_ignored_fields(request: web.Request, response: web.StreamResponse) -> None:
    """Tell the client which of its fields had no effect (an `on_response_prepare` signal)."""
    ignored = request.get(IGNORED)
    if ignored:
        safe = ",".join(_HEADER_UNSAFE.sub("?", name) for name in ignored)
        response.headers["x-tgi-ignored-fields"] = safe[:_MAX_HEADER]


def json_response(
    body: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """Answer with JSON."""
    return web.Response(
        body=orjson.dumps(body), status=status, headers=headers, content_type="application/json"
    )
