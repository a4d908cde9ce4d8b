"""`POST /tokenize`, `/chat_tokenize` and `/detokenize`: what the server makes of a prompt."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from tgi_cli.errors import InvalidRequest
from tgi_cli.serve.exchange import json_response, read_struct
from tgi_cli.serve.frontdoor import FrontDoor
from tgi_cli.serve.keys import DOOR, SERVED
from tgi_cli.serve.openai.conversation import chat_tools, render_chat
from tgi_cli.serve.openai.schema import ChatRequest, check_model, refuse_unsupported
from tgi_cli.serve.tgi.schema import GenerateRequest


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /detokenize` (vLLM's shape)."""

    tokens: list[int]
    model: str | None = None


async def tokenize(request: web.Request) -> web.Response:
    """Answer `{id, text, start, stop}` for each token; offsets count characters."""
    door = request.app[DOOR]
    body = await read_struct(request, GenerateRequest)
    if not body.inputs:
        raise InvalidRequest("`inputs` cannot be empty", param="inputs")
    return json_response(await _tokens(door, body.inputs, add_special_tokens=True))


async def chat_tokenize(request: web.Request) -> web.Response:
    """Answer the tokens of a conversation and the text the chat template made of it."""
    door = request.app[DOOR]
    body = await read_struct(request, ChatRequest)
    refuse_unsupported(body)
    prompt = await render_chat(door, body, chat_tools(door, body))
    tokens = await _tokens(door, prompt.text, add_special_tokens=False)
    return json_response({"tokenize_response": tokens, "templated_text": prompt.text})


async def detokenize(request: web.Request) -> web.Response:
    """Answer the text that token ids stand for, special tokens written out."""
    door, served = request.app[DOOR], request.app[SERVED]
    body = await read_struct(request, DetokenizeRequest)
    check_model(body.model, served.name, served.model_id)
    text = door.from_ids(body.tokens, field="tokens").text if body.tokens else ""
    return json_response({"prompt": text})


async def _tokens(door: FrontDoor, text: str, *, add_special_tokens: bool) -> list[dict[str, Any]]:
    tokenizer = door.texts.tokenizer
    ids, offsets = await door.in_pool(
        lambda: tokenizer.encode_with_offsets(text, add_special_tokens=add_special_tokens)
    )
    return [
        {"id": token, "text": text[start:stop], "start": start, "stop": stop}
        for token, (start, stop) in zip(ids, offsets, strict=True)
    ]
