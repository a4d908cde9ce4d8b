"""Every route of the server, in one table: what is registered is what is documented."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tgi_cli.serve import reply_schemas as shapes
from tgi_cli.serve.anthropic import shapes as anthropic
from tgi_cli.serve.anthropic.messages import count_tokens, create_message
from tgi_cli.serve.anthropic.schema import CountTokensRequest, MessagesRequest
from tgi_cli.serve.api_docs import docs, openapi
from tgi_cli.serve.openai.chat import chat_completions
from tgi_cli.serve.openai.completions import completions
from tgi_cli.serve.openai.models import get_model, list_models
from tgi_cli.serve.openai.schema import ChatRequest, CompletionRequest
from tgi_cli.serve.openai.tokenize import TokenizeChatRequest, TokenizePromptRequest
from tgi_cli.serve.openapi import Handler, Route
from tgi_cli.serve.responses import shapes as responses
from tgi_cli.serve.responses.create import count_input_tokens, create_response
from tgi_cli.serve.responses.schema import InputTokensRequest, ResponsesRequest
from tgi_cli.serve.responses.stored import (
    cancel_response,
    delete_response,
    get_response,
    list_input_items,
)
from tgi_cli.serve.tgi.generate import compat_generate, generate, generate_stream
from tgi_cli.serve.tgi.info import health, info, metrics
from tgi_cli.serve.tgi.invocations import invocations
from tgi_cli.serve.tgi.schema import GenerateRequest
from tgi_cli.serve.tgi.tokenize import DetokenizeRequest, chat_tokenize, detokenize, tokenize
from tgi_cli.serve.tgi.vertex import VertexRequest, vertex

_OPENAI, _ANTHROPIC = "OpenAI", "Anthropic"
_TGI, _SERVER = "Text Generation Inference", "Server"


def _get(
    path: str, handler: Handler, tag: str, *replies: Any, media: str = "application/json"
) -> Route:
    return Route(
        method="GET", path=path, handler=handler, tag=tag, replies=replies, media=media, open=True
    )


def _generates(
    path: str,
    handler: Handler,
    tag: str,
    *bodies: type[msgspec.Struct],
    replies: tuple[Any, ...] = (),
    events: tuple[Any, ...] = (),
) -> Route:
    return Route(
        method="POST",
        path=path,
        handler=handler,
        tag=tag,
        bodies=bodies,
        replies=replies,
        events=events,
        generates=True,
    )


def _reads(
    path: str,
    handler: Handler,
    body: type[msgspec.Struct],
    reply: Any,
    *,
    needs_key: bool = True,
    tag: str = _TGI,
) -> Route:
    return Route(
        method="POST",
        path=path,
        handler=handler,
        tag=tag,
        bodies=(body,),
        replies=(reply,),
        open=not needs_key,
    )


_NATIVE, _NATIVE_EVENT = (list[shapes.GenerateResponse],), (shapes.StreamResponse,)
_CHAT, _CHUNK = (shapes.ChatCompletion,), (shapes.ChatCompletionChunk,)
_TEXT = (shapes.Completion,)

ROUTES: Final = (
    _generates(
        "/v1/chat/completions",
        chat_completions,
        _OPENAI,
        ChatRequest,
        replies=_CHAT,
        events=_CHUNK,
    ),
    _generates(
        "/v1/completions", completions, _OPENAI, CompletionRequest, replies=_TEXT, events=_TEXT
    ),
    _generates(
        "/v1/responses",
        create_response,
        _OPENAI,
        ResponsesRequest,
        replies=(responses.Response,),
        events=(responses.ResponseEvent,),
    ),
    _reads(
        "/v1/responses/input_tokens",
        count_input_tokens,
        InputTokensRequest,
        responses.InputTokens,
        tag=_OPENAI,
    ),
    Route(
        method="GET",
        path="/v1/responses/{id}",
        handler=get_response,
        tag=_OPENAI,
        replies=(responses.Response,),
        events=(responses.ResponseEvent,),
        query=("stream", "starting_after"),
    ),
    Route(
        method="DELETE",
        path="/v1/responses/{id}",
        handler=delete_response,
        tag=_OPENAI,
        replies=(responses.DeletedResponse,),
    ),
    Route(
        method="POST",
        path="/v1/responses/{id}/cancel",
        handler=cancel_response,
        tag=_OPENAI,
        replies=(responses.Response,),
    ),
    Route(
        method="GET",
        path="/v1/responses/{id}/input_items",
        handler=list_input_items,
        tag=_OPENAI,
        replies=(responses.InputItems,),
        query=("order", "after", "limit"),
    ),
    _generates(
        "/v1/messages",
        create_message,
        _ANTHROPIC,
        MessagesRequest,
        replies=(anthropic.Message,),
        events=(anthropic.MessageEvent,),
    ),
    _reads(
        "/v1/messages/count_tokens",
        count_tokens,
        CountTokensRequest,
        anthropic.TokenCount,
        tag=_ANTHROPIC,
    ),
    _get("/v1/models", list_models, _OPENAI, shapes.ModelsInfo),
    _get("/v1/models/{id:.+}", get_model, _OPENAI, shapes.ModelInfo),
    _generates("/", compat_generate, _TGI, GenerateRequest, replies=_NATIVE, events=_NATIVE_EVENT),
    _generates("/generate", generate, _TGI, GenerateRequest, replies=(shapes.GenerateResponse,)),
    _generates("/generate_stream", generate_stream, _TGI, GenerateRequest, events=_NATIVE_EVENT),
    _generates(
        "/invocations",
        invocations,
        _TGI,
        GenerateRequest,
        ChatRequest,
        CompletionRequest,
        replies=_NATIVE + _CHAT + _TEXT,
        events=_NATIVE_EVENT + _CHUNK + _TEXT,
    ),
    _generates("/vertex", vertex, _TGI, VertexRequest, replies=(shapes.VertexResponse,)),
    Route(
        method="POST",
        path="/tokenize",
        handler=tokenize,
        tag=_TGI,
        bodies=(GenerateRequest, TokenizePromptRequest, TokenizeChatRequest),
        replies=(list[shapes.SimpleToken], shapes.TokenizeResponse),
    ),
    _reads(
        "/chat_tokenize",
        chat_tokenize,
        ChatRequest,
        shapes.ChatTokenizeResponse,
        needs_key=False,
    ),
    _reads("/detokenize", detokenize, DetokenizeRequest, shapes.DetokenizeResponse),
    _get("/info", info, _TGI, shapes.Info),
    _get("/", health, _SERVER, media=""),
    _get("/health", health, _SERVER, media=""),
    _get("/ping", health, _SERVER, media=""),
    _get("/metrics", metrics, _SERVER, media="text/plain"),
    _get("/docs", docs, _SERVER, media="text/html"),
    _get("/openapi.json", openapi, _SERVER),
    _get("/api-doc/openapi.json", openapi, _SERVER),
)
