"""`POST /v1/chat/completions`."""

from __future__ import annotations

from aiohttp import web

from tgi_cli.errors import TgiError
from tgi_cli.serve.answer import complete_all
from tgi_cli.serve.chosen_model import chosen_model
from tgi_cli.serve.exchange import TENANT, ignore_fields, json_response, read_struct
from tgi_cli.serve.keys import DOOR, SERVED
from tgi_cli.serve.openai.chat_reply import ChatReply
from tgi_cli.serve.openai.conversation import Conversation, effort_kwargs
from tgi_cli.serve.openai.schema import ChatRequest, num_choices
from tgi_cli.serve.sse import Outlet, send_frames
from tgi_cli.serve.surfaces import OPENAI
from tgi_cli.serve.timing import Timing


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, whole or as a stream of chunks."""
    timing = Timing()
    door, served = request.app[DOOR], request.app[SERVED]
    body = await read_struct(request, ChatRequest)
    count = num_choices(body.n)
    with door.admit(count) as visit:
        chosen = chosen_model(door, served, body.model, body.adapter_id)
        if effort_kwargs(door.texts.template, body) is None and body.reasoning_effort is not None:
            ignore_fields(request, ["reasoning_effort"])
        chat = await Conversation.begin(
            door, body, count=count, tenant=request[TENANT], adapter=chosen.adapter
        )
        timing.validated()
        reply = ChatReply(door, body, chat, chosen.name)
        if not body.stream:
            await complete_all(chat.answers)
            headers = timing.headers(door.facts, [chat.prompt], chat.answers)
            return json_response(reply.whole(), headers=headers)

        def broken(error: TgiError) -> bytes:
            visit.error = error
            return OPENAI.event(error)

        outlet = Outlet()
        return await send_frames(
            request,
            reply.frames(outlet),
            outlet=outlet,
            error_event=broken,
            headers=timing.stream_headers(door.facts, [chat.prompt]),
        )
