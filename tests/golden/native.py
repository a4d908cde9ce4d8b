"""A native step program in the place of a decoder, for the paged driver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.golden.paged import Paged
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.program import NativeStep, reason_against
from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.model.decoder import Decoder


class Stepped:
    """A native program where the paged driver expects a decoder."""

    def __init__(self, step: NativeStep, decoder: Decoder) -> None:
        self.spec, self.logits = decoder.spec, decoder.logits
        self.forward = step


@contextmanager
def native(
    checkpoint: Checkpoint, *, variant: str | None = None, threads: int = 2, **options: Any
) -> Iterator[Paged]:
    """The driver of a native program of `checkpoint`, in the best variant or the given one."""
    loaded = library.load()
    assert loaded is not None
    context = loaded.context(variant or loaded.variants()[0], threads)
    backend = select("cpu")
    decoder = Decoder.build(checkpoint, backend, torch.bfloat16)
    assert reason_against(decoder) is None
    stepped = Stepped(NativeStep(context, decoder), decoder)
    options = {"block_size": 16, "max_len": 96, **options}
    yield Paged(stepped, backend, torch.bfloat16, **options)  # type: ignore[arg-type]
    context.close()
