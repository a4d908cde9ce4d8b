"""`GET /info`, `/health`, `/ping`, `/` and `/metrics`."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from tgi_cli import __version__
from tgi_cli.serve.error_pages import ENGINE_RETRY_AFTER
from tgi_cli.serve.exchange import json_response
from tgi_cli.serve.keys import DOOR, METRICS, PULSE


async def info(request: web.Request) -> web.Response:
    """Answer TGI's facts and the ones it dropped or never had. 503 until the model is known."""
    door = request.app[DOOR]
    facts, limits, config = door.facts, door.limits, door.config
    body: dict[str, Any] = {
        "model_id": facts.model_id,
        "model_sha": facts.model_sha,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": config.max_concurrent_requests,
        "max_best_of": config.max_best_of,
        "max_stop_sequences": config.max_stop_sequences,
        "max_input_tokens": limits.max_input_tokens,
        "max_total_tokens": limits.max_total_tokens,
        "validation_workers": config.validation_workers,
        "max_client_batch_size": config.max_client_batch_size,
        "router": "text-generation-router",
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "architecture": facts.architecture,
        "num_parameters": facts.num_parameters,
        "weights_bytes": facts.weights_bytes,
        "quantization": facts.quantization,
        "model_dtype": facts.dtype,
        "activation_dtype": facts.activation_dtype,
        "kv_cache_dtype": facts.kv_cache_dtype,
        "model_device_type": facts.device,
        "backend": facts.backend,
        "deterministic": facts.deterministic,
        "max_num_seqs": facts.max_num_seqs,
        "max_batch_tokens": facts.max_batch_tokens,
        "block_size": facts.block_size,
        "kv_cache_tokens": facts.kv_cache_tokens,
        "http_workers": config.http_workers,
        "num_shard": len(facts.ranks) or 1,
        "adapters": [msgspec.to_builtins(adapter) for adapter in facts.adapters],
        "ranks": [msgspec.to_builtins(rank) for rank in facts.ranks],
    }
    return json_response(body)


async def health(request: web.Request) -> web.Response:
    """200 when a request would be served now; otherwise 503 and what the server is doing."""
    door, pulse = request.app[DOOR], request.app[PULSE]
    state = door.state
    if state == "ready" and not pulse.fresh:
        state = f"the engine has been silent for {pulse.silence:.0f} seconds"
    if state == "ready":
        return web.Response()
    body = {"error": state, "error_type": "healthcheck"}
    return json_response(body, status=503, headers={"Retry-After": str(ENGINE_RETRY_AFTER)})


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format."""
    return web.Response(
        body=request.app[METRICS].render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )
