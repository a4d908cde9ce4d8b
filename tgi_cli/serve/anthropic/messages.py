"""`POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from aiohttp import web

from tgi_cli.errors import InvalidRequest, TgiError
from tgi_cli.serve.anthropic.reply import MessageReply
from tgi_cli.serve.anthropic.schema import CountTokensRequest, MessagesRequest
from tgi_cli.serve.anthropic.translate import conversation, generation
from tgi_cli.serve.chosen_model import chosen_model
from tgi_cli.serve.exchange import TENANT, ignore_fields, json_response, read_struct
from tgi_cli.serve.keys import DOOR, SERVED
from tgi_cli.serve.openai.conversation import Conversation, chat_tools, render_chat
from tgi_cli.serve.sse import send_frames
from tgi_cli.serve.surfaces import ANTHROPIC
from tgi_cli.serve.timing import Timing


async def create_message(request: web.Request) -> web.StreamResponse:
    """Answer a conversation of Anthropic's shape, whole or as its events."""
    timing = Timing()
    door, served = request.app[DOOR], request.app[SERVED]
    body = await read_struct(request, MessagesRequest)
    with door.admit(1) as visit:
        chosen = chosen_model(door, served, body.model)
        if body.max_tokens < 1:
            raise InvalidRequest(
                f"`max_tokens` must be >= 1. Given: {body.max_tokens}", param="max_tokens"
            )
        limit = door.config.max_stop_sequences
        asked, ignored = generation(body, door.texts.template, max_stop_sequences=limit)
        ignore_fields(request, ignored)
        chat = await Conversation.begin(
            door, asked, count=1, tenant=request[TENANT], adapter=chosen.adapter
        )
        timing.validated()
        reply = MessageReply(chat, chosen.name)
        if not body.stream:
            await chat.answers[0].complete()
            headers = timing.headers(door.facts, [chat.prompt], chat.answers)
            return json_response(reply.whole(), headers=headers)

        def broken(error: TgiError) -> bytes:
            visit.error = error
            return ANTHROPIC.event(error)

        return await send_frames(
            request,
            reply.frames(),
            error_event=broken,
            headers=timing.stream_headers(door.facts, [chat.prompt]),
        )


async def count_tokens(request: web.Request) -> web.Response:
    """Answer how many tokens the prompt of such a conversation has."""
    door, served = request.app[DOOR], request.app[SERVED]
    body = await read_struct(request, CountTokensRequest)
    chosen_model(door, served, body.model)
    asked, ignored = conversation(body, door.texts.template)
    ignore_fields(request, ignored)
    prompt = await render_chat(door, asked, chat_tools(door, asked))
    return json_response({"input_tokens": len(prompt.ids)})
