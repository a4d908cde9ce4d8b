"""`/v1/responses/{id}` and below: fetch, follow, cancel and delete what is kept."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from tgi_cli.errors import InvalidRequest
from tgi_cli.serve.exchange import TENANT, json_response
from tgi_cli.serve.responses.store import RESPONSES, StoredResponse
from tgi_cli.serve.sse import send_frames
from tgi_cli.serve.surfaces import OPENAI

_MAX_ITEMS = 100


async def get_response(request: web.Request) -> web.StreamResponse:
    """Answer a response as it stands; with `stream=true` the events of one in the background."""
    stored = _find(request)
    if request.query.get("stream", "false").lower() != "true":
        return json_response(stored.response)
    if stored.background is None:
        raise InvalidRequest(
            "only a response made with `background` can be streamed later", param="stream"
        )
    after = _number(request, "starting_after", -1, 2**31)
    frames = stored.background.follow(after)
    return await send_frames(request, frames, error_event=OPENAI.event, patience=0)


async def delete_response(request: web.Request) -> web.Response:
    """Forget a response."""
    name = request.match_info["id"]
    await request.app[RESPONSES].delete(name, request[TENANT])
    return json_response({"id": name, "object": "response", "deleted": True})


async def cancel_response(request: web.Request) -> web.Response:
    """End a response in the background."""
    stored = _find(request)
    if stored.background is None:
        raise InvalidRequest(
            "only a response made with `background` can be cancelled",
            hint="close the connection to end any other",
        )
    await stored.background.cancel()
    return json_response(stored.response)


async def list_input_items(request: web.Request) -> web.Response:
    """Answer the items that a response was asked with, the last first unless `order=asc`."""
    items = list(_find(request).items)
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"`order` must be `asc` or `desc`. Given: {order!r}", param="order")
    if order == "desc":
        items.reverse()
    after = request.query.get("after")
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequest(f"`after` names no item of this response: {after}", param="after")
        items = items[ids.index(after) + 1 :]
    limit = _number(request, "limit", 20, _MAX_ITEMS)
    page: list[dict[str, Any]] = items[: max(1, limit)]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > len(page),
        }
    )


def _find(request: web.Request) -> StoredResponse:
    return request.app[RESPONSES].get(request.match_info["id"], request[TENANT])


def _number(request: web.Request, name: str, default: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or int(text) > most:
        raise InvalidRequest(f"`{name}` must be a number from 0 to {most}", param=name)
    return int(text)
