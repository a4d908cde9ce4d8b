"""Configuration: frozen structs, resolved once. The only reader of the environment.

Precedence: flag, then `TGI_*` variable, then TGI's bare name, then default. Derived values go to
new structs; nothing is written back. `None` means "decide from the model and the machine".
Which flags a command has is the command's business: it hands `resolve` a table of `Setting`s.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from tgi_cli.errors import UsageError


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which weights, and how they are held."""

    model_id: str
    revision: str | None = None
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    activation_dtype: str = "auto"  # auto | int8 | bfloat16; what multiplies quantized weights
    device: str = "auto"  # auto | cpu | cuda
    quantize: str | None = None
    trust_remote_code: bool = False
    max_model_len: int | None = None
    cache_dir: str | None = None
    token: str | None = None


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The paged KV cache. `kv_cache_tokens` None sizes it from free memory."""

    block_size: int = 16
    kv_cache_dtype: str = "auto"  # auto | a name in kernels.kv_rows
    kv_cache_tokens: int | None = None
    memory_fraction: float = 0.5  # of free memory, when sized automatically
    prefix_caching: bool = True


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Step budget and queue."""

    max_num_seqs: int = 64
    max_batch_tokens: int = 512  # one budget per step for prompts and decodes together
    max_mixed_tokens: int = 160  # the same where answers grow; prompts get half of it at the least
    max_waiting: int = 4096  # a second line of defence; the front door bounds the queue first


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the model is spread."""

    num_shard: int = 1  # ranks, over all nodes
    num_threads: int | None = None  # over all ranks of a node
    step_timeout: float = 60.0  # seconds a rank may make no progress in a step
    nnodes: int = 1  # machines; each has as many ranks
    node_rank: int = 0  # which of them this is; node 0 has the engine
    master_addr: str | None = None  # of node 0, where the others reach it
    master_port: int = 29500
    dist_timeout: float = 300.0  # seconds that nodes wait for each other

    def ranks(self, node_rank: int) -> range:
        """The ranks of one node, neighbours."""
        each = self.num_shard // self.nnodes
        return range(node_rank * each, (node_rank + 1) * each)

    def check(self) -> None:
        """Raise `UsageError` for nodes and shards that contradict each other."""
        if self.num_shard % self.nnodes:
            raise UsageError(
                f"{self.num_shard} shards do not divide over {self.nnodes} nodes",
                hint="--num-shard counts the shards of all nodes together",
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise UsageError(
                f"--node-rank {self.node_rank} is not one of {self.nnodes} nodes",
                hint=f"use 0 to {self.nnodes - 1}",
            )
        if self.nnodes > 1 and self.master_addr is None:
            raise UsageError(
                f"--nnodes {self.nnodes} needs --master-addr",
                hint="it is the address of node 0 that the other nodes reach",
            )


class AdapterSource(msgspec.Struct, frozen=True):
    """A LoRA adapter: the `name` requests give, and a local folder or a repository of the hub."""

    name: str
    source: str
    revision: str | None = None


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Adapters served beside the model. `max_rank` None admits every rank."""

    adapters: tuple[AdapterSource, ...] = ()
    max_rank: int | None = None


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process needs to start."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    lora: AdapterConfig = AdapterConfig()
    json_logs: bool = False
    log_level: str = "INFO"


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP side. Limits and defaults are TGI's unless a comment says otherwise."""

    host: str = "127.0.0.1"
    port: int = 3000  # 0 picks a free port
    http_workers: int = 1
    served_model_name: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    health_route: str | None = None  # further names of /health and /vertex
    predict_route: str | None = None
    uds: str | None = None  # a Unix socket's path, instead of host and port
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    validation_workers: int = 2
    payload_limit: int = 2_000_000  # bytes
    disable_grammar_support: bool = False
    strict_fields: bool = False
    watermark_gamma: float = 0.5  # share of the vocabulary that a watermark favours
    watermark_delta: float = 2.0  # and by how much, in logits
    max_stored_responses: int = 1000  # of `/v1/responses`; 0 keeps none
    cors_allow_origin: tuple[str, ...] = ()
    tokenizer_config_path: str | None = None
    chat_template: str | None = None
    graceful_termination_timeout: float = 90.0  # seconds
    step_timeout: float = 300.0  # seconds one step may take before the engine counts as hung
    max_engine_restarts: int = 3  # within 10 minutes
    otlp_endpoint: str | None = None  # no traces without it
    otlp_protocol: str = "grpc"  # grpc | http/protobuf
    otlp_service_name: str | None = None
    json_logs: bool = False
    log_level: str = "INFO"


#: What a setting's text is read as. A `switch` takes no value on the command line.
Kind = Literal["text", "integer", "number", "switch", "boolean", "list", "address"]

#: `works`; `no meaning` here (accepted, said on stderr); still `to come` (refused).
Status = Literal["works", "no meaning", "to come"]

_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})
_FALSE = frozenset({"0", "false", "f", "no", "n", "off"})


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One flag of a command, the variables that may set it instead, and where its value goes.

    `TGI_<NAME>` is read for every setting, then each of `platform` (what hosting platforms set for
    the container they run), then `bare` (TGI's own variables, each also with the `TGI_` prefix).
    `aliases` are further spellings; giving two of them at once is an error.
    `shared` marks bare variables that other programs set as well: a value that cannot be ours is
    passed over. `fields` are the configuration fields it sets, as `section.field`. `neutral`
    values are accepted without a word whatever the status; `note` is the reason for the others.
    """

    name: str
    kind: Kind = "text"
    aliases: tuple[str, ...] = ()
    short: str | None = None
    env_only: bool = False
    negatable: bool = False
    platform: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    shared: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    fields: tuple[str, ...] = ()
    status: Status = "works"
    neutral: tuple[Any, ...] = ()
    note: str = ""
    help: str = ""
    panel: str = ""

    @property
    def flag(self) -> str:
        """The principal spelling."""
        return "--" + self.name.replace("_", "-")

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every long spelling; an environment-only setting has none."""
        return () if self.env_only else (self.flag, *self.aliases)

    @property
    def variables(self) -> tuple[tuple[str, ...], ...]:
        """Environment variables by precedence: prefixed, each platform's, TGI's bare names."""
        prefixed = dict.fromkeys(f"TGI_{name}" for name in (self.name.upper(), *self.bare))
        return tuple(prefixed), *((name,) for name in self.platform), self.bare

    @property
    def allowed(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind in ("integer", "number"):
            noun = "an integer" if self.kind == "integer" else "a number"
            if self.minimum is not None and self.maximum is not None:
                return f"{noun} from {self.minimum:g} to {self.maximum:g}"
            return noun if self.minimum is None else f"{noun} of at least {self.minimum:g}"
        return {
            "switch": "true or false",
            "boolean": "true or false",
            "address": "an IP address",
        }.get(self.kind, "a text that is not empty")


class Resolution(msgspec.Struct, frozen=True):
    """Values by setting name (only those somebody set), who set them, and what to say on stderr."""

    values: dict[str, Any]
    sources: dict[str, str]
    notices: tuple[str, ...]


def resolve(
    settings: Sequence[Setting], flags: Mapping[str, Any], environ: Mapping[str, str]
) -> Resolution:
    """Work out every setting from the flags given and the environment; a pure function.

    `flags` maps spellings (`--port`) to what was given; None and empty lists mean "not given".
    Raises `UsageError` for a value outside its range, two spellings at once, or a feature that is
    still to come (all of those in one sentence).
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    notices: list[str] = []
    to_come: list[str] = []
    for setting in settings:
        found = _from_flags(setting, flags) or _from_environment(setting, environ, notices)
        if found is None:
            continue
        source, value = found
        if setting.status == "works" or value in setting.neutral:
            values[setting.name], sources[setting.name] = value, source
        elif setting.status == "no meaning":
            notices.append(f"{source} has no effect: {setting.note}")
        else:
            shown = "" if setting.kind == "switch" else f" {value}"
            to_come.append(f"{source}{shown} ({setting.note})")
    if to_come:
        raise UsageError(
            f"not in this build yet: {', '.join(to_come)}",
            hint="leave out what is named to go on without it",
        )
    notices += _misspelled(settings, environ)
    return Resolution(values, sources, tuple(notices))


def _from_flags(setting: Setting, flags: Mapping[str, Any]) -> tuple[str, Any] | None:
    given = [name for name in setting.spellings if flags.get(name) not in (None, [], ())]
    if len(given) > 1:
        raise UsageError(
            f"{given[0]} and {given[1]} are the same setting and were both given",
            hint=f"keep {given[0]}",
        )
    if not given:
        return None
    return given[0], parse_value(setting, given[0], flags[given[0]])


def _from_environment(
    setting: Setting, environ: Mapping[str, str], notices: list[str]
) -> tuple[str, Any] | None:
    for names in setting.variables:
        given = [name for name in names if environ.get(name)]
        if len(given) > 1 and len({environ[name] for name in given}) > 1:
            raise UsageError(f"{given[0]} and {given[1]} are the same setting and differ")
        for name in given[:1]:
            if _foreign(setting, name, environ[name], notices):
                continue
            return name, parse_value(setting, name, environ[name])
    return None


def _foreign(setting: Setting, name: str, value: str, notices: list[str]) -> bool:
    """Whether a variable was set by somebody else who uses the same name."""
    prefixed = name.startswith("TGI_")
    # Kubernetes sets TGI_PORT=tcp://10.0.0.1:80 in every pod beside a service called `tgi`.
    if prefixed and setting.kind == "integer" and value.startswith(("tcp://", "udp://")):
        notices.append(f"{name}={value} is ignored: it is a Kubernetes service link")
        return True
    if not setting.shared or (prefixed and setting.kind != "address"):
        return False
    try:
        parse_value(setting, name, value)
    except UsageError:
        if prefixed:
            notices.append(f"{name}={value} is ignored: it is not {setting.allowed}")
        return True
    return False


def _misspelled(settings: Sequence[Setting], environ: Mapping[str, str]) -> Iterable[str]:
    known = {name for setting in settings for name in setting.variables[0]}
    for name in sorted(environ):
        if name.startswith("TGI_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                yield f"{name} is not a setting and is ignored; did you mean {near[0]}?"


def parse_value(setting: Setting, source: str, raw: Any) -> Any:
    """Read one value; `source` is the flag or variable to name when it is wrong."""
    if setting.kind == "list":
        parts = raw.split(",") if isinstance(raw, str) else [p for r in raw for p in r.split(",")]
        return tuple(part.strip() for part in parts if part.strip())
    text = str(raw).strip()
    value = raw if isinstance(raw, bool) else _scalar(setting, text)
    if setting.choices:
        value = text.lower()
    if (
        value is None
        or (setting.choices and value not in setting.choices)
        or (setting.minimum is not None and value < setting.minimum)
        or (setting.maximum is not None and value > setting.maximum)
    ):
        raise UsageError(f"{source} is {str(raw)!r} but must be {setting.allowed}")
    return value


def _scalar(setting: Setting, text: str) -> Any:
    """The value of `text`, or None if it is not of the setting's kind."""
    try:
        match setting.kind:
            case "integer":
                return int(text)
            case "number":
                number = float(text)
                return number if math.isfinite(number) else None
            case "switch" | "boolean":
                lowered = text.lower()
                return True if lowered in _TRUE else False if lowered in _FALSE else None
            case "address":
                return str(ipaddress.ip_address("127.0.0.1" if text == "localhost" else text))
    except ValueError:
        return None
    return text or None


def environment() -> dict[str, str]:
    """A copy of the process environment, for `resolve` and for child processes."""
    return dict(os.environ)


def cache_dir() -> Path:
    """Where files that can be made again are kept: `$XDG_CACHE_HOME/tgi` or `~/.cache/tgi`."""
    return _xdg("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """Where the chat history is kept: `$XDG_STATE_HOME/tgi` or `~/.local/state/tgi`."""
    return _xdg("XDG_STATE_HOME", ".local/state")


def default_api_key() -> str | None:
    """The key that `chat` and `bench` send when none is given: `TGI_API_KEY`.

    The bare `API_KEY` is not sent: it may be another program's, and the server another host.
    """
    return os.environ.get("TGI_API_KEY") or None


def _xdg(variable: str, fallback: str) -> Path:
    # The XDG specification says that a relative path in these variables is to be ignored.
    root = os.environ.get(variable, "")
    return (Path(root) if root.startswith("/") else Path.home() / fallback) / "tgi"
