"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from tgi_cli.errors import InvalidRequest, TgiError
from tgi_cli.grammar import Grammar
from tgi_cli.serve.answer import Answer, complete_all
from tgi_cli.serve.error_pages import error_event
from tgi_cli.serve.exchange import IGNORED, TENANT, json_response, read_struct
from tgi_cli.serve.frontdoor import Caller, FrontDoor, Prompt
from tgi_cli.serve.grammars import AskedGrammar, asked_grammar
from tgi_cli.serve.keys import DOOR, SERVED
from tgi_cli.serve.openai.chat_reply import ChatReply
from tgi_cli.serve.openai.reasoning import CLOSE, OPEN
from tgi_cli.serve.openai.schema import (
    ChatRequest,
    chat_messages,
    check_model,
    check_reports,
    check_top,
    num_choices,
    refuse_unsupported,
    sampling_params,
)
from tgi_cli.serve.openai.tools.declared import ToolUse, use_of_tools
from tgi_cli.serve.openai.tools.history import shorten_ids
from tgi_cli.serve.sse import send_frames
from tgi_cli.serve.timing import Timing


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, whole or as a stream of chunks."""
    timing = Timing()
    door, served = request.app[DOOR], request.app[SERVED]
    body = await read_struct(request, ChatRequest)
    count = num_choices(body.n)
    with door.admit(count) as visit:
        check_model(body.model, served.name, served.model_id)
        refuse_unsupported(body)
        if _effort(door, body) is None and body.reasoning_effort is not None:
            request[IGNORED].append("reasoning_effort")
        use = chat_tools(door, body)
        prompt = await render_chat(door, body, use)
        answers = await chat_answers(door, body, prompt, count, request[TENANT], use)
        timing.validated()
        reply = ChatReply(door, body, prompt, answers, use, served.name)
        if not body.stream:
            await complete_all(answers)
            return json_response(
                reply.whole(), headers=timing.headers(door.facts, [prompt], answers)
            )

        def broken(error: TgiError) -> bytes:
            visit.error = error
            return error_event(error, openai=True)

        return await send_frames(
            request,
            reply.frames(),
            error_event=broken,
            headers=timing.stream_headers(door.facts, [prompt]),
        )


def chat_tools(door: FrontDoor, body: ChatRequest) -> ToolUse:
    """Decide what this conversation does with tools."""
    return use_of_tools(body.tools, body.tool_choice, body.parallel_tool_calls, door.texts.template)


def _effort(door: FrontDoor, body: ChatRequest) -> dict[str, Any] | None:
    """`reasoning_effort` as this model's template takes it, None where it takes none."""
    effort, template = body.reasoning_effort, door.texts.template
    if effort is not None and template.mentions("reasoning_effort"):
        return {"reasoning_effort": effort}
    if effort == "none" and template.mentions("enable_thinking"):
        return {"enable_thinking": False}
    return None


async def render_chat(door: FrontDoor, body: ChatRequest, use: ToolUse) -> Prompt:
    """Messages to tokens. A conversation that ends with the assistant is continued, as in TGI."""
    messages = chat_messages(body.messages)
    if use.form is not None and use.form.short_ids:
        shorten_ids(messages)
    continued = body.continue_final_message
    if continued is None:
        last = messages[-1]
        said = last["role"] == "assistant" and "tool_calls" not in last
        continued = said and not body.add_generation_prompt
    if continued and body.add_generation_prompt:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt` exclude each other",
            param="continue_final_message",
        )
    prompted = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    return await door.render(
        messages,
        add_generation_prompt=prompted,
        continue_final_message=continued,
        template_kwargs={**(_effort(door, body) or {}), **body.chat_template_kwargs},
        tools=use.for_template,
    )


async def chat_answers(
    door: FrontDoor, body: ChatRequest, prompt: Prompt, count: int, tenant: str, use: ToolUse
) -> list[Answer]:
    """Make the `count` answers to a rendered conversation; they run when they are read."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    check_top("top_logprobs", body.top_logprobs, door.config.max_top_n_tokens)
    check_reports(body, door.config.max_top_n_tokens)
    asked, field = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, field = body.max_tokens, "max_tokens"
    if asked is not None and asked < 1:
        raise InvalidRequest(f"`{field}` must be >= 1. Given: {asked}", param=field)
    sampling = sampling_params(
        body,
        door.config,
        max_tokens=door.max_tokens(prompt, asked, field),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    caller = Caller(
        tenant=tenant,
        user=body.user or "",
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    grammar = await door.check_grammar(_grammar(body, use))
    marks = () if use.form is None else use.form.marks
    if door.texts.template.mentions(CLOSE):
        marks = (*marks, OPEN, CLOSE)
    return door.answers(prompt, sampling, caller=caller, count=count, marks=marks, grammar=grammar)


def _grammar(body: ChatRequest, use: ToolUse) -> AskedGrammar | None:
    """What the answer must look like: as the client says, or a call where one is forced."""
    asked = asked_grammar(body)
    if asked is not None and use.mode != "none":
        raise InvalidRequest(
            f"`{asked.field}` and `tools` are mutually exclusive",
            hint="leave one out, or set `tool_choice` to `none`",
            param=asked.field,
        )
    if use.schema is not None:
        return AskedGrammar(Grammar.json_schema(use.schema), "tools")
    return asked
