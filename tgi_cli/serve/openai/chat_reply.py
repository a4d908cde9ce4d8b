"""Shapes the answers of one chat: a whole reply, or chunks as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson

from tgi_cli.serve.answer import TextEvent
from tgi_cli.serve.frames import frames_of
from tgi_cli.serve.frontdoor import FrontDoor
from tgi_cli.serve.openai.conversation import Conversation
from tgi_cli.serve.openai.message import MessageReader
from tgi_cli.serve.openai.replies import (
    Envelope,
    chat_logprobs,
    finish_reason,
    prompt_logprobs_report,
    usage,
    usage_so_far,
)
from tgi_cli.serve.openai.schema import ChatRequest, StreamOptions
from tgi_cli.serve.sse import DONE, Outlet

#: The keys of a delta that brings nothing but text.
_CONTENT = {"content"}


class ChatReply:
    """The `n` answers of one request, each read by a `MessageReader` of its own."""

    def __init__(self, door: FrontDoor, body: ChatRequest, chat: Conversation, model: str) -> None:
        self._tokenizer = door.texts.tokenizer
        self._facts = door.facts
        self._body = body
        self._chat = chat
        self._prompt = chat.prompt
        self._answers = chat.answers
        self._model = model
        self._top = (body.top_logprobs or 0) if body.logprobs else None

    def whole(self) -> dict[str, Any]:
        """The reply once every answer is complete."""
        envelope = Envelope("chatcmpl", "chat.completion", self._model, self._facts)
        choices = []
        for index, answer in enumerate(self._answers):
            reader = self._chat.reader()
            choice = {
                "index": index,
                "message": reader.whole(answer.text),
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": self._finish(reader, answer.finish),
            }
            if self._body.return_token_ids:
                choice["token_ids"] = answer.output_ids
            choices.append(choice)
        extra: dict[str, Any] = {"usage": usage(len(self._prompt.ids), self._answers)}
        if self._body.return_token_ids:
            extra["prompt_token_ids"] = self._prompt.ids
        top = self._body.prompt_logprobs
        if top is not None:
            report = prompt_logprobs_report(self._answers[0], self._tokenizer, top)
            extra["prompt_logprobs"] = report
        return envelope.body(choices, **extra)

    async def frames(self, outlet: Outlet) -> AsyncGenerator[bytes, None]:
        """Chunks: the role first, then text, an empty one with the reason, usage, `[DONE]`."""
        envelope = Envelope("chatcmpl", "chat.completion.chunk", self._model, self._facts)
        options = self._body.stream_options or StreamOptions()
        show_ids = self._body.return_token_ids
        extra: dict[str, Any] = {"usage": None} if options.include_usage else {}

        unchanging = self._top is None and not (options.continuous_usage_stats or show_ids)
        around: dict[int, tuple[bytes, bytes]] = {}  # the text of a choice, where it alone changes
        plain: set[int] = set()  # choices whose text needs no reader

        def content(index: int, text: str) -> bytes:
            head, tail = around[index]
            return head + orjson.dumps(text) + tail

        def event(index: int, delta: dict[str, Any], finish: str | None, **more: Any) -> bytes:
            if index in around and finish is None and delta.keys() == _CONTENT:
                return content(index, delta["content"])
            choice = {
                "index": index,
                "delta": delta,
                "logprobs": None,
                "finish_reason": finish,
                **more,
            }
            return envelope.event([choice], **extra)

        readers: dict[int, MessageReader] = {}
        counts = [0] * len(self._answers)

        def make(events: list[tuple[int, TextEvent]]) -> bytes:
            [(index, step), *others] = events
            if not others and index in plain and step.finish is None:
                return content(index, step.text) if step.text else b""
            frame = b""
            for index, step in events:
                counts[index] += len(step.token_ids)
                if options.continuous_usage_stats:
                    extra["usage"] = usage_so_far(
                        len(self._prompt.ids), counts[index], [self._answers[index]]
                    )
                if index not in readers:
                    readers[index] = self._chat.reader()
                    if show_ids:
                        extra["prompt_token_ids"] = self._prompt.ids
                    frame += event(index, {"role": "assistant", "content": ""}, None)
                    extra.pop("prompt_token_ids", None)
                    if unchanging:
                        around[index] = envelope.text_event(index, **extra)
                        if readers[index].plain:
                            plain.add(index)
                reader = readers[index]
                more = self._reports(step)
                for delta in self._deltas(reader, step, bool(more)):
                    frame += event(index, delta, None, **more)
                    more = {}  # they go with the step's first chunk
                if step.finish is not None:
                    frame += event(index, {}, self._finish(reader, step.finish))
            return frame

        async with aclosing(frames_of(self._answers, make, outlet)) as frames:
            async for frame in frames:
                yield frame
        tail = b""
        if options.include_usage:
            tail = envelope.event([], usage=usage(len(self._prompt.ids), self._answers))
        yield tail + DONE

    def _reports(self, step: TextEvent) -> dict[str, Any]:
        """What a step's first chunk says beside its delta."""
        reports: dict[str, Any] = {}
        if step.logprobs and self._top is not None:
            reports["logprobs"] = self._logprobs(step.logprobs)
        if self._body.return_token_ids:
            reports["token_ids"] = list(step.token_ids)
        return reports

    @staticmethod
    def _deltas(reader: MessageReader, step: TextEvent, reports: bool) -> list[dict[str, Any]]:
        deltas = reader.push(step.text)
        if step.finish is not None:
            deltas += reader.finish()
        if not deltas and reports:
            deltas = [{"content": ""}]
        return deltas

    @staticmethod
    def _finish(reader: MessageReader, finish: str | None) -> str | None:
        reason = finish_reason(finish)
        return "tool_calls" if reason == "stop" and reader.num_calls else reason

    def _logprobs(self, entries: Any) -> dict[str, Any] | None:
        return None if self._top is None else chat_logprobs(entries, self._tokenizer, self._top)
