"""From settled `tgi launch` settings to the engine's and the server's configuration.

Fills the frozen structs by the fields the flag table names and checks what one flag alone cannot
show: limits that contradict each other. Knows neither Typer nor the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tgi_cli.adapter_names import parse_adapters
from tgi_cli.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    Resolution,
    SchedulerConfig,
    ServerConfig,
    Setting,
)
from tgi_cli.errors import UsageError

#: The sections that `Setting.fields` may name, and the structs they fill.
SECTIONS: dict[str, type[msgspec.Struct]] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "parallel": ParallelConfig,
    "lora": AdapterConfig,
    "engine": EngineConfig,
    "server": ServerConfig,
}

_SECRETS = ("token", "api_key")

#: Which limit must be less than, or at most, which other one.
_ORDER = (
    ("max_input_tokens", "less than", "max_total_tokens"),
    ("max_total_tokens", "at most", "max_model_len"),
    ("max_input_tokens", "less than", "max_model_len"),
    ("max_total_tokens", "at most", "kv_cache_tokens"),
    ("block_size", "at most", "kv_cache_tokens"),
)


class LaunchConfig(msgspec.Struct, frozen=True):
    """What one `tgi launch` runs: the engine's configuration and the HTTP side's."""

    engine: EngineConfig
    server: ServerConfig

    def shown(self) -> dict[str, Any]:
        """Everything as plain data for `--show-config`, keys and tokens masked."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        for section in (shown["engine"]["model"], shown["server"]):
            section.update({key: "***" for key in _SECRETS if section.get(key)})
        return shown


def default_of(field: str) -> Any:
    """The default of a `section.field`; None where the field has none."""
    section, name = field.split(".")
    for info in msgspec.structs.fields(SECTIONS[section]):
        if info.name == name:
            return None if info.default is msgspec.NODEFAULT else info.default
    raise KeyError(field)


def build(
    settings: Sequence[Setting], resolution: Resolution, *, default_host: str
) -> LaunchConfig:
    """Fill the structs. Raises `UsageError` for a missing model or limits that contradict."""
    filled: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    filled["server"]["host"] = default_host
    for setting in settings:
        if setting.name == "port" and resolution.sources.get("port") in setting.platform:
            filled["server"]["host"] = "0.0.0.0"  # the platform calls from outside the container
    for setting in settings:
        if setting.name in resolution.values:
            for field in setting.fields:
                section, name = field.split(".")
                filled[section][name] = resolution.values[setting.name]
    if "model_id" not in filled["model"]:
        raise UsageError(
            "no model: --model-id is not given and TGI_MODEL_ID and MODEL_ID are not set",
            hint="`--model-id demo` serves a small model that is fetched on first use",
        )
    if "adapters" in filled["lora"]:
        flag = resolution.sources["lora_adapters"]
        filled["lora"]["adapters"] = parse_adapters(filled["lora"]["adapters"], flag=flag)
        _check_adapters(filled, flag)
    total = filled["server"].get("max_total_tokens")
    # A request can never use more context than this, so the engine need not plan for more.
    filled["model"].setdefault("max_model_len", total)
    config = LaunchConfig(
        engine=EngineConfig(
            model=ModelConfig(**filled["model"]),
            cache=CacheConfig(**filled["cache"]),
            scheduler=SchedulerConfig(**filled["scheduler"]),
            parallel=ParallelConfig(**filled["parallel"]),
            lora=AdapterConfig(**filled["lora"]),
            **filled["engine"],
        ),
        server=ServerConfig(**filled["server"]),
    )
    _check_limits(config, resolution.sources)
    _check_shards(config, resolution)
    _check_files(config.server, resolution.sources)
    _check_routes(config.server, resolution.sources)
    return config


def _check_adapters(filled: dict[str, dict[str, Any]], flag: str) -> None:
    taken = (filled["model"]["model_id"], filled["server"].get("served_model_name"), "tgi")
    for adapter in filled["lora"]["adapters"]:
        if adapter.name in taken:
            raise UsageError(
                f"{flag} calls an adapter `{adapter.name}`, which is the model's own name",
                hint="give it another one: name=path",
            )


def _check_shards(config: LaunchConfig, resolution: Resolution) -> None:
    config.engine.parallel.check()
    sharded, count = resolution.values.get("sharded"), config.engine.parallel.num_shard
    if sharded is True and count == 1:
        raise UsageError(
            f"{resolution.sources['sharded']} is true, but the model is to have 1 shard",
            hint="say how many: --num-shard",
        )
    if sharded is False and count > 1:
        raise UsageError(
            f"{resolution.sources['sharded']} is false, but {resolution.sources['num_shard']} "
            f"asks for {count} shards",
            hint="leave one of them away",
        )


def without_nodes(config: LaunchConfig, resolution: Resolution) -> Iterator[str]:
    """Settings that only several machines need, given for one; job launchers set them always."""
    if config.engine.parallel.nnodes == 1:
        for name in ("master_addr", "master_port", "dist_timeout"):
            if name in resolution.sources:
                yield f"{resolution.sources[name]} has no effect: there is one node (--nnodes)"


def _check_limits(config: LaunchConfig, sources: dict[str, str]) -> None:
    limits = {
        "max_input_tokens": config.server.max_input_tokens,
        "max_total_tokens": config.server.max_total_tokens,
        "max_model_len": config.engine.model.max_model_len,
        "kv_cache_tokens": config.engine.cache.kv_cache_tokens,
        "block_size": config.engine.cache.block_size,
    }
    for low_name, relation, high_name in _ORDER:
        low, high = limits[low_name], limits[high_name]
        if low is None or high is None or low < high or (low == high and relation == "at most"):
            continue
        low_flag, high_flag = (
            sources.get(name, "--" + name.replace("_", "-")) for name in (low_name, high_name)
        )
        raise UsageError(
            f"{low_flag} is {low} but must be {relation} {high_flag}, which is {high}",
            hint=f"lower {low_flag} or raise {high_flag}",
        )


def _check_routes(server: ServerConfig, sources: dict[str, str]) -> None:
    for name in ("health_route", "predict_route"):
        route = getattr(server, name)
        if route is not None and re.fullmatch(r"(/[A-Za-z0-9._~:@-]+)+/?", route) is None:
            raise UsageError(f"{sources[name]} is {route!r} but must be a path such as /predict")


def _check_files(server: ServerConfig, sources: dict[str, str]) -> None:
    for name in (
        "tokenizer_config_path",
        "chat_template",
        "api_key_file",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_ca_certs",
    ):
        path = getattr(server, name)
        template_itself = name == "chat_template" and path is not None and "{" in path
        if path is not None and not template_itself and not Path(path).is_file():
            raise UsageError(f"{sources[name]} names {path}, which is not a file")
