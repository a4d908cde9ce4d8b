"""One file a family: `config.json` to `DecoderSpec` and tensor names, nothing else.

A new plain family is one file here and one line in the table.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from tgi_cli.errors import UnsupportedModel
from tgi_cli.model.config_reader import ConfigReader
from tgi_cli.model.families.gemma import read_gemma3
from tgi_cli.model.families.llama import read_llama, read_mistral
from tgi_cli.model.families.qwen import read_qwen2, read_qwen3
from tgi_cli.model.spec import DecoderSpec

Family = Callable[[ConfigReader], DecoderSpec]

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": read_llama,
    "MistralForCausalLM": read_mistral,
    "Qwen2ForCausalLM": read_qwen2,
    "Qwen3ForCausalLM": read_qwen3,
    "Gemma3ForCausalLM": read_gemma3,
}
#: Used where a configuration names no architecture.
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def architecture_of(config: dict[str, Any]) -> str:
    """The supported architecture that `config` names, by `architectures` or by `model_type`.

    Raises:
        UnsupportedModel: none of them is in the table; near matches and the table are listed.
    """
    listed = config.get("architectures")
    named = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    for name in named:
        if name in FAMILIES:
            return name
    model_type = config.get("model_type")
    if not named and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    wanted = named[0] if named else str(model_type)
    near = difflib.get_close_matches(wanted, FAMILIES, n=2, cutoff=0.75)
    like = f"; similar names: {', '.join(near)}" if near else ""
    raise UnsupportedModel(
        f"architecture `{wanted}` is not supported{like}",
        hint=f"this build runs {', '.join(FAMILIES)}",
    )


def read_spec(config: dict[str, Any], architecture: str) -> DecoderSpec:
    """The decoder that `config` describes.

    Raises:
        CheckpointError: a key is missing or has a value of the wrong type.
        UnsupportedModel: a key is unknown, or asks for mathematics we do not have.
    """
    reader = ConfigReader(config)
    spec = FAMILIES[architecture](reader)
    reader.expect("is_encoder_decoder", False)
    reader.expect("add_cross_attention", False)
    reader.finish()
    return spec
