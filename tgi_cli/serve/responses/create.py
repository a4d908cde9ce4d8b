"""`POST /v1/responses` and `/v1/responses/input_tokens`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing

from aiohttp import web

from tgi_cli.errors import InvalidRequest, TgiError
from tgi_cli.serve.chosen_model import chosen_model
from tgi_cli.serve.exchange import TENANT, ignore_fields, json_response, read_struct
from tgi_cli.serve.frontdoor import FrontDoor, Visit
from tgi_cli.serve.keys import DOOR, METRICS, SERVED
from tgi_cli.serve.openai.conversation import Conversation, chat_tools, render_chat
from tgi_cli.serve.openai.schema import ChatMessage
from tgi_cli.serve.responses.background import Background
from tgi_cli.serve.responses.peers import PEERS
from tgi_cli.serve.responses.run import ResponseRun, frame
from tgi_cli.serve.responses.schema import InputTokensRequest, ResponsesRequest
from tgi_cli.serve.responses.store import RESPONSES, StoredResponse, item_list
from tgi_cli.serve.responses.translate import (
    conversation,
    generation,
    input_messages,
    output_messages,
)
from tgi_cli.serve.sse import send_frames
from tgi_cli.serve.surfaces import OPENAI
from tgi_cli.serve.timing import Timing


async def create_response(request: web.Request) -> web.StreamResponse:
    """Answer a list of items with more of them: whole, as typed events, or in the background."""
    timing = Timing()
    door, served, store = request.app[DOOR], request.app[SERVED], request.app[RESPONSES]
    body = await read_struct(request, ResponsesRequest)
    with ExitStack() as held:
        visit = held.enter_context(door.admit(1))
        chosen = chosen_model(door, served, body.model)
        stored = _stored(door, body)
        if body.max_output_tokens is not None and body.max_output_tokens < 1:
            raise InvalidRequest(
                f"`max_output_tokens` must be >= 1. Given: {body.max_output_tokens}",
                param="max_output_tokens",
            )
        earlier = _earlier(request, body)
        asked, ignored = generation(body, earlier, door.texts.template)
        ignore_fields(request, ignored)
        chat = await Conversation.begin(
            door,
            asked,
            count=1,
            tenant=request[TENANT],
            adapter=chosen.adapter,
            tokens_field="max_output_tokens",
        )
        timing.validated()
        run = ResponseRun(
            body,
            chat,
            door.texts.tokenizer,
            name=request.app[PEERS].new_id(),
            model=chosen.name,
            stored=stored,
            top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        )
        kept = StoredResponse(
            request[TENANT],
            run.response,
            item_list(body.input),
            [*earlier, *input_messages(body.input)],
        )
        if body.background:
            return await _in_background(request, body, run, kept, visit, held.pop_all())

        async def frames() -> AsyncGenerator[bytes, None]:
            async with aclosing(run.events()) as steps:
                async for events in steps:
                    yield frame(events)
            if stored:
                store.put(kept)

        def broken(error: TgiError) -> bytes:
            visit.error = error
            return frame([run.fail(error)])

        if body.stream:
            headers = timing.stream_headers(door.facts, [chat.prompt])
            return await send_frames(request, frames(), error_event=broken, headers=headers)
        async for _ in frames():
            pass
        headers = timing.headers(door.facts, [chat.prompt], chat.answers)
        return json_response(run.response, headers=headers)


async def count_input_tokens(request: web.Request) -> web.Response:
    """Answer how many tokens the prompt of such a request has."""
    door, served = request.app[DOOR], request.app[SERVED]
    body = await read_struct(request, InputTokensRequest)
    chosen_model(door, served, body.model)
    asked, ignored = conversation(body, _earlier(request, body), door.texts.template)
    ignore_fields(request, ignored)
    prompt = await render_chat(door, asked, chat_tools(door, asked))
    return json_response({"object": "response.input_tokens", "input_tokens": len(prompt.ids)})


async def _in_background(
    request: web.Request,
    body: ResponsesRequest,
    run: ResponseRun,
    kept: StoredResponse,
    visit: Visit,
    held: ExitStack,
) -> web.StreamResponse:
    """Let the response be made while nobody waits; it holds its place until it ends."""
    store, metrics = request.app[RESPONSES], request.app[METRICS]

    def ended(failure: BaseException | None) -> None:
        visit.error = failure
        held.close()
        metrics.in_flight -= 1
        if store.holds(run.id):
            store.put(kept)  # it has grown

    metrics.in_flight += 1  # draining waits for it
    queued = dict(run.response)
    kept.background = Background(run, ended)
    store.put(kept)
    if not body.stream:
        return json_response(queued)
    followed = kept.background.follow(-1)
    return await send_frames(request, followed, error_event=OPENAI.event, patience=0)


def _stored(door: FrontDoor, body: ResponsesRequest) -> bool:
    """Whether the response will be kept. Raises `InvalidRequest` where it would have to be."""
    possible = door.config.max_stored_responses > 0
    wanted = possible if body.store is None else body.store
    if wanted and not possible:
        raise InvalidRequest(
            "`store` is not possible here: this server keeps no responses",
            hint="start the server with --max-stored-responses above 0",
            param="store",
        )
    if body.background and not wanted:
        raise InvalidRequest(
            "`background` needs `store`: nobody could fetch the response otherwise",
            param="background",
        )
    return wanted


def _earlier(request: web.Request, body: InputTokensRequest) -> Sequence[ChatMessage]:
    """The conversation that `previous_response_id` names, its output included."""
    if body.previous_response_id is None:
        return []
    before = request.app[RESPONSES].get(body.previous_response_id, request[TENANT])
    status = before.response["status"]
    if status not in ("completed", "incomplete"):
        raise InvalidRequest(
            f"`previous_response_id` names a response that is {status}",
            param="previous_response_id",
        )
    return [*before.messages, *output_messages(before.response["output"])]
