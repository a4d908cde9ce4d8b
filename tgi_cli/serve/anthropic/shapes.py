"""The shapes of Anthropic's replies, for the OpenAPI document; tests hold real replies to them."""

from __future__ import annotations

from typing import Any, Literal

from tgi_cli.serve.reply_schemas import Reply


class TextBlock(Reply, tag="text", tag_field="type"):
    """What the model says."""

    text: str


class ThinkingBlock(Reply, tag="thinking", tag_field="type"):
    """What the model thinks; the signature is always empty."""

    thinking: str
    signature: str


class ToolUseBlock(Reply, tag="tool_use", tag_field="type"):
    """A call of one of the tools; `input` is `{"unfinished_json": text}` if it was cut."""

    id: str
    name: str
    input: dict[str, Any]


OutputBlock = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesUsage(Reply):
    """Tokens: `input_tokens` are those of the prompt that were not found in the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(Reply):
    """Answer of `POST /v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[OutputBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessageStart(Reply, tag="message_start", tag_field="type"):
    """First event: the message without its content."""

    message: Message


class ContentBlockStart(Reply, tag="content_block_start", tag_field="type"):
    """A block begins, empty."""

    index: int
    content_block: OutputBlock


class TextPiece(Reply, tag="text_delta", tag_field="type"):
    """More text."""

    text: str


class ThinkingPiece(Reply, tag="thinking_delta", tag_field="type"):
    """More reasoning."""

    thinking: str


class InputPiece(Reply, tag="input_json_delta", tag_field="type"):
    """More of a call's input, as JSON text."""

    partial_json: str


class ContentBlockDelta(Reply, tag="content_block_delta", tag_field="type"):
    """More of the open block."""

    index: int
    delta: TextPiece | ThinkingPiece | InputPiece


class ContentBlockStop(Reply, tag="content_block_stop", tag_field="type"):
    """The block is complete."""

    index: int


class MessageEnd(Reply):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageEndEvent(Reply, tag="message_delta", tag_field="type"):
    """The end of the message, and its final usage."""

    delta: MessageEnd
    usage: MessagesUsage


class MessageStop(Reply, tag="message_stop", tag_field="type"):
    """Last event."""


MessageEvent = (
    MessageStart
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageEndEvent
    | MessageStop
)


class TokenCount(Reply):
    """Answer of `POST /v1/messages/count_tokens`."""

    input_tokens: int


class AnthropicError(Reply):
    """What went wrong, inside the `error` of `AnthropicErrorReply`."""

    type: str
    message: str


class AnthropicErrorReply(Reply):
    """The error body of the routes under `/v1/messages`."""

    type: Literal["error"]
    error: AnthropicError
