"""`POST /tokenize`, `/chat_tokenize` and `/detokenize`: what the server makes of a prompt."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from tgi_cli.errors import InvalidRequest
from tgi_cli.serve.chosen_model import chosen_model
from tgi_cli.serve.exchange import json_response, read_json, read_struct
from tgi_cli.serve.frontdoor import FrontDoor
from tgi_cli.serve.keys import DOOR, SERVED
from tgi_cli.serve.openai.conversation import chat_tools, render_chat
from tgi_cli.serve.openai.schema import ChatRequest, refuse_unsupported
from tgi_cli.serve.openai.tokenize import (
    TokenizeChatRequest,
    TokenizePromptRequest,
    tokenize_chat,
    tokenize_prompt,
)
from tgi_cli.serve.tgi.schema import GenerateRequest


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /detokenize` (vLLM's shape)."""

    tokens: list[int]
    model: str | None = None


async def tokenize(request: web.Request) -> web.Response:
    """Answer the tokens of a text: TGI's list for `inputs`, vLLM's for `prompt` or `messages`.

    TGI's is `{id, text, start, stop}` for each token; offsets count characters. A body with
    `inputs` is TGI's whatever else it has.
    """
    door = request.app[DOOR]
    raw = await read_json(request)  # aiohttp keeps the bytes: `read_struct` reads them again
    given = raw if isinstance(raw, dict) and raw.get("inputs") is None else {}
    if given.get("messages") is not None:
        chat = await read_struct(request, TokenizeChatRequest)
        _check_model(request, chat.model)
        return json_response(await tokenize_chat(door, chat))
    if given.get("prompt") is not None:
        plain = await read_struct(request, TokenizePromptRequest)
        _check_model(request, plain.model)
        return json_response(await tokenize_prompt(door, plain))
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
    door = request.app[DOOR]
    body = await read_struct(request, DetokenizeRequest)
    _check_model(request, body.model)
    text = door.from_ids(body.tokens, field="tokens").text if body.tokens else ""
    return json_response({"prompt": text})


def _check_model(request: web.Request, name: str | None) -> None:
    chosen_model(request.app[DOOR], request.app[SERVED], name)


async def _tokens(door: FrontDoor, text: str, *, add_special_tokens: bool) -> list[dict[str, Any]]:
    tokenizer = door.texts.tokenizer
    ids, offsets = await door.in_pool(
        lambda: tokenizer.encode_with_offsets(text, add_special_tokens=add_special_tokens)
    )
    return [
        {"id": token, "text": text[start:stop], "start": start, "stop": stop}
        for token, (start, stop) in zip(ids, offsets, strict=True)
    ]
