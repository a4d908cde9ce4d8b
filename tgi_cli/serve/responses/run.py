"""One response being made: its object, and the numbered events that tell how it grows."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import orjson

from tgi_cli.errors import TgiError
from tgi_cli.serve.answer import TextEvent
from tgi_cli.serve.openai.conversation import Conversation
from tgi_cli.serve.openai.replies import chat_logprobs
from tgi_cli.serve.responses.items import Event, OutputItems
from tgi_cli.serve.responses.schema import ResponsesRequest
from tgi_cli.serve.surfaces import sentence
from tgi_cli.tokenizer import Tokenizer


class ResponseRun:
    """Reads the one answer of `chat`; `response` is the object as it stands.

    `name` becomes its id; `stored`: whether it can be retrieved later.
    """

    def __init__(
        self,
        body: ResponsesRequest,
        chat: Conversation,
        tokenizer: Tokenizer,
        *,
        name: str,
        model: str,
        stored: bool,
        top_logprobs: int | None,
    ) -> None:
        self._chat = chat
        self._answer = chat.answers[0]
        self._tokenizer = tokenizer
        self._top = top_logprobs
        self._items = OutputItems()
        self._number = 0
        self._reasoning_tokens = 0
        self.response = _response(body, name, model, stored=stored)

    @property
    def id(self) -> str:
        """The response's id."""
        return str(self.response["id"])

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """Run to the end, giving the events of each step. Closing it early aborts the answer."""
        self.response["status"] = "in_progress"
        begun = False
        reader = self._chat.reader()
        async with aclosing(self._answer.events()) as steps:
            async for step in steps:
                events: list[Event] = []
                if not begun:
                    begun = True
                    events += [self._whole("created"), self._whole("in_progress")]
                deltas = reader.push(step.text)
                if step.finish is not None:
                    deltas += reader.finish()
                entries = self._logprobs(step)
                for delta in deltas or [{"content": ""}]:
                    events += self._items.push(delta, entries)
                    entries = []
                if [item["type"] for item in self._items.output] == ["reasoning"]:
                    self._reasoning_tokens = len(self._answer.output_ids)
                if step.finish is not None:
                    events += self._end(cut=step.finish == "length")
                if events:
                    yield [self._numbered(event) for event in events]

    def fail(self, error: TgiError) -> Event:
        """The event that ends a response which could not be finished."""
        self._items.finish("incomplete")
        self.response["output"] = self._items.output
        self.response["status"] = "failed"
        code = getattr(error, "code", None) or "server_error"
        self.response["error"] = {"code": code, "message": sentence(error)}
        return self._numbered(self._whole("failed"))

    def cancel(self) -> None:
        """Note that nobody wants the rest."""
        self._items.finish("incomplete")
        self.response["output"] = self._items.output
        self.response["status"] = "cancelled"

    def _end(self, *, cut: bool) -> list[Event]:
        events = self._items.finish("incomplete" if cut else "completed")
        response = self.response
        response["output"] = self._items.output
        response["status"] = "incomplete" if cut else "completed"
        response["completed_at"] = None if cut else time.time()
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["usage"] = self._usage()
        return [*events, self._whole("incomplete" if cut else "completed")]

    def _usage(self) -> dict[str, Any]:
        prompt, written = len(self._chat.prompt.ids), len(self._answer.output_ids)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": self._answer.num_cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": prompt + written,
        }

    def _logprobs(self, step: TextEvent) -> list[dict[str, Any]]:
        if self._top is None or not step.logprobs:
            return []
        content = chat_logprobs(step.logprobs, self._tokenizer, self._top)["content"]
        return list(content)

    def _whole(self, kind: str) -> Event:
        return {"type": f"response.{kind}", "response": dict(self.response)}

    def _numbered(self, event: Event) -> Event:
        number, self._number = self._number, self._number + 1
        return {**event, "sequence_number": number}


def frame(events: list[Event]) -> bytes:
    """Events as they go over the wire."""
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
        for event in events
    )


def _response(body: ResponsesRequest, name: str, model: str, *, stored: bool) -> dict[str, Any]:
    """The object before anything has been generated: what was asked, echoed."""
    form = None if body.text is None else body.text.format
    effort = None if body.reasoning is None else body.reasoning.effort
    return {
        "id": name,
        "object": "response",
        "created_at": time.time(),
        "completed_at": None,
        "status": "queued",
        "background": body.background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "store": stored,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": form or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [msgspec.to_builtins(tool) for tool in body.tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
