"""Every flag of `tgi launch`, as data: TGI's own, our additions and vLLM's names for the same.

`cli.launch` makes its options from this table and `config.resolve` reads them. TGI's variables are
read under their bare names; our own additions only with the `TGI_` prefix. A flag whose value goes
nowhere is either without meaning here, and says so, or still to come, and is refused.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tgi_cli.cli.vllm_flags import VLLM_TO_COME, VLLM_WITHOUT_MEANING
from tgi_cli.config import Setting

MODEL = "Model"
MEMORY = "Memory and batching"
LIMITS = "Limits per request"
SERVER = "Server"
LOGGING = "Logging"
TO_COME = "Still to come"
COMPATIBILITY = "Accepted without effect"

_QUANTIZATIONS = (
    "int8",
    "int4",
    "awq",
    "compressed-tensors",
    "eetq",
    "exl2",
    "gptq",
    "marlin",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "fp8",
)
_KV_DTYPES = (
    "auto",
    "bfloat16",
    "float16",
    "float32",
    "int8",
    "fp8",
    "fp8_e4m3",
    "fp8_e4m3fn",
    "fp8_e5m2",
)
_NO_PHASES = "prompts and decodes share one token budget per step, nothing waits for a ratio"
_NO_GRAPHS = "this build captures no CUDA graphs"
_NO_TUNNEL = "no tunnel is opened; put a reverse proxy in front of the port"
_PRIVATE = "processes of one machine talk over private sockets without names"
_ONE_ATTENTION = "there is one paged attention, with chunked prefill always on"
_ROPE = "RoPE scaling other than the checkpoint's own"


def _own(name: str, field: str | tuple[str, ...], help: str, **more: Any) -> Setting:
    fields = (field,) if isinstance(field, str) else field
    return Setting(name=name, fields=fields, help=help, **more)


def _tgi(name: str, field: str | tuple[str, ...], help: str, **more: Any) -> Setting:
    bare = (name.upper(), *more.pop("bare", ()))
    return _own(name, field, help, bare=bare, **more)


def _panel(title: str, *settings: Setting) -> tuple[Setting, ...]:
    return tuple(msgspec.structs.replace(setting, panel=title) for setting in settings)


def _to_come(
    name: str, feature: str, help: str, *neutral: Any, field: str = "", **more: Any
) -> Setting:
    fields = (field,) if field else ()
    return _tgi(name, fields, help, status="to come", note=feature, neutral=neutral, **more)


def _no_meaning(name: str, reason: str, *neutral: Any, **more: Any) -> Setting:
    help = f"{reason[0].upper()}{reason[1:]}."
    return _tgi(name, (), help, status="no meaning", note=reason, neutral=neutral, **more)


WORKING = (
    *_panel(
        MODEL,
        _tgi(
            "model_id",
            "model.model_id",
            "Hub id, local folder, .gguf file, or `demo` for a small model to try.",
            aliases=("--model",),
            platform=("HF_MODEL_ID",),
        ),
        _tgi(
            "revision",
            "model.revision",
            "Branch, tag or commit of the repository.",
            platform=("HF_MODEL_REVISION",),
        ),
        _tgi(
            "dtype",
            "model.dtype",
            "Number type of weights that are not quantized.",
            choices=("auto", "float32", "bfloat16", "float16"),
        ),
        _own(
            "activation_dtype",
            "model.activation_dtype",
            "Number type that multiplies quantized weights on a CPU: int8 is the fast one.",
            choices=("auto", "int8", "bfloat16"),
        ),
        _tgi(
            "quantize",
            "model.quantize",
            "Round dense weights while loading: int8, int4, eetq, bitsandbytes*, fp8. "
            "Quantized checkpoints are recognized without it.",
            aliases=("--quantization",),
            platform=("HF_MODEL_QUANTIZE",),
            choices=_QUANTIZATIONS,
        ),
        _tgi(
            "lora_adapters",
            "lora.adapters",
            "LoRA adapters beside the model: name=path, name=org/repo@revision or org/repo.",
            aliases=("--lora-modules",),
            kind="list",
        ),
        _own(
            "max_lora_rank",
            "lora.max_rank",
            "Refuse adapters of a larger rank.",
            kind="integer",
            minimum=1,
        ),
        _own("device", "model.device", "Where the model runs.", choices=("auto", "cpu", "cuda")),
        _own(
            "max_model_len",
            "model.max_model_len",
            "Context to serve, at most the model's own, which is the default.",
            kind="integer",
            minimum=1,
        ),
        _tgi(
            "huggingface_hub_cache",
            "model.cache_dir",
            "Folder of the Hub's cache.",
            aliases=("--cache-dir", "--download-dir"),
        ),
        _own(
            "token",
            "model.token",
            "Hub token; HF_TOKEN does the same, unseen by others.",
            aliases=("--hf-token",),
        ),
    ),
    *_panel(
        MEMORY,
        _own(
            "kv_cache_tokens",
            "cache.kv_cache_tokens",
            "Tokens in the KV cache, for all requests together; from free memory if unset.",
            aliases=("--max-batch-total-tokens",),
            bare=("MAX_BATCH_TOTAL_TOKENS",),
            kind="integer",
            minimum=1,
        ),
        _tgi(
            "kv_cache_dtype",
            "cache.kv_cache_dtype",
            "Number type of the KV cache; int8 and fp8 hold about twice the tokens.",
            choices=_KV_DTYPES,
        ),
        _own(
            "memory_fraction",
            "cache.memory_fraction",
            "Share of free memory that a KV cache sized automatically may take.",
            kind="number",
            minimum=0.01,
            maximum=1,
        ),
        _own(
            "block_size",
            "cache.block_size",
            "Tokens in a block of the KV cache.",
            kind="integer",
            minimum=1,
            maximum=1024,
        ),
        _tgi(
            "prefix_caching",
            "cache.prefix_caching",
            "Reuse the KV cache of prompts that begin alike.",
            aliases=("--enable-prefix-caching",),
            kind="switch",
            negatable=True,
        ),
        _own(
            "max_num_seqs",
            "scheduler.max_num_seqs",
            "Sequences that run at once.",
            aliases=("--max-batch-size",),
            bare=("MAX_BATCH_SIZE",),
            kind="integer",
            minimum=1,
        ),
        _tgi(
            "max_batch_prefill_tokens",
            "scheduler.max_batch_tokens",
            "Tokens computed in one step, of prompts and decodes together.",
            aliases=("--max-num-batched-tokens",),
            kind="integer",
            minimum=1,
        ),
        _own(
            "max_mixed_tokens",
            "scheduler.max_mixed_tokens",
            "Tokens computed in a step in which answers grow, of prompts and decodes together; "
            "prompts may always have half as many. Fewer shorten the gaps between tokens, more let "
            "new requests answer sooner.",
            kind="integer",
            minimum=1,
        ),
        _own(
            "max_waiting_requests",
            "scheduler.max_waiting",
            "Requests that the engine itself lets wait.",
            aliases=("--max-num-queued-reqs",),
            kind="integer",
            minimum=1,
        ),
        _own(
            "num_threads",
            "parallel.num_threads",
            "CPU threads that compute, over all shards; one per core if unset.",
            kind="integer",
            minimum=1,
        ),
        _tgi(
            "num_shard",
            "parallel.num_shard",
            "Processes that share the model (tensor parallelism).",
            aliases=("--tensor-parallel-size",),
            kind="integer",
            minimum=1,
        ),
        _tgi(
            "sharded",
            (),
            "Whether the model is shared; --num-shard alone says so too.",
            kind="boolean",
        ),
        _own(
            "nnodes",
            "parallel.nnodes",
            "Machines that share the model; --num-shard counts the shards of all.",
            kind="integer",
            minimum=1,
        ),
        _own(
            "node_rank",
            "parallel.node_rank",
            "Which of them this is; node 0 has the engine and the port.",
            kind="integer",
            minimum=0,
        ),
        _tgi(
            "master_addr",
            "parallel.master_addr",
            "Address of node 0 that the other nodes reach; with --nnodes.",
        ),
        _tgi(
            "master_port",
            "parallel.master_port",
            "Port there that the other nodes come to; with --nnodes.",
            kind="integer",
            minimum=1,
            maximum=65535,
        ),
        _own(
            "dist_timeout",
            "parallel.dist_timeout",
            "Seconds that nodes wait for each other at the start.",
            kind="number",
            minimum=0.1,
        ),
    ),
    *_panel(
        LIMITS,
        _tgi(
            "max_concurrent_requests",
            "server.max_concurrent_requests",
            "Requests accepted at once; further ones get 429.",
            kind="integer",
            minimum=1,
        ),
        _tgi(
            "max_input_tokens",
            "server.max_input_tokens",
            "Tokens of a prompt.",
            aliases=("--max-input-length",),
            bare=("MAX_INPUT_LENGTH",),
            kind="integer",
            minimum=1,
        ),
        _tgi(
            "max_total_tokens",
            "server.max_total_tokens",
            "Tokens of a prompt and its answer; the context too, without --max-model-len.",
            kind="integer",
            minimum=2,
        ),
        _tgi("max_best_of", "server.max_best_of", "Largest `best_of`.", kind="integer", minimum=1),
        _tgi(
            "max_stop_sequences",
            "server.max_stop_sequences",
            "Stop strings of a request.",
            kind="integer",
            minimum=0,
        ),
        _tgi(
            "max_top_n_tokens",
            "server.max_top_n_tokens",
            "Largest `top_n_tokens`.",
            kind="integer",
            minimum=0,
        ),
        _tgi(
            "max_client_batch_size",
            "server.max_client_batch_size",
            "Prompts in one completion request.",
            kind="integer",
            minimum=1,
        ),
        _tgi(
            "payload_limit", "server.payload_limit", "Bytes in a body.", kind="integer", minimum=1
        ),
    ),
    *_panel(
        SERVER,
        _tgi(
            "hostname",
            "server.host",
            "IP address to listen on; the variable counts only if it is one.",
            aliases=("--host",),
            kind="address",
            shared=True,
        ),
        _tgi(
            "port",
            "server.port",
            "0 takes a free port and prints the URL on stdout.",
            short="-p",
            platform=("AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT"),
            kind="integer",
            minimum=0,
            maximum=65535,
        ),
        _own(
            "http_workers",
            "server.http_workers",
            "Processes that speak HTTP.",
            aliases=("--api-server-count",),
            kind="integer",
            minimum=1,
            maximum=256,
        ),
        _tgi(
            "validation_workers",
            "server.validation_workers",
            "Threads of each HTTP process that template and tokenize.",
            kind="integer",
            minimum=1,
            maximum=256,
        ),
        _own(
            "served_model_name",
            "server.served_model_name",
            "The model's name in requests and answers.",
        ),
        _tgi("api_key", "server.api_key", "Key clients must send; better set TGI_API_KEY."),
        _own(
            "api_key_file",
            "server.api_key_file",
            "TOML file of hashed keys with limits for each; `tgi key` makes entries.",
        ),
        _own(
            "health_route",
            "server.health_route",
            "Another path that answers as /health does.",
            platform=("AIP_HEALTH_ROUTE",),
        ),
        _own(
            "predict_route",
            "server.predict_route",
            "Another path that answers as /vertex does.",
            platform=("AIP_PREDICT_ROUTE",),
        ),
        _own("uds", "server.uds", "Unix socket to listen on, instead of an address and a port."),
        _own("ssl_certfile", "server.ssl_certfile", "PEM certificate: the server speaks TLS."),
        _own("ssl_keyfile", "server.ssl_keyfile", "PEM key of --ssl-certfile, if not in it."),
        _own(
            "ssl_ca_certs",
            "server.ssl_ca_certs",
            "PEM authorities: clients must show a certificate of one of them.",
        ),
        _tgi(
            "cors_allow_origin",
            "server.cors_allow_origin",
            "Origin whose pages may call the server; repeatable, all if unset.",
            aliases=("--allowed-origins",),
            kind="list",
        ),
        _own(
            "chat_template",
            "server.chat_template",
            "Jinja file, or template itself, to use instead of the model's chat template.",
        ),
        _tgi(
            "tokenizer_config_path",
            "server.tokenizer_config_path",
            "A tokenizer_config.json to take the chat template from.",
        ),
        _tgi(
            "disable_grammar_support",
            "server.disable_grammar_support",
            "Refuse structured output, and forced tool calls with it.",
            kind="switch",
        ),
        _tgi(
            "watermark_gamma",
            "server.watermark_gamma",
            "Share of the vocabulary that a watermark favours.",
            kind="number",
            minimum=0.01,
            maximum=0.99,
        ),
        _tgi(
            "watermark_delta",
            "server.watermark_delta",
            "How much it favours them, in logits.",
            kind="number",
            minimum=-100,
            maximum=100,
        ),
        _own(
            "max_stored_responses",
            "server.max_stored_responses",
            "Responses of /v1/responses kept in memory for later; 0 keeps none.",
            kind="integer",
            minimum=0,
        ),
        _own(
            "strict_fields",
            "server.strict_fields",
            "Refuse requests with fields that would have no effect.",
            kind="switch",
        ),
        _tgi(
            "graceful_termination_timeout",
            "server.graceful_termination_timeout",
            "Seconds that accepted requests get to finish after SIGTERM.",
            short="-g",
            kind="number",
            minimum=0,
        ),
        _own(
            "step_timeout",
            ("server.step_timeout", "parallel.step_timeout"),
            "Seconds one step may take before the engine counts as hung and is restarted; "
            "with shards, seconds without progress in a step (60 if unset).",
            kind="number",
            minimum=0.1,
        ),
        _own(
            "max_engine_restarts",
            "server.max_engine_restarts",
            "Restarts of the engine within 10 minutes before the server gives up.",
            kind="integer",
            minimum=0,
        ),
    ),
    *_panel(
        LOGGING,
        _tgi(
            "json_output",
            ("engine.json_logs", "server.json_logs"),
            "Log one JSON object a line.",
            kind="switch",
        ),
        _tgi(
            "log_level",
            ("engine.log_level", "server.log_level"),
            "Least severe messages to log.",
            choices=("debug", "info", "warning", "error"),
            shared=True,
        ),
        _tgi(
            "otlp_endpoint",
            "server.otlp_endpoint",
            "Where to send traces, as http://host:4317; needs the extra `otel`.",
            aliases=("--otlp-traces-endpoint",),
        ),
        _own(
            "otlp_protocol",
            "server.otlp_protocol",
            "How to send them; OTEL_EXPORTER_OTLP_PROTOCOL does the same.",
            bare=("OTEL_EXPORTER_OTLP_PROTOCOL",),
            choices=("grpc", "http/protobuf"),
            shared=True,
        ),
        _tgi(
            "otlp_service_name",
            "server.otlp_service_name",
            "The service's name in traces; text-generation-inference.router if unset.",
            bare=("OTEL_SERVICE_NAME",),
        ),
        _tgi(
            "env",
            (),
            "Print the report of `tgi env` on stderr first.",
            short="-e",
            kind="switch",
            shared=True,
        ),
    ),
)

STILL_TO_COME = _panel(
    TO_COME,
    _to_come(
        "speculate",
        "speculative decoding",
        "Tokens to draft ahead; only 0 so far.",
        0,
        kind="integer",
        minimum=0,
    ),
    _to_come(
        "rope_scaling",
        _ROPE,
        "Stretch the context beyond the checkpoint's.",
        choices=("linear", "dynamic"),
    ),
    _to_come("rope_factor", _ROPE, "By how much to stretch the context.", 1.0, kind="number"),
    _to_come(
        "weights_cache_override",
        "weights apart from their configuration",
        "Folder with the weights; a whole model's folder goes into --model-id.",
    ),
)

WITHOUT_MEANING = _panel(
    COMPATIBILITY,
    _no_meaning(
        "trust_remote_code", "code in model repositories is never run", False, kind="switch"
    ),
    _no_meaning("waiting_served_ratio", _NO_PHASES, kind="number"),
    _no_meaning("max_waiting_tokens", _NO_PHASES, kind="integer"),
    _no_meaning("cuda_graphs", _NO_GRAPHS, ("0",), kind="list"),
    _no_meaning("cuda_memory_fraction", "--memory-fraction sizes the KV cache", kind="number"),
    _no_meaning(
        "disable_custom_kernels", "this build has portable kernels only", False, kind="switch"
    ),
    _no_meaning("prometheus_port", "/metrics is on the server's own port", kind="integer"),
    _no_meaning("shard_uds_path", _PRIVATE),
    _no_meaning("usage_stats", "nothing about its use is ever sent anywhere", "off"),
    _no_meaning(
        "enable_prefill_logprobs",
        "prompt logprobs are there for every request that asks",
        True,
        False,
        kind="switch",
    ),
    _no_meaning("max_image_fetch_size", "this build fetches no images", kind="integer"),
    _no_meaning("ngrok", _NO_TUNNEL, False, kind="switch"),
    _no_meaning("ngrok_authtoken", _NO_TUNNEL),
    _no_meaning("ngrok_edge", _NO_TUNNEL),
    _no_meaning("attention", _ONE_ATTENTION, env_only=True),
    _no_meaning("prefill_chunking", _ONE_ATTENTION, True, kind="switch", env_only=True),
    _no_meaning("use_flash_attention", _ONE_ATTENTION, kind="switch", env_only=True),
)

SETTINGS = (
    *WORKING,
    *STILL_TO_COME,
    *_panel(TO_COME, *VLLM_TO_COME),
    *WITHOUT_MEANING,
    *_panel(COMPATIBILITY, *VLLM_WITHOUT_MEANING),
)
