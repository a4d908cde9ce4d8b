"""Configuration: frozen structs, resolved once. The only reader of the environment.

Precedence: flag, then `TGI_*` variable, then TGI's bare name, then default. Derived values go to
new structs; nothing is written back. `None` means "decide from the model and the machine".
"""

from __future__ import annotations

import msgspec


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which weights, and how they are held."""

    model_id: str
    revision: str | None = None
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    device: str = "auto"  # auto | cpu | cuda
    quantize: str | None = None
    trust_remote_code: bool = False
    max_model_len: int | None = None
    cache_dir: str | None = None
    token: str | None = None


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The paged KV cache. `kv_cache_tokens` None sizes it from free memory."""

    block_size: int = 16
    kv_cache_dtype: str = "auto"
    kv_cache_tokens: int | None = None
    memory_fraction: float = 0.5  # of free memory, when sized automatically
    prefix_caching: bool = True


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Step budget and queue."""

    max_num_seqs: int = 64
    max_batch_tokens: int = 512  # one budget per step for prompts and decodes together
    max_waiting: int = 4096  # a second line of defence; the front door bounds the queue first


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the model is spread."""

    num_shard: int = 1
    num_threads: int | None = None


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process needs to start."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    json_logs: bool = False
    log_level: str = "INFO"


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP side. Limits and defaults are TGI's unless a comment says otherwise."""

    host: str = "127.0.0.1"
    port: int = 3000  # 0 picks a free port
    http_workers: int = 1
    served_model_name: str | None = None
    api_key: str | None = None
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    validation_workers: int = 2
    payload_limit: int = 2_000_000  # bytes
    cors_allow_origin: tuple[str, ...] = ()
    tokenizer_config_path: str | None = None
    chat_template: str | None = None
    graceful_termination_timeout: float = 90.0  # seconds
    step_timeout: float = 300.0  # seconds one step may take before the engine counts as hung
    max_engine_restarts: int = 3  # within 10 minutes
    json_logs: bool = False
    log_level: str = "INFO"
