"""Calls and results of earlier turns, as chat templates want to see them."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from tgi_cli.errors import InvalidRequest

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_read_object = msgspec.json.Decoder(dict[str, Any]).decode


class CalledFunction(msgspec.Struct, kw_only=True):
    """`function` of a tool call: OpenAI sends the arguments as JSON text, some as an object."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(msgspec.Struct, kw_only=True):
    """One of an assistant message's `tool_calls`."""

    function: CalledFunction
    id: str | None = None
    type: str = "function"


def call_for_template(call: ToolCall, where: str) -> dict[str, Any]:
    """A call with its arguments as an object: templates print it themselves."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = _read_object(arguments.encode() or b"{}")
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            field = f"{where}.function.arguments"
            raise InvalidRequest(f"`{field}` is not a JSON object", param=field) from None
    function = {"name": call.function.name, "arguments": arguments}
    rendered: dict[str, Any] = {"type": "function", "function": function}
    if call.id is not None:
        rendered["id"] = call.id
    return rendered


def name_results(messages: list[dict[str, Any]]) -> None:
    """Give each tool result the name of the function its call named: some templates print it."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            if "id" in call:
                names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and "name" not in message:
            name = names.get(message.get("tool_call_id", ""))
            if name is not None:
                message["name"] = name


def shorten_ids(messages: list[dict[str, Any]]) -> None:
    """Make every id nine letters and digits, the same for a call and its result (Mistral's)."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            if "id" in call:
                call["id"] = _short(call["id"])
        if "tool_call_id" in message:
            message["tool_call_id"] = _short(message["tool_call_id"])


def _short(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "replace")).hexdigest()[:9]
