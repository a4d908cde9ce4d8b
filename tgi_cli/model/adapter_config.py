"""`adapter_config.json` of PEFT: what kind of adapter a folder holds, and how strong it is.

Only plain LoRA on linear layers is served. A setting that would change what the weights mean is
refused by name, and so is one that is not known here and is set. Knows no tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgi_cli.errors import CheckpointError, UnsupportedModel

CONFIG_FILE = "adapter_config.json"

#: What matters to training alone, or is a record of it.
_WITHOUT_EFFECT = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
        *("lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("target_modules", "runtime_config", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size"),
        *("fan_in_fan_out", "ensure_weight_tying"),
    )
)
_READ = frozenset(
    (
        *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora"),
        *("rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
    )
)
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules saved beside the adapter",
    "lora_bias": "biases in an adapter",
    "trainable_token_indices": "trained tokens of the token table",
    "target_parameters": "adapters on bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
#: Initializations that take what they put into the adapter out of the base model's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Ranks and scales by module; `base_model` is what the adapter was trained on, if said."""

    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """The rank that the module's matrices must have."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Factor on the product: alpha / rank, or alpha / sqrt(rank) if rank-stabilized.

        The latter is rsLoRA (Kalajdzievski, 2023).
        """
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(self.rank, *self.rank_pattern.values(), 0)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check a folder's `adapter_config.json`.

    Raises:
        CheckpointError: it is missing, unreadable or holds no ranks.
        UnsupportedModel: an adapter of a kind that is not served; names the setting.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"`{folder}` has no {CONFIG_FILE}, so it is no adapter",
            hint="name a folder as PEFT's `save_pretrained` writes it",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{path}` is not readable: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"`{path}` does not hold an object")
    _refuse(path, config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise CheckpointError(f"`{path}`: `rank_pattern` and `alpha_pattern` must be objects")
    for name, value in (("r", rank), *(("rank_pattern", each) for each in ranks.values())):
        if type(value) is not int or value < 1:
            raise CheckpointError(f"`{path}`: `{name}` is {value!r} but must be a positive integer")
    for name, value in (("lora_alpha", alpha), *(("alpha_pattern", v) for v in alphas.values())):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise CheckpointError(f"`{path}`: `{name}` is {value!r} but must be a number")
    return AdapterConfig(
        rank=int(rank or 0),
        alpha=float(alpha or 0.0),
        rank_stabilized=bool(config.get("use_rslora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        base_model=config.get("base_model_name_or_path") or None,
    )


def _refuse(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModel(f"`{path}` is an adapter of type {kind!r}; only LORA is served")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise UnsupportedModel(f"`{path}` sets `{key}`: {what} cannot be served")
    if config.get("bias") not in (None, "none"):
        raise UnsupportedModel(
            f"`{path}` sets `bias` to {config['bias']!r}: an adapter with biases cannot be served"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UnsupportedModel(
            f"`{path}` sets `init_lora_weights` to {start!r}, which changes the base model too",
            hint="convert it to plain LoRA: PEFT's `path_initial_model_for_weight_conversion`",
        )
    known = _WITHOUT_EFFECT | _READ | _REFUSED.keys()
    unknown = sorted(key for key, value in config.items() if value and key not in known)
    if unknown:
        raise UnsupportedModel(f"`{path}` sets `{unknown[0]}`, which is not known here")


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that the module's name ends with, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
