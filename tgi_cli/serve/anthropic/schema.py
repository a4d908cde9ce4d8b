"""What `/v1/messages` accepts: Anthropic's fields that mean something for a model served here.

Only shapes; `anthropic.translate` says what they become. A field that is missing here is accepted
and named, like everywhere.
"""

from __future__ import annotations

from typing import Any

import msgspec


class InputBlock(msgspec.Struct, kw_only=True):
    """One block of a message, whatever its `type`; `signature` is read and not needed."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[InputBlock] | None = None
    is_error: bool | None = None
    source: Any = None


class InputMessage(msgspec.Struct, kw_only=True):
    """One message: `user`, `assistant` or `system`."""

    role: str
    content: str | list[InputBlock]


class MessagesTool(msgspec.Struct, kw_only=True):
    """A tool of the client's own; Anthropic's server tools have another `type`."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class MessagesToolChoice(msgspec.Struct, kw_only=True):
    """`auto`, `any`, `none`, or `tool` with its `name`."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model should reason first, where its template can be told."""

    type: str


class OutputConfig(msgspec.Struct, kw_only=True):
    """How much effort, and which JSON Schema the answer must satisfy."""

    effort: str | None = None
    format: Any = None


class MessagesMetadata(msgspec.Struct, kw_only=True):
    """`user_id` divides its API key's share."""

    user_id: str | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`."""

    messages: list[InputMessage]
    model: str | None = None
    system: str | list[InputBlock] | None = None
    tools: list[MessagesTool] = []
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of `POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] = []
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: MessagesMetadata | None = None
