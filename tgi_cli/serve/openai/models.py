"""`GET /v1/models` and `GET /v1/models/{id}`: the model served here and its adapters."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from tgi_cli.engine.messages import AdapterFacts
from tgi_cli.errors import EngineUnavailable
from tgi_cli.serve.chosen_model import chosen_model, is_base
from tgi_cli.serve.exchange import json_response
from tgi_cli.serve.keys import DOOR, SERVED


async def list_models(request: web.Request) -> web.Response:
    """Answer OpenAI's list; adapters come after the model, each with it as its `parent`."""
    try:
        adapters = request.app[DOOR].facts.adapters
    except EngineUnavailable:
        adapters = []
    entries = [_base(request), *(_adapted(request, adapter) for adapter in adapters)]
    return json_response({"object": "list", "data": entries})


async def get_model(request: web.Request) -> web.Response:
    """Answer one entry. Raises `ModelNotFound` for any other id."""
    door, served = request.app[DOOR], request.app[SERVED]
    asked = request.match_info["id"]
    if is_base(asked, served):
        return json_response(_base(request))
    chosen = chosen_model(door, served, asked)
    [adapter] = [each for each in door.facts.adapters if each.name == chosen.adapter]
    return json_response(_adapted(request, adapter))


def _base(request: web.Request) -> dict[str, Any]:
    served = request.app[SERVED]
    try:
        longest: int | None = request.app[DOOR].limits.max_total_tokens
    except EngineUnavailable:
        longest = None
    return {
        "id": served.name,
        "object": "model",
        "created": served.since,
        "owned_by": served.model_id,
        "max_model_len": longest,
        "root": served.model_id,
        "parent": None,
    }


def _adapted(request: web.Request, adapter: AdapterFacts) -> dict[str, Any]:
    parent = _base(request)
    return {**parent, "id": adapter.name, "root": adapter.source, "parent": parent["id"]}
