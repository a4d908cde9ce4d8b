"""vLLM's launch flags that are no setting of ours by another name, each with what becomes of it.

Where one of ours means the same, theirs is an alias in `cli.launch_flags`. The rest is here:
without meaning for this server (accepted, with a line on stderr), or a feature still to come
(refused). None is read from bare variables.
"""

from __future__ import annotations

from typing import Any

from tgi_cli.config import Setting

_BUDGET = "prompts and decodes share one token budget per step, and chunks are always on"
_CACHE_SIZE = "--kv-cache-tokens and --memory-fraction size the KV cache"
_GRAPHS = "nothing is compiled or captured"
_TEMPLATE = "the format of tool calls and reasoning is read from the chat template"
_GRAMMARS = "every grammar is compiled by llguidance"
_LOGS = "--log-level and --json-output say what is logged"
_PAGES = "pages may send any header and method; --cors-allow-origin names origins"
_REPLICAS = "replicas"
_IMAGES = "images and other media"
_ADAPTERS = "--lora-adapters names what is served, and any mix of it runs in one batch"
_SPECULATION = "speculative decoding"
_OVERRIDES = "overriding a model's own configuration"
_TEXTS = "another way of writing answers"


def _no_meaning(name: str, reason: str, *neutral: Any, **more: Any) -> Setting:
    help = f"{reason[0].upper()}{reason[1:]}."
    return Setting(name=name, status="no meaning", note=reason, neutral=neutral, help=help, **more)


def _to_come(name: str, feature: str, help: str, *neutral: Any, **more: Any) -> Setting:
    return Setting(name=name, status="to come", note=feature, neutral=neutral, help=help, **more)


def _switches(reason: str, *names: str) -> tuple[Setting, ...]:
    return tuple(_no_meaning(name, reason, False, kind="switch") for name in names)


#: Accepted without effect.
VLLM_WITHOUT_MEANING = (
    _no_meaning("gpu_memory_utilization", _CACHE_SIZE, kind="number"),
    _no_meaning("num_gpu_blocks_override", _CACHE_SIZE, kind="integer"),
    _no_meaning("kv_cache_memory_bytes", _CACHE_SIZE),
    _no_meaning("swap_space", "what is preempted is computed again, not swapped", kind="number"),
    _no_meaning("enable_chunked_prefill", _BUDGET, True, kind="switch", negatable=True),
    _no_meaning("max_num_partial_prefills", _BUDGET, kind="integer"),
    _no_meaning("max_long_partial_prefills", _BUDGET, kind="integer"),
    _no_meaning("long_prefill_token_threshold", _BUDGET, kind="integer"),
    _no_meaning("num_scheduler_steps", _BUDGET, kind="integer"),
    _no_meaning("async_scheduling", _BUDGET, kind="switch", negatable=True),
    _no_meaning("scheduling_policy", "least-served tenants go first, priorities above that"),
    _no_meaning("seed", "a request without a seed gets one of its own", kind="integer"),
    _no_meaning("enforce_eager", _GRAPHS, True, kind="switch", negatable=True),
    _no_meaning("compilation_config", _GRAPHS),
    _no_meaning("max_seq_len_to_capture", _GRAPHS, kind="integer"),
    *_switches("sums go through shared memory", "disable_custom_all_reduce"),
    _no_meaning("distributed_executor_backend", "shards are processes of this server"),
    _no_meaning("enable_auto_tool_choice", _TEMPLATE, True, kind="switch", negatable=True),
    _no_meaning("tool_call_parser", _TEMPLATE),
    _no_meaning("enable_lora", _ADAPTERS, True, False, kind="switch"),
    _no_meaning("max_loras", _ADAPTERS, kind="integer"),
    _no_meaning("max_cpu_loras", _ADAPTERS, kind="integer"),
    _no_meaning("lora_dtype", "adapters are held in the model's number type", "auto"),
    _no_meaning("fully_sharded_loras", "each shard holds its part", True, False, kind="switch"),
    _no_meaning("reasoning_parser", _TEMPLATE),
    *_switches(_TEMPLATE, "enable_reasoning"),
    _no_meaning("chat_template_content_format", _TEMPLATE, "auto"),
    _no_meaning("guided_decoding_backend", _GRAMMARS, "auto", "guidance"),
    _no_meaning("structured_outputs_config", _GRAMMARS),
    _no_meaning("tokenizer_mode", "there is one tokenizer for each model", "auto"),
    _no_meaning("tokenizer_pool_size", "--validation-workers says it here", kind="integer"),
    _no_meaning("load_format", "the format is read from the files", "auto", "safetensors"),
    _no_meaning("config_format", "the format is read from the files", "auto", "hf"),
    _no_meaning("model_impl", "native families are always used", "auto"),
    _no_meaning("task", "this server generates", "auto", "generate"),
    _no_meaning("runner", "this server generates", "auto", "generate"),
    _no_meaning("max_logprobs", "--max-top-n-tokens says it here", kind="integer"),
    *_switches(
        _LOGS,
        *("disable_log_requests", "disable_log_stats", "disable_uvicorn_access_log"),
        *("enable_log_requests", "enable_log_outputs", "enable_log_deltas"),
    ),
    _no_meaning("uvicorn_log_level", _LOGS),
    _no_meaning("log_config_file", _LOGS),
    _no_meaning("max_log_len", _LOGS, kind="integer"),
    _no_meaning("collect_detailed_traces", "traces have every part of a request"),
    _no_meaning("enable_request_id_headers", "they are always on", True, kind="switch"),
    _no_meaning("enable_prompt_tokens_details", "they are always on", True, kind="switch"),
    _no_meaning("enable_tokenizer_info_endpoint", "/info has the facts", kind="switch"),
    _no_meaning("enable_server_load_tracking", "/metrics has the load", kind="switch"),
    *_switches("the HTTP side has its own processes", "disable_frontend_multiprocessing"),
    _no_meaning("h11_max_incomplete_event_size", "--payload-limit bounds a body", kind="integer"),
    _no_meaning("ssl_cert_reqs", "--ssl-ca-certs alone asks for them", 0, kind="integer"),
    *_switches(_PAGES, "allow_credentials"),
    _no_meaning("allowed_methods", _PAGES),
    _no_meaning("allowed_headers", _PAGES),
)

#: Refused until there is such a feature.
VLLM_TO_COME = (
    _to_come("pipeline_parallel_size", "pipeline stages", "Only 1 so far.", 1, kind="integer"),
    _to_come("data_parallel_size", _REPLICAS, "Only 1 so far.", 1, kind="integer"),
    _to_come("headless", _REPLICAS, "Run an engine without HTTP.", False, kind="switch"),
    _to_come("enable_expert_parallel", "expert parallelism", "", False, kind="switch"),
    _to_come("cpu_offload_gb", "offloading weights", "Only 0 so far.", 0, kind="number"),
    _to_come("kv_transfer_config", "moving KV between servers", "Where to move KV."),
    _to_come("enable_sleep_mode", "sleeping", "Give memory back on demand.", False, kind="switch"),
    _to_come("speculative_config", _SPECULATION, "How to draft."),
    _to_come("speculative_model", _SPECULATION, "A drafting model."),
    _to_come("num_speculative_tokens", _SPECULATION, "Tokens to draft ahead.", 0, kind="integer"),
    _to_come("limit_mm_per_prompt", _IMAGES, "Media items of a prompt."),
    _to_come("mm_processor_kwargs", _IMAGES, "Arguments of the media processor."),
    _to_come("allowed_local_media_path", _IMAGES, "Folder of local media."),
    _to_come("tokenizer", "a tokenizer apart from its model", "Folder of the tokenizer."),
    _to_come("tokenizer_revision", "a tokenizer apart from its model", "Its revision."),
    _to_come("skip_tokenizer_init", "serving without a tokenizer", "", False, kind="switch"),
    _to_come("hf_overrides", _OVERRIDES, "Entries of config.json to replace."),
    _to_come("override_generation_config", _OVERRIDES, "Defaults of sampling to replace."),
    _to_come("generation_config", _OVERRIDES, "Where sampling's defaults are.", "auto", "vllm"),
    _to_come("logits_processors", "logits processors of users", "Their classes.", (), kind="list"),
    _to_come("response_role", _TEXTS, "Who answers.", "assistant"),
    _to_come("return_tokens_as_token_ids", _TEXTS, "Write ids.", False, kind="switch"),
    _to_come("enable_force_include_usage", _TEXTS, "Usage always.", False, kind="switch"),
    _to_come("default_chat_template_kwargs", _TEXTS, "Template arguments of all chats."),
    _to_come("tool_parser_plugin", "parsers of users", "A Python file."),
    _to_come("tool_server", "tools run by the server", "Where they are."),
    _to_come("middleware", "middleware of users", "Its class.", (), kind="list"),
    _to_come("root_path", "serving under a path", "The path, behind a proxy."),
    _to_come("disable_fastapi_docs", "hiding /docs", "Hide them.", False, kind="switch"),
    _to_come(
        "enable_ssl_refresh", "certificates read again", "Without a restart.", False, kind="switch"
    ),
)
