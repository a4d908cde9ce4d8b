"""The output items of one response, and the typed events that build them.

Takes a message's deltas in OpenAI's chat shape. A whole response and a streamed one are built by
the same calls, so they are the same.
"""

from __future__ import annotations

import secrets
from typing import Any

Event = dict[str, Any]


class OutputItems:
    """Reasoning, messages and function calls, in the order in which the model writes them."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is still held back

    def push(self, delta: dict[str, Any], logprobs: list[dict[str, Any]]) -> list[Event]:
        """The events that one delta becomes; `logprobs` are those of its tokens, if asked."""
        self._logprobs += logprobs
        if "reasoning_content" in delta:
            self._logprobs.clear()
            events = self._open("reasoning")
            return [*events, self._text_delta("reasoning_text", delta["reasoning_content"])]
        if "tool_calls" in delta:
            self._logprobs.clear()
            return [event for part in delta["tool_calls"] for event in self._call(part)]
        if not delta["content"]:
            return []
        events = self._open("message")
        event = self._text_delta("output_text", delta["content"])
        event["logprobs"] = self._logprobs
        part = self.output[-1]["content"][0]
        part["logprobs"] = [*part["logprobs"], *self._logprobs]
        self._logprobs = []
        return [*events, event]

    def finish(self, status: str = "completed") -> list[Event]:
        """Close the open item with this status."""
        if not self.output or self.output[-1]["status"] != "in_progress":
            return []
        item = self.output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._event("response.function_call_arguments.done", **done)]
        else:
            part = item["content"][0]
            done = {"content_index": 0, "text": part["text"]}
            if part["type"] == "output_text":
                done["logprobs"] = part["logprobs"]
            events = [
                self._event(f"response.{part['type']}.done", **done),
                self._event("response.content_part.done", content_index=0, part=dict(part)),
            ]
        return [*events, self._item_event("response.output_item.done")]

    def _open(self, kind: str) -> list[Event]:
        """Begin an item of text unless one of its kind is open."""
        last = self.output[-1] if self.output else {}
        if (last.get("type"), last.get("status")) == (kind, "in_progress"):
            return []
        part: dict[str, Any]
        if kind == "reasoning":
            part = {"type": "reasoning_text", "text": ""}
            item = {"type": kind, "id": _id("rs"), "summary": [], "status": "in_progress"}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"type": kind, "id": _id("msg"), "role": "assistant", "status": "in_progress"}
        events = [*self.finish(), self._begin({**item, "content": []})]
        self.output[-1]["content"].append(part)
        added = self._event("response.content_part.added", content_index=0, part=dict(part))
        return [*events, added]

    def _call(self, part: dict[str, Any]) -> list[Event]:
        function = part["function"]
        events: list[Event] = []
        if "id" in part:
            item = {
                "type": "function_call",
                "id": _id("fc"),
                "call_id": part["id"],
                "name": function["name"],
                "arguments": "",
                "status": "in_progress",
            }
            events = [*self.finish(), self._begin(item)]
        if function["arguments"]:
            self.output[-1]["arguments"] += function["arguments"]
            delta = function["arguments"]
            events.append(self._event("response.function_call_arguments.delta", delta=delta))
        return events

    def _begin(self, item: dict[str, Any]) -> Event:
        self.output.append(item)
        return self._item_event("response.output_item.added")

    def _item_event(self, kind: str) -> Event:
        item = dict(self.output[-1])
        if "content" in item:
            item["content"] = [dict(part) for part in item["content"]]
        return {"type": kind, "output_index": len(self.output) - 1, "item": item}

    def _text_delta(self, kind: str, text: str) -> Event:
        self.output[-1]["content"][0]["text"] += text
        return self._event(f"response.{kind}.delta", content_index=0, delta=text)

    def _event(self, kind: str, **fields: Any) -> Event:
        item_id, index = self.output[-1]["id"], len(self.output) - 1
        return {"type": kind, "item_id": item_id, "output_index": index, **fields}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
