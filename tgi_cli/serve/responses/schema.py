"""What `/v1/responses` accepts: OpenAI's fields that mean something here, and vLLM's extras.

Only shapes; `responses.translate` says what they become.
"""

from __future__ import annotations

from typing import Any

import msgspec


class InputPart(msgspec.Struct, kw_only=True):
    """A part of an item's content. `annotations` and `logprobs` come back from our own output."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None


class InputItem(msgspec.Struct, kw_only=True):
    """One item of `input`, whatever its `type`: messages, calls, their results, reasoning."""

    type: str = "message"
    role: str | None = None
    content: str | list[InputPart] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None


class ResponsesTool(msgspec.Struct, kw_only=True):
    """A function the model may call; the types of OpenAI's own tools are refused."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    """`format`: `text`, `json_object` or `json_schema`."""

    format: Any = None


class ReasoningConfig(msgspec.Struct, kw_only=True):
    """How much the model should reason, where its template can be told."""

    effort: str | None = None


class InputTokensRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /v1/responses/input_tokens`."""

    input: str | list[InputItem] = []
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[ResponsesTool] = []
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    # What this server does not have: read so that it can be refused.
    conversation: Any = None
    prompt: Any = None


class ResponsesRequest(InputTokensRequest, kw_only=True):
    """Body of `POST /v1/responses`."""

    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] = []
    stream: bool = False
    store: bool | None = None
    background: bool = False
    metadata: dict[str, str] | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    priority: int = 0
    cache_salt: str = ""
