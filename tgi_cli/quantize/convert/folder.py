"""The finished folder: weights joined, `config.json` with its quantization, tokenizer and the rest.

`config.json` comes last: a folder without it is not a model, so half of one is never taken for a
whole. Knows no arithmetic.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.quantize.convert.recipe import Recipe
from tgi_cli.quantize.convert.shards import join, write_json

#: What is copied from the original: tokenizer, templates, generation defaults and the licence.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
)


def finish_folder(
    checkpoint: Checkpoint, recipe: Recipe, parts: Sequence[Path], output: Path
) -> int:
    """Put the model together in `output`; returns the bytes of its weights.

    Safe to repeat after a kill: every file appears whole, under its own name.
    """
    weights = join(parts, output)
    original = Path(checkpoint.path)
    for pattern in _COPIED:
        for file in sorted(original.glob(pattern)):
            if file.is_file():
                target = output / file.relative_to(original)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    description = quantization_config(checkpoint, recipe)
    for name, value in recipe.layout.extra_files(description).items():
        write_json(output / name, value)
    write_json(output / "config.json", {**checkpoint.config, "quantization_config": description})
    return sum(path.stat().st_size for path in weights)


def quantization_config(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """What `config.json` says about the quantization."""
    head = checkpoint.spec.names.head.removesuffix(".weight")
    return recipe.layout.config(recipe.bits, recipe.group_size, [head])


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of what is not quantized: the original's own."""
    return checkpoint.stored_dtype
