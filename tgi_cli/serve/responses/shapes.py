"""The shapes of the responses API's replies, for the OpenAPI document; tests hold them true."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from tgi_cli.serve.reply_schemas import Reply, TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Reply, tag="output_text", tag_field="type"):
    """Text of a message."""

    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class ReasoningText(Reply, tag="reasoning_text", tag_field="type"):
    """Text of the model's reasoning."""

    text: str


class OutputMessage(Reply, tag="message", tag_field="type"):
    """What the model says."""

    id: str
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningItem(Reply, tag="reasoning", tag_field="type"):
    """What the model thinks; it is not summarized."""

    id: str
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]


class FunctionCallItem(Reply, tag="function_call", tag_field="type"):
    """A call of one of the functions; its result is sent back with the `call_id`."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class InputTokensDetails(Reply):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Reply):
    """Of the answer's tokens, those of its reasoning."""

    reasoning_tokens: int


class ResponseUsage(Reply):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(Reply):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Reply):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class Response(Reply):
    """Answer of `POST /v1/responses`: what was asked, and the output."""

    id: str
    object: Literal["response"]
    created_at: float
    completed_at: float | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class _Numbered(Reply):
    sequence_number: int


class _OfResponse(_Numbered):
    response: Response


class ResponseCreated(_OfResponse, tag="response.created", tag_field="type"):
    """First event."""


class ResponseInProgress(_OfResponse, tag="response.in_progress", tag_field="type"):
    """The engine has begun."""


class ResponseCompleted(_OfResponse, tag="response.completed", tag_field="type"):
    """Last event of a complete response."""


class ResponseIncomplete(_OfResponse, tag="response.incomplete", tag_field="type"):
    """Last event of a response that `max_output_tokens` cut."""


class ResponseFailed(_OfResponse, tag="response.failed", tag_field="type"):
    """Last event of a response that could not be finished."""


class _OfItem(_Numbered):
    output_index: int
    item: OutputItem


class OutputItemAdded(_OfItem, tag="response.output_item.added", tag_field="type"):
    """An item begins."""


class OutputItemDone(_OfItem, tag="response.output_item.done", tag_field="type"):
    """An item is complete."""


class _InItem(_Numbered):
    item_id: str
    output_index: int


class _OfPart(_InItem):
    content_index: int
    part: OutputText | ReasoningText


class ContentPartAdded(_OfPart, tag="response.content_part.added", tag_field="type"):
    """An item's text begins."""


class ContentPartDone(_OfPart, tag="response.content_part.done", tag_field="type"):
    """An item's text is complete."""


class OutputTextDelta(_InItem, tag="response.output_text.delta", tag_field="type"):
    """More text."""

    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


class OutputTextDone(_InItem, tag="response.output_text.done", tag_field="type"):
    """The text is complete."""

    content_index: int
    text: str
    logprobs: list[TokenLogprob]


class ReasoningTextDelta(_InItem, tag="response.reasoning_text.delta", tag_field="type"):
    """More reasoning."""

    content_index: int
    delta: str


class ReasoningTextDone(_InItem, tag="response.reasoning_text.done", tag_field="type"):
    """The reasoning is complete."""

    content_index: int
    text: str


class ArgumentsDelta(_InItem, tag="response.function_call_arguments.delta", tag_field="type"):
    """More of a call's arguments."""

    delta: str


class ArgumentsDone(_InItem, tag="response.function_call_arguments.done", tag_field="type"):
    """A call's arguments are complete."""

    name: str
    arguments: str


ResponseEvent = (
    ResponseCreated
    | ResponseInProgress
    | OutputItemAdded
    | ContentPartAdded
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ArgumentsDelta
    | ArgumentsDone
    | ContentPartDone
    | OutputItemDone
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
)


class InputTokens(Reply):
    """Answer of `POST /v1/responses/input_tokens`."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedResponse(Reply):
    """Answer of `DELETE /v1/responses/{id}`."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItemEntry(Reply):
    """An item of a request, as it was sent, with an id."""

    id: str
    type: str
    role: str | UnsetType = UNSET
    content: list[Any] | UnsetType = UNSET
    status: str | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    output: Any = UNSET
    summary: list[Any] | UnsetType = UNSET


class InputItems(Reply):
    """Answer of `GET /v1/responses/{id}/input_items`."""

    object: Literal["list"]
    data: list[InputItemEntry]
    first_id: str | None
    last_id: str | None
    has_more: bool
