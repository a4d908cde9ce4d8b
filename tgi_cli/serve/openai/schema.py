"""What `/v1/*` accepts: OpenAI's fields, vLLM's common extras, and how they become parameters.

Bounds of single values are `SamplingParams.validate`'s; here are the rules between fields. What
belongs to a feature this server does not have yet is refused by name, never ignored.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tgi_cli.config import ServerConfig
from tgi_cli.errors import InvalidRequest
from tgi_cli.sampling import MAX_SEED, SamplingParams, Watermark
from tgi_cli.serve.frontdoor import new_seed
from tgi_cli.serve.openai.tools.declared import Tool
from tgi_cli.serve.openai.tools.history import ToolCall, call_for_template, name_results


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options`; `continuous_usage_stats` (vLLM's) reports usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields that chat and completions share. None is "not given"."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: int = 0
    cache_salt: str = ""
    return_token_ids: bool = False
    prompt_logprobs: int | None = None
    # Structured output, as `serve.grammars` reads it.
    response_format: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_grammar: Any = None
    guided_choice: Any = None
    structured_outputs: Any = None
    grammar: Any = None
    watermark: bool | None = None
    adapter_id: str | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """One part of a message whose content is a list."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    video_url: Any = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: Any = None


class ChatRequest(SamplingFields, kw_only=True):
    """Body of `POST /v1/chat/completions` and `POST /chat_tokenize`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    tools: list[Tool] = []
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    # Older forms of the same: refused.
    tool_prompt: Any = None
    functions: Any = None
    function_call: Any = None


class CompletionRequest(SamplingFields, kw_only=True):
    """Body of `POST /v1/completions`. `prompt`: text, texts, token ids or lists of token ids."""

    prompt: str | list[int | str | list[int]]
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    suffix: str | None = None


def refuse_unsupported(body: SamplingFields) -> None:
    """Raise `InvalidRequest` for a feature that this server does not have yet."""
    if isinstance(body, CompletionRequest) and body.suffix:
        raise InvalidRequest(
            "`suffix` is not supported: the model continues a text, it does not fill gaps",
            param="suffix",
        )
    if isinstance(body, ChatRequest):
        _refuse_tools(body)
        if body.chat_template is not None:
            raise InvalidRequest(
                "`chat_template` of a request is not supported: a template is a program",
                hint="start the server with `--chat-template`",
                param="chat_template",
            )


def _refuse_tools(body: ChatRequest) -> None:
    for name in ("functions", "function_call"):
        if getattr(body, name) not in (None, [], "none", "auto"):
            raise InvalidRequest(f"`{name}` is not supported: send `tools`", param=name)
    if body.tool_prompt is not None:
        raise InvalidRequest(
            "`tool_prompt` is not supported: tools reach the prompt by the chat template alone",
            param="tool_prompt",
        )


def unsupported(field: str, instead: str | None = None) -> InvalidRequest:
    """The refusal of a feature still to come."""
    tail = f", {instead}" if instead else ""
    return InvalidRequest(f"`{field}` is not supported yet{tail}", param=field)


def chat_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the template sees them: text parts joined, as TGI does, without a separator."""
    if not messages:
        raise InvalidRequest("`messages` must hold at least one message", param="messages")
    rendered = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    name_results(rendered)
    return rendered


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    if message.function_call or message.role == "function":
        raise InvalidRequest(
            f"`{where}` holds a `function_call` or its result, which is not supported: send "
            "`tool_calls` and the role `tool`",
            param=where,
        )
    content = message.content
    calls = message.tool_calls or []
    if content is None and not calls:
        raise InvalidRequest(f"`{where}.content` is required", param=f"{where}.content")
    if not isinstance(content, str):
        parts = content or []
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(parts))
    rendered: dict[str, Any] = {"role": message.role, "content": content}
    if calls:
        rendered["tool_calls"] = [
            call_for_template(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        if (value := getattr(message, name)) is not None:
            rendered[name] = value
    return rendered


def _part(part: ContentPart, where: str) -> str:
    if part.type == "text":
        if part.text is None:
            raise InvalidRequest(f"`{where}.text` is required", param=f"{where}.text")
        return part.text
    if part.type in ("image_url", "input_audio", "video_url", "file"):
        raise unsupported(f"{where}.type", f"this server reads no `{part.type}` parts")
    raise InvalidRequest(
        f"`{where}.type` must be `text`. Given: {part.type!r}", param=f"{where}.type"
    )


def stop_strings(
    stop: str | list[str] | None, limit: int, *, field: str = "stop"
) -> tuple[str, ...]:
    """Stop strings as a tuple. Raises `InvalidRequest` above `--max-stop-sequences`."""
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > limit:
        raise InvalidRequest(
            f"`{field}` supports up to {limit} stop sequences. Given: {len(stops)}",
            hint="--max-stop-sequences raises the limit",
            param=field,
        )
    return stops


def num_choices(n: int | None) -> int:
    """`n`, checked."""
    count = 1 if n is None else n
    if count < 1:
        raise InvalidRequest(f"`n` must be >= 1. Given: {count}", param="n")
    return count


def check_reports(body: SamplingFields, limit: int) -> None:
    """Refuse what cannot be reported: see `--max-top-n-tokens` for `limit`."""
    check_top("prompt_logprobs", body.prompt_logprobs, limit)
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("`prompt_logprobs` cannot be streamed", param="prompt_logprobs")
    options = body.stream_options
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequest(
            "`stream_options.continuous_usage_stats` needs `include_usage` to be true",
            param="stream_options",
        )


def check_top(name: str, count: int | None, limit: int) -> None:
    """Refuse more alternatives per token than `--max-top-n-tokens`."""
    if count is not None and not 0 <= count <= limit:
        raise InvalidRequest(
            f"`{name}` must be >= 0 and <= {limit}. Given: {count}",
            hint="--max-top-n-tokens raises the limit",
            param=name,
        )


def sampling_params(
    body: SamplingFields,
    config: ServerConfig,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Translate the shared fields. OpenAI's signed 64-bit seeds are taken modulo 2**64."""
    if body.seed is not None and not -(2**63) <= body.seed <= MAX_SEED:
        raise InvalidRequest(f"`seed` must fit into 64 bits. Given: {body.seed}", param="seed")
    top_k = body.top_k or 0
    return SamplingParams(
        temperature=_or(body.temperature, 1.0),
        top_k=0 if top_k == -1 else top_k,
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        typical_p=_or(body.typical_p, 1.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        seed=new_seed() if body.seed is None else body.seed & MAX_SEED,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop=stop_strings(body.stop, config.max_stop_sequences),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logit_bias=body.logit_bias or {},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        watermark=Watermark(gamma=config.watermark_gamma, delta=config.watermark_delta)
        if body.watermark
        else None,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
