"""The shapes of replies, for the OpenAPI document alone: handlers write plain dictionaries.

Tests hold real replies to these structs, unknown fields forbidden, so neither side can drift.
Fields that are there only when asked for may be absent (`UNSET`).
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType


class Reply(Struct, kw_only=True, forbid_unknown_fields=True):
    """What every reply has in common: no field that is not described."""


class Token(Reply):
    """A generated token or an alternative to one."""

    id: int
    text: str
    logprob: float
    special: bool


class PrefillToken(Reply):
    """A token of the prompt; the first has no log probability."""

    id: int
    text: str
    logprob: float | None


NativeFinish = Literal["length", "eos_token", "stop_sequence"]


class StreamDetails(Reply):
    """`details` of a native stream's last event."""

    finish_reason: NativeFinish
    generated_tokens: int
    seed: int | None
    input_length: int


class BestOfSequence(Reply):
    """One of the less likely answers of `best_of`."""

    generated_text: str
    finish_reason: NativeFinish
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Reply):
    """`details` of a native answer."""

    finish_reason: NativeFinish
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET


class GenerateResponse(Reply):
    """Answer of `POST /generate`."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamResponse(Reply):
    """One event of `POST /generate_stream`."""

    index: int
    token: Token
    generated_text: str | None
    details: StreamDetails | None
    top_tokens: list[Token] | UnsetType = UNSET


class SimpleToken(Reply):
    """A token and the characters it stands for."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Reply):
    """Answer of `POST /chat_tokenize`."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class TokenizeResponse(Reply):
    """Answer of `POST /tokenize` to vLLM's bodies."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(Reply):
    """Answer of `POST /detokenize`."""

    prompt: str


class VertexResponse(Reply):
    """Answer of `POST /vertex`."""

    predictions: list[str]


class PromptTokensDetails(Reply):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int


class Usage(Reply):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Reply):
    """A token, its bytes and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Reply):
    """A token of the answer with its alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """`logprobs` of a chat's choice."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(Reply):
    """A function's name and the JSON text of its arguments."""

    name: str
    arguments: str


class MessageToolCall(Reply):
    """A tool call of an answer."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Reply):
    """The answer of a chat."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[MessageToolCall] | UnsetType = UNSET


ChatFinish = Literal["stop", "length", "tool_calls"]


class ChatChoice(Reply):
    """One of the `n` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Reply):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[Any] | UnsetType = UNSET


class FunctionDelta(Reply):
    """More of a call: its name in the first part, then pieces of the arguments."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Reply):
    """A part of the call at `index`; `id` and `type` come with the first."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class MessageDelta(Reply):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Reply):
    """What a chunk adds to one answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Reply):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TextLogprobs(Reply):
    """`logprobs` of a completion's choice, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One continuation, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[Any] | UnsetType = UNSET


class Completion(Reply):
    """Answer of `POST /v1/completions`, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelInfo(Reply):
    """A served model, or an adapter of one: then `parent` is the model's id."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    root: str
    parent: str | None


class ModelsInfo(Reply):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelInfo]


class AdapterInfo(Reply):
    """A LoRA adapter that is loaded."""

    name: str
    source: str
    path: str
    rank: int
    base_model: str | None
    bytes: int


class RankInfo(Reply):
    """One of the processes of a divided model."""

    rank: int
    pid: int
    host: str
    cores: list[int]
    num_threads: int
    weights_bytes: int


class Info(Reply):
    """Answer of `GET /info`: TGI's facts, and more of the loaded model."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    architecture: str
    num_parameters: int
    weights_bytes: int
    quantization: str | None
    model_dtype: str
    activation_dtype: str
    kv_cache_dtype: str
    model_device_type: str
    backend: str
    deterministic: bool
    max_num_seqs: int
    max_batch_tokens: int
    block_size: int
    kv_cache_tokens: int
    http_workers: int
    num_shard: int
    adapters: list[AdapterInfo]
    ranks: list[RankInfo]
