"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aiohttp import web

from tgi_cli.errors import InvalidRequest, TgiError
from tgi_cli.serve.answer import Answer, complete_all, merge
from tgi_cli.serve.error_pages import error_event
from tgi_cli.serve.exchange import TENANT, json_response, read_struct
from tgi_cli.serve.frontdoor import Caller, FrontDoor, Prompt
from tgi_cli.serve.keys import DOOR, SERVED
from tgi_cli.serve.openai.replies import Envelope, chat_logprobs, finish_reason, usage
from tgi_cli.serve.openai.schema import (
    ChatRequest,
    chat_messages,
    check_model,
    check_top,
    num_choices,
    refuse_unsupported,
    sampling_params,
)
from tgi_cli.serve.sse import DONE, send_frames
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
        prompt = await render_chat(door, body)
        answers = chat_answers(door, body, prompt, count, request[TENANT])
        timing.validated()
        top = (body.top_logprobs or 0) if body.logprobs else None
        reply = _ChatReply(door, prompt, answers, served.name, top)
        if not body.stream:
            await complete_all(answers)
            return json_response(
                reply.whole(), headers=timing.headers(door.facts, [prompt], answers)
            )

        def broken(error: TgiError) -> bytes:
            visit.error = error
            return error_event(error, openai=True)

        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return await send_frames(
            request,
            reply.frames(include_usage=include_usage),
            error_event=broken,
            headers=timing.stream_headers(door.facts, [prompt]),
        )


async def render_chat(door: FrontDoor, body: ChatRequest) -> Prompt:
    """Messages to tokens. A conversation that ends with the assistant is continued, as in TGI."""
    messages = chat_messages(body.messages)
    continued = body.continue_final_message
    if continued is None:
        continued = messages[-1]["role"] == "assistant" and not body.add_generation_prompt
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
        template_kwargs=body.chat_template_kwargs,
    )


def chat_answers(
    door: FrontDoor, body: ChatRequest, prompt: Prompt, count: int, tenant: str
) -> list[Answer]:
    """Make the `count` answers to a rendered conversation; they run when they are read."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    check_top("top_logprobs", body.top_logprobs, door.config.max_top_n_tokens)
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
    )
    caller = Caller(tenant=tenant, user=body.user or "", priority=body.priority)
    return door.answers(prompt, sampling, caller=caller, count=count)


class _ChatReply:
    """Shapes the answers of one request; `top` is None without logprobs."""

    def __init__(
        self, door: FrontDoor, prompt: Prompt, answers: list[Answer], model: str, top: int | None
    ) -> None:
        self._tokenizer = door.texts.tokenizer
        self._facts = door.facts
        self._prompt = prompt
        self._answers = answers
        self._model = model
        self._top = top

    def whole(self) -> dict[str, Any]:
        """The reply once every answer is complete."""
        envelope = Envelope("chatcmpl", "chat.completion", self._model, self._facts)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": finish_reason(answer.finish),
            }
            for index, answer in enumerate(self._answers)
        ]
        return envelope.body(choices, usage=usage(len(self._prompt.ids), self._answers))

    async def frames(self, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Chunks: the role first, then text, an empty one with the reason, usage, `[DONE]`."""
        envelope = Envelope("chatcmpl", "chat.completion.chunk", self._model, self._facts)
        extra: dict[str, Any] = {"usage": None} if include_usage else {}

        def event(index: int, delta: dict[str, str], logprobs: Any, finish: str | None) -> bytes:
            choice = {
                "index": index,
                "delta": delta,
                "logprobs": logprobs,
                "finish_reason": finish_reason(finish),
            }
            return envelope.event([choice], **extra)

        opened: set[int] = set()
        async with aclosing(merge(self._answers)) as merged:
            async for events in merged:
                frame = b""
                for index, step in events:
                    if index not in opened:
                        opened.add(index)
                        frame += event(index, {"role": "assistant", "content": ""}, None, None)
                    if step.text or step.logprobs:
                        logprobs = self._logprobs(step.logprobs or [])
                        frame += event(index, {"content": step.text}, logprobs, None)
                    if step.finish is not None:
                        frame += event(index, {}, None, step.finish)
                if frame:
                    yield frame
        tail = b""
        if include_usage:
            tail = envelope.event([], usage=usage(len(self._prompt.ids), self._answers))
        yield tail + DONE

    def _logprobs(self, entries: Any) -> dict[str, Any] | None:
        return None if self._top is None else chat_logprobs(entries, self._tokenizer, self._top)
