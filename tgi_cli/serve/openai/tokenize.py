"""vLLM's bodies of `POST /tokenize`: a plain prompt, or a conversation laid out by the template.

TGI's body of the same route (`inputs`) is `serve.tgi.tokenize`'s, which also tells them apart.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tgi_cli.serve.frontdoor import FrontDoor
from tgi_cli.serve.openai.conversation import chat_tools, render_chat
from tgi_cli.serve.openai.schema import ChatMessage, ChatRequest, refuse_unsupported
from tgi_cli.serve.openai.tools.declared import Tool


class TokenizeFields(msgspec.Struct, kw_only=True):
    """Fields that both bodies share. `return_token_strs` asks for the vocabulary's spellings."""

    model: str | None = None
    return_token_strs: bool = False


class TokenizePromptRequest(TokenizeFields, kw_only=True):
    """vLLM's body of `POST /tokenize` for a plain text."""

    prompt: str
    add_special_tokens: bool = True


class TokenizeChatRequest(TokenizeFields, kw_only=True):
    """vLLM's body of `POST /tokenize` for a conversation."""

    messages: list[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[Tool] = []


async def tokenize_prompt(door: FrontDoor, body: TokenizePromptRequest) -> dict[str, Any]:
    """The reply to a plain text; an empty one has no tokens but those the model wants around it."""
    ids = await _encode(door, body.prompt, body.add_special_tokens)
    return _reply(door, ids, body.return_token_strs)


async def tokenize_chat(door: FrontDoor, body: TokenizeChatRequest) -> dict[str, Any]:
    """The reply to a conversation: the tokens that a chat with these fields would begin with."""
    chat = ChatRequest(
        messages=body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=body.tools,
    )
    refuse_unsupported(chat)
    prompt = await render_chat(door, chat, chat_tools(door, chat))
    ids = prompt.ids
    if body.add_special_tokens:
        ids = await _encode(door, prompt.text, True)
    return _reply(door, ids, body.return_token_strs)


async def _encode(door: FrontDoor, text: str, add_special_tokens: bool) -> list[int]:
    tokenizer = door.texts.tokenizer
    return await door.in_pool(lambda: tokenizer.encode(text, add_special_tokens))


def _reply(door: FrontDoor, ids: list[int], spelled: bool) -> dict[str, Any]:
    content = door.texts.tokenizer.token_content
    return {
        "count": len(ids),
        "max_model_len": door.limits.max_total_tokens,
        "tokens": ids,
        "token_strs": [content(token) for token in ids] if spelled else None,
    }
