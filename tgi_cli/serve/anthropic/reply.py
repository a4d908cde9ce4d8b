"""An answer as Anthropic's message: content blocks, whole or as the events that build them.

Both come from one `Blocks`, so a streamed message and a whole one are the same.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson

from tgi_cli.serve.answer import Answer
from tgi_cli.serve.openai.conversation import Conversation


class Blocks:
    """Builds content blocks from a message's deltas; `events` of a stream fall out on the way."""

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._json = ""  # the open call's input so far

    def push(self, delta: dict[str, Any]) -> list[dict[str, Any]]:
        """The events that one delta of OpenAI's shape becomes."""
        if "reasoning_content" in delta:
            text = delta["reasoning_content"]
            events = self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            self.content[-1]["thinking"] += text
            return [*events, self._delta({"type": "thinking_delta", "thinking": text})]
        if "tool_calls" in delta:
            return [event for part in delta["tool_calls"] for event in self._call(part)]
        text = delta["content"]
        if not text:
            return []
        events = self._open("text", {"type": "text", "text": ""})
        self.content[-1]["text"] += text
        return [*events, self._delta({"type": "text_delta", "text": text})]

    def finish(self) -> list[dict[str, Any]]:
        """Close the open block."""
        if not self.content:
            return []
        if self.content[-1]["type"] == "tool_use":
            self._read_input(self.content[-1])
        return [{"type": "content_block_stop", "index": len(self.content) - 1}]

    def _call(self, part: dict[str, Any]) -> list[dict[str, Any]]:
        function = part["function"]
        events: list[dict[str, Any]] = []
        if "id" in part:
            block = {"type": "tool_use", "id": part["id"], "name": function["name"], "input": {}}
            events += self._open("", block)
        if function["arguments"]:
            self._json += function["arguments"]
            piece = {"type": "input_json_delta", "partial_json": function["arguments"]}
            events.append(self._delta(piece))
        return events

    def _open(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        """Begin `block` unless one of its kind is open."""
        if self.content and self.content[-1]["type"] == kind:
            return []
        events = self.finish()
        self.content.append(block)
        self._json = ""
        index = len(self.content) - 1
        start = {"type": "content_block_start", "index": index, "content_block": dict(block)}
        return [*events, start]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}

    def _read_input(self, block: dict[str, Any]) -> None:
        """Arguments that `max_tokens` cut are no object: they stay as the text they are."""
        try:
            read = orjson.loads(self._json or "{}")
        except orjson.JSONDecodeError:
            read = None
        if isinstance(read, dict):
            block["input"] = read
        else:
            block["input"] = {"unfinished_json": self._json}


class MessageReply:
    """The one answer of a `/v1/messages` request."""

    def __init__(self, chat: Conversation, model: str) -> None:
        self._chat = chat
        self._answer: Answer = chat.answers[0]
        self._model = model
        self._reader = chat.reader()
        self._blocks = Blocks()

    def whole(self) -> dict[str, Any]:
        """The message once the answer is complete."""
        for delta in (*self._reader.push(self._answer.text), *self._reader.finish()):
            self._blocks.push(delta)
        self._blocks.finish()
        count = len(self._answer.output_ids)
        return self._message(self._blocks.content, self._end(), self._usage(count))

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """`message_start`, the blocks, `message_delta` with the end, `message_stop`."""
        begun = False
        async with aclosing(self._answer.events()) as steps:
            async for step in steps:
                events: list[dict[str, Any]] = []
                if not begun:
                    begun = True
                    open_end = {"stop_reason": None, "stop_sequence": None}
                    message = self._message([], open_end, self._usage(0))
                    events.append({"type": "message_start", "message": message})
                deltas = self._reader.push(step.text)
                if step.finish is not None:
                    deltas += self._reader.finish()
                for delta in deltas:
                    events += self._blocks.push(delta)
                if events:
                    yield _frame(events)
        usage = self._usage(len(self._answer.output_ids))
        yield _frame(
            [
                *self._blocks.finish(),
                {"type": "message_delta", "delta": self._end(), "usage": usage},
                {"type": "message_stop"},
            ]
        )

    def _message(
        self, content: list[dict[str, Any]], end: dict[str, Any], usage: dict[str, int]
    ) -> dict[str, Any]:
        return {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **end,
            "usage": usage,
        }

    def _end(self) -> dict[str, Any]:
        finish = self._answer.finish
        if finish == "length":
            reason = "max_tokens"
        elif finish == "stop_string":
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._reader.num_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": self._answer.stop_string}

    def _usage(self, num_output_tokens: int) -> dict[str, int]:
        """Anthropic counts the cached part of the prompt apart from the rest."""
        cached = self._answer.num_cached_tokens
        return {
            "input_tokens": len(self._chat.prompt.ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": num_output_tokens,
        }


def _frame(events: list[dict[str, Any]]) -> bytes:
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
        for event in events
    )
