"""Every route of the server, in one table: what is registered is what is documented."""

from __future__ import annotations

from typing import Final

import msgspec

from tgi_cli.serve.api_docs import docs, openapi
from tgi_cli.serve.openai.chat import chat_completions
from tgi_cli.serve.openai.completions import completions
from tgi_cli.serve.openai.models import get_model, list_models
from tgi_cli.serve.openai.schema import ChatRequest, CompletionRequest
from tgi_cli.serve.openapi import Handler, Route
from tgi_cli.serve.tgi.generate import compat_generate, generate, generate_stream
from tgi_cli.serve.tgi.info import health, info, metrics
from tgi_cli.serve.tgi.invocations import invocations
from tgi_cli.serve.tgi.schema import GenerateRequest
from tgi_cli.serve.tgi.tokenize import DetokenizeRequest, chat_tokenize, detokenize, tokenize
from tgi_cli.serve.tgi.vertex import VertexRequest, vertex

_OPENAI, _TGI, _SERVER = "OpenAI", "Text Generation Inference", "Server"


def _get(path: str, handler: Handler, tag: str, media: str = "application/json") -> Route:
    return Route(method="GET", path=path, handler=handler, tag=tag, media=media, open=True)


def _generates(
    path: str, handler: Handler, tag: str, *bodies: type[msgspec.Struct], streams: bool = True
) -> Route:
    return Route(
        method="POST",
        path=path,
        handler=handler,
        tag=tag,
        bodies=bodies,
        streams=streams,
        generates=True,
    )


def _reads(
    path: str, handler: Handler, body: type[msgspec.Struct], *, needs_key: bool = True
) -> Route:
    return Route(
        method="POST", path=path, handler=handler, tag=_TGI, bodies=(body,), open=not needs_key
    )


ROUTES: Final = (
    _generates("/v1/chat/completions", chat_completions, _OPENAI, ChatRequest),
    _generates("/v1/completions", completions, _OPENAI, CompletionRequest),
    _get("/v1/models", list_models, _OPENAI),
    _get("/v1/models/{id:.+}", get_model, _OPENAI),
    _generates("/", compat_generate, _TGI, GenerateRequest),
    _generates("/generate", generate, _TGI, GenerateRequest, streams=False),
    _generates("/generate_stream", generate_stream, _TGI, GenerateRequest),
    _generates("/invocations", invocations, _TGI, GenerateRequest, ChatRequest, CompletionRequest),
    _generates("/vertex", vertex, _TGI, VertexRequest, streams=False),
    _reads("/tokenize", tokenize, GenerateRequest),
    _reads("/chat_tokenize", chat_tokenize, ChatRequest, needs_key=False),
    _reads("/detokenize", detokenize, DetokenizeRequest),
    _get("/info", info, _TGI),
    _get("/", health, _SERVER),
    _get("/health", health, _SERVER),
    _get("/ping", health, _SERVER),
    _get("/metrics", metrics, _SERVER, "text/plain"),
    _get("/docs", docs, _SERVER, "text/html"),
    _get("/openapi.json", openapi, _SERVER),
    _get("/api-doc/openapi.json", openapi, _SERVER),
)
