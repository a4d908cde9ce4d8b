"""`POST /generate`, `/generate_stream` and `/`: TGI's own generation routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from aiohttp import web

from tgi_cli.engine.messages import TokenLogprobs
from tgi_cli.errors import TgiError
from tgi_cli.serve.answer import Answer, TextEvent, complete_all
from tgi_cli.serve.chosen_model import chosen_model
from tgi_cli.serve.exchange import TENANT, json_response, read_struct
from tgi_cli.serve.frames import frames_of
from tgi_cli.serve.frontdoor import Caller, FrontDoor, Prompt
from tgi_cli.serve.grammars import AskedGrammar, tagged_grammar
from tgi_cli.serve.keys import DOOR, SERVED, Served
from tgi_cli.serve.sse import Outlet, send_frames
from tgi_cli.serve.surfaces import TGI
from tgi_cli.serve.tgi.schema import (
    GenerateRequest,
    Parameters,
    check,
    check_truncate,
    sampling_params,
)
from tgi_cli.serve.timing import Timing
from tgi_cli.tokenizer import Tokenizer

_FINISH_REASONS = {
    "length": "length",
    "eos": "eos_token",
    "stop": "eos_token",
    "stop_string": "stop_sequence",
}


async def generate(request: web.Request) -> web.StreamResponse:
    """Answer in one JSON object."""
    body = await read_struct(request, GenerateRequest)
    return await _respond(request, body, stream=False)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """Answer as a stream of tokens."""
    body = await read_struct(request, GenerateRequest)
    return await _respond(request, body, stream=True)


async def compat_generate(request: web.Request) -> web.StreamResponse:
    """Answer as `stream` says: a stream, or a list of one object. The prompt is returned too."""
    body = await read_struct(request, GenerateRequest)
    return await _respond(request, body, stream=body.stream, compat=True)


async def _respond(
    request: web.Request, body: GenerateRequest, *, stream: bool, compat: bool = False
) -> web.StreamResponse:
    timing = Timing()
    door = request.app[DOOR]
    given = body.effective
    full_text = compat if given.return_full_text is None else given.return_full_text
    with door.admit(max(1, given.best_of or 1)) as visit:
        prompt, answers = await native_answers(
            door, request.app[SERVED], body, request[TENANT], stream=stream
        )
        timing.validated()
        reply = _NativeReply(door, given, prompt, prompt.text if full_text else "")
        if not stream:
            await complete_all(answers)
            whole: Any = reply.whole(answers)
            return json_response(
                [whole] if compat else whole, headers=timing.headers(door.facts, [prompt], answers)
            )

        def broken(error: TgiError) -> bytes:
            visit.error = error
            return TGI.event(error)

        outlet = Outlet()
        return await send_frames(
            request,
            reply.frames(answers[0], outlet),
            outlet=outlet,
            error_event=broken,
            headers=timing.stream_headers(door.facts, [prompt]),
        )


async def native_answers(
    door: FrontDoor, served: Served, body: GenerateRequest, tenant: str, *, stream: bool
) -> tuple[Prompt, list[Answer]]:
    """Check and tokenize one native request; its `best_of` answers run when they are read."""
    given = body.effective
    check(given, door.config, stream=stream)
    check_truncate(given.truncate, door.limits.max_input_tokens)
    adapter = chosen_model(door, served, None, given.adapter_id).adapter
    prompt = await door.encode(body.inputs, field="inputs", truncate=given.truncate)
    sampling = sampling_params(
        given,
        door.config,
        max_tokens=door.max_tokens(prompt, given.max_new_tokens, "max_new_tokens"),
        stream=stream,
    )
    asked = None
    if given.grammar is not None:
        asked = AskedGrammar(tagged_grammar(given.grammar, "grammar"), "grammar")
    grammar = await door.check_grammar(asked)
    answers = door.answers(
        prompt,
        sampling,
        caller=Caller(tenant=tenant),
        count=given.best_of or 1,
        include_stop=True,
        grammar=grammar,
        adapter=adapter,
    )
    return prompt, answers


class _NativeReply:
    """Shapes answers as TGI does; `head` is put before the generated text."""

    def __init__(self, door: FrontDoor, given: Parameters, prompt: Prompt, head: str) -> None:
        self._tokenizer: Tokenizer = door.texts.tokenizer
        self._given = given
        self._prompt = prompt
        self._head = head
        self._top = given.top_n_tokens or 0

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """One object: the likeliest answer, with the others in `details.best_of_sequences`."""
        best = max(answers, key=lambda answer: answer.mean_logprob)
        body: dict[str, Any] = {"generated_text": self._head + best.text}
        if self._given.wants_details:
            body["details"] = self._details(best)
            others = [answer for answer in answers if answer is not best]
            if others:
                body["details"]["best_of_sequences"] = [
                    {"generated_text": self._head + answer.text, **self._details(answer)}
                    for answer in others
                ]
        return body

    async def frames(self, answer: Answer, outlet: Outlet) -> AsyncGenerator[bytes, None]:
        """One event a token; the last one carries the whole text and, if asked, the details."""
        index = 0

        def make(events: list[tuple[int, TextEvent]]) -> bytes:
            nonlocal index
            [(_, step)] = events
            frame = b""
            last = len(step.token_ids) - 1
            entries = step.logprobs or []
            for i, (token, text) in enumerate(zip(step.token_ids, step.token_texts, strict=True)):
                index += 1
                event: dict[str, Any] = {
                    "index": index,
                    "token": self._token(token, text, entries[i].logprob),
                }
                if self._top:
                    event["top_tokens"] = self._top_tokens(entries[i])
                ended = step.finish is not None and i == last
                event["generated_text"] = self._head + answer.text if ended else None
                event["details"] = None
                if ended and self._given.details:
                    event["details"] = {
                        **self._summary(answer),
                        "input_length": len(self._prompt.ids),
                    }
                frame += b"data: " + orjson.dumps(event) + b"\n\n"
            return frame

        async with aclosing(frames_of([answer], make, outlet)) as frames:
            async for frame in frames:
                yield frame

    def _summary(self, answer: Answer) -> dict[str, Any]:
        sampling = answer.request.sampling
        return {
            "finish_reason": _FINISH_REASONS[answer.finish or "length"],
            "generated_tokens": len(answer.output_ids),
            "seed": None if sampling.greedy else sampling.seed,
        }

    def _details(self, answer: Answer) -> dict[str, Any]:
        text_of = self._tokenizer.token_text
        prefill = [
            {"id": token, "text": text_of(token), "logprob": entry.logprob if entry else None}
            for token, entry in zip(
                self._prompt.ids if answer.prompt_logprobs else [],
                answer.prompt_logprobs or [],
                strict=True,
            )
        ]
        details: dict[str, Any] = {
            **self._summary(answer),
            "prefill": prefill,
            "tokens": [
                self._token(token, text, entry.logprob)
                for token, text, entry in zip(
                    answer.output_ids, answer.token_texts, answer.logprobs, strict=True
                )
            ],
        }
        if self._top:
            details["top_tokens"] = [self._top_tokens(entry) for entry in answer.logprobs]
        return details

    def _token(self, token: int, text: str, logprob: float) -> dict[str, Any]:
        special = self._tokenizer.is_special(token)
        return {"id": token, "text": text, "logprob": logprob, "special": special}

    def _top_tokens(self, entry: TokenLogprobs) -> list[dict[str, Any]]:
        text_of = self._tokenizer.token_text
        return [
            self._token(token, text_of(token), logprob)
            for token, logprob in zip(
                entry.top_ids[: self._top], entry.top_logprobs[: self._top], strict=True
            )
        ]
