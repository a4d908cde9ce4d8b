"""The native sampling kernel behind `kernels.sampling.RowSampling`.

One struct, made once, points to the arrays of all rows; a call sets what changes with the step.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgi_cli.kernels.cpu.library import Context
from tgi_cli.kernels.sampling import RowParameters

_BY_STEP = ("logits", "rows", "history_lens", "output_positions", "token_ids", "valid", "tokens")
_BY_ROW = (
    "repetition",
    "frequency",
    "presence",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seeds",
    "greedy",
)


class Sampling(ctypes.Structure):
    """See `csrc/kernels.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_BY_STEP, *_BY_ROW)),
        *((name, ctypes.c_int64) for name in ("n", "vocab", "token_stride")),
    )


class NativeSampling:
    """Sampling on the pool of `context`; see `RowSampling`. Keeps the arrays it reads alive."""

    def __init__(self, context: Context, parameters: RowParameters) -> None:
        self._parameters = parameters
        self._arguments = Sampling(
            **{name: _address(getattr(parameters, name)) for name in _BY_ROW}
        )
        self._call = context.bind("sample", self._arguments)

    def sample(
        self,
        logits: Tensor,
        tokens: NDArray[np.int32],
        rows: NDArray[np.int64],
        history_lens: NDArray[np.int64],
        output_positions: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See `RowSampling.sample`."""
        count = len(logits)
        token_ids, valid = np.empty(count, np.int64), np.empty(count, np.bool_)
        arguments = self.arguments(logits, tokens, rows, history_lens, output_positions)
        arguments.token_ids, arguments.valid = _address(token_ids), _address(valid)
        self._call()
        return token_ids, valid

    def arguments(
        self,
        logits: Tensor,
        tokens: NDArray[np.int32],
        rows: NDArray[np.int64],
        history_lens: NDArray[np.int64],
        output_positions: NDArray[np.int64],
    ) -> Sampling:
        """The one struct of all calls, set but for where the results go."""
        if logits.dtype != torch.float32 or not logits.is_contiguous():
            raise ValueError("logits must be float32 and contiguous")
        arguments = self._arguments
        arguments.logits = logits.data_ptr()
        arguments.n, arguments.vocab = logits.shape
        arguments.tokens, arguments.token_stride = _address(tokens), tokens.shape[1]
        arguments.rows, arguments.history_lens = _address(rows), _address(history_lens)
        arguments.output_positions = _address(output_positions)
        return arguments


def _address(array: NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
