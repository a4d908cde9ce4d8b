"""What a layout is: how quantized matrices are named, packed and described in `config.json`.

One file per layout; `recipe.py` chooses one. Only layouts that the common servers read are here.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tgi_cli.quantize.methods.matrix import QuantizedMatrix


class Layout(Protocol):
    """How one checkpoint stores its quantized matrices."""

    #: What people call the checkpoint: `gptq`, `awq`, `compressed-tensors`.
    name: str

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are stored in."""
        ...

    def vector_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype biases of quantized matrices are stored in."""
        ...

    def tensors(self, name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
        """The tensors of module `name` (`….q_proj`), without its bias."""
        ...

    def config(self, bits: int, group_size: int, ignored: list[str]) -> dict[str, Any]:
        """`quantization_config`; `ignored` are modules with matrices that are left alone."""
        ...

    def extra_files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Further JSON files that older readers look for, by name."""
        ...
