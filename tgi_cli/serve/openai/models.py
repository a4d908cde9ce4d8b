"""`GET /v1/models` and `GET /v1/models/{id}`: the one model served here."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from tgi_cli.errors import EngineUnavailable, ModelNotFound
from tgi_cli.serve.exchange import json_response
from tgi_cli.serve.keys import DOOR, SERVED


async def list_models(request: web.Request) -> web.Response:
    """Answer OpenAI's list."""
    return json_response({"object": "list", "data": [_entry(request)]})


async def get_model(request: web.Request) -> web.Response:
    """Answer one entry. Raises `ModelNotFound` for any other id."""
    served = request.app[SERVED]
    asked = request.match_info["id"]
    if asked not in (served.name, served.model_id, "tgi"):
        raise ModelNotFound(
            f"the model `{asked}` does not exist here; this server has `{served.name}`",
            param="model",
        )
    return json_response(_entry(request))


def _entry(request: web.Request) -> dict[str, Any]:
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
    }
