"""A decoder on another device keeps everything there: no tensor is left in main memory.

The device is torch's `meta`, which computes shapes only, so every part is looked at as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import FAMILIES
from tgi_cli.kernels.backend import select
from tgi_cli.model.batch import Batch, GroupTables
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder


def tensors_in(part: object) -> Iterator[torch.Tensor]:
    """Every tensor that a part or its parts hold."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple | list):
        for item in part:
            yield from tensors_in(item)
    elif type(part).__module__.startswith("tgi_cli."):
        yield from tensors_in(list(vars(part).values()) if hasattr(part, "__dict__") else [])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_step_stays_on_its_device(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    meta = torch.device("meta")
    backend = replace(select("cpu"), device=meta)
    checkpoint = open_checkpoint(str(tiny_checkpoint(family)))
    decoder = Decoder.build(checkpoint, backend, torch.bfloat16)
    held = list(tensors_in(decoder))
    assert len(held) > 10
    assert {tensor.device for tensor in held} == {meta}
    caches = [
        backend.allocate_kv(
            9, 16, part.attention.num_kv_heads, part.attention.head_dim, torch.bfloat16
        )
        for part in checkpoint.spec.layers
    ]
    lens, keys = (1, 5, 1), (40, 37, 3)
    with meta:
        tables = GroupTables(
            slot_mapping=torch.zeros(7, dtype=torch.int64),
            block_tables=torch.zeros(3, 4, dtype=torch.int32),
        )
        batch = Batch(
            input_ids=torch.zeros(7, dtype=torch.int64),
            positions=torch.zeros(7, dtype=torch.int64),
            query_start=torch.zeros(4, dtype=torch.int32),
            seq_lens=torch.zeros(3, dtype=torch.int32),
            groups=(tables,) * len(checkpoint.spec.kv_groups),
            logit_rows=torch.zeros(3, dtype=torch.int64),
            adapter_slots=torch.zeros(3, dtype=torch.int32),
            query_lens=lens,
            key_lens=keys,
        )
    logits = decoder.logits(decoder.forward(batch, caches)[batch.logit_rows])
    assert (logits.device, logits.shape) == (meta, (3, 512))
