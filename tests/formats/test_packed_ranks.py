"""Every packed format on several ranks: the answers of one, as much memory as planned, refusals.

Matrices are cut by rows (q, k, v, gate, up) and by columns (output, down), the latter into unequal
numbers of groups. Ranks are threads over the real shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formats.packed_models import write_pair
from tests.formats.test_packed_by_others import (
    BITSANDBYTES,
    COMPRESSED,
    write_bitsandbytes,
    write_compressed,
)
from tests.formats.test_packed_formats import CASES, NEAR, NEARER
from tests.golden.native import Stepped
from tests.golden.paged import Paged
from tests.golden.ranks import backend_of, on_ranks
from tests.tiny import make_checkpoint
from tgi_cli.errors import UsageError
from tgi_cli.kernels.collective import Collective
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.packed import PackedWeight
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.quantize.formats.at_load import METHODS
from tgi_cli.quantize.formats.dense import DenseWeight
from tgi_cli.quantize.formats.packed import GroupedWeight

pytestmark = [
    pytest.mark.skipif(library.load() is None, reason="the native kernels are not built"),
    pytest.mark.filterwarnings("ignore"),  # bitsandbytes warns of kernels it cannot fetch
]

PROMPT = torch.randint(3, 512, (21,), generator=torch.Generator().manual_seed(5)).tolist()
COUNT = 12
LENGTH = 64
#: 16 heads of 32, and five groups of 128 features, of which one rank has one more than others.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 640,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
#: Blocks of 48 inputs fit a multiple of three heads.
RAGGED = {**SIZES, "hidden_size": 192, "num_attention_heads": 12}
SMALL = ("gptq-sym", "gptq-asym", "gptq-act-order", "awq-128", "fp8-block", "mxfp4")

Opened = Callable[[Path], Checkpoint]


def by_packer(name: str) -> Opened:
    def made(folder: Path) -> Checkpoint:
        packer, config, _ = CASES[name]
        sizes = RAGGED if name == "fp8-ragged-block" else SIZES
        return open_checkpoint(str(write_pair(folder, packer, config, **sizes)[0]))

    return made


def by_compressed_tensors(name: str) -> Opened:
    # Its blocks of 128 rows need as many of keys and values.
    sizes = {**SIZES, "num_key_value_heads": 4}
    return lambda folder: open_checkpoint(str(write_compressed(folder, name, **sizes)[0]))


def by_bitsandbytes(name: str) -> Opened:
    return lambda folder: open_checkpoint(str(write_bitsandbytes(folder, name, **SIZES)[0]))


def at_load(method: str) -> Opened:
    def made(folder: Path) -> Checkpoint:
        path = make_checkpoint(folder / "dense", "llama", dtype=torch.bfloat16, **SIZES)
        return open_checkpoint(str(path)).quantized_at_load(method)

    return made


ALL: dict[str, Opened] = {
    **{name: by_packer(name) for name in CASES},
    **{f"compressed-{name}": by_compressed_tensors(name) for name in COMPRESSED},
    **{f"bitsandbytes-{name}": by_bitsandbytes(name) for name in BITSANDBYTES},
    **{f"at-load-{method}": at_load(method) for method in METHODS},
}


def greedy(driver: Paged, chunk: int) -> tuple[list[int], Tensor]:
    """Tokens that follow the prompt, and the logits they were drawn from."""
    logits = [driver.run(PROMPT, chunk)[-1]]
    for _ in range(COUNT - 1):
        logits.append(driver.step([(0, [int(logits[-1].argmax())])])[0][-1])
    return [int(each.argmax()) for each in logits], torch.stack(logits)


def composed(checkpoint: Checkpoint, world_size: int) -> list[tuple[list[int], Tensor]]:
    """By the Python composition in float32, on each rank."""

    def work(collective: Collective) -> tuple[list[int], Tensor]:
        backend = backend_of(collective)
        decoder = Decoder.build(checkpoint, backend, torch.float32)
        return greedy(Paged(decoder, backend, torch.float32, max_len=LENGTH), 21)

    return on_ranks(world_size, work)


def native(checkpoint: Checkpoint, world_size: int) -> list[tuple[list[int], Tensor]]:
    """By a native program, on each rank; in chunks of any size the bits are the same."""

    def work(collective: Collective) -> tuple[list[int], Tensor]:
        backend = backend_of(collective)
        decoder = Decoder.build(checkpoint, backend, torch.bfloat16)
        step = backend.plan(decoder, 16)
        assert step is not None
        planned = checkpoint.weights_bytes(
            torch.bfloat16, checkpoint.partition(collective.rank, world_size)
        )
        assert held(decoder, checkpoint) == planned
        options = {"block_size": 16, "max_len": LENGTH}
        driver = Paged(Stepped(step, decoder), backend, torch.bfloat16, **options)  # type: ignore[arg-type]
        found = greedy(driver, 21)
        assert torch.equal(greedy(driver.afresh(**options), 4)[1], found[1])
        return found

    return on_ranks(world_size, work)


def held(decoder: Any, checkpoint: Checkpoint) -> int:
    """Bytes of a rank's weights, as they lie in memory."""
    linears = [
        linear.weight
        for layer in decoder.layers
        for linear in (
            layer.attention.qkv,
            layer.attention.output,
            layer.mlp.gate_up,
            layer.mlp.down,
        )
    ]
    linears.append(decoder.head.weight)
    assert all(isinstance(weight, PackedWeight) for weight in linears)
    spec, table = checkpoint.spec, decoder.embedding
    norms = (2 * len(spec.layers) + 1) * spec.hidden_size * 2
    ropes = spec.max_positions * spec.layers[0].attention.head_dim * 2
    rows = table.weight.nbytes if hasattr(table, "weight") else table.table.nbytes
    return sum(weight.nbytes for weight in linears) + rows + norms + ropes


@pytest.mark.parametrize(
    ("name", "world_size"), [*((name, 2) for name in ALL), *((name, 4) for name in SMALL)]
)
def test_ranks_answer_as_one(name: str, world_size: int, tmp_path: Path) -> None:
    checkpoint = ALL[name](tmp_path).for_length(LENGTH)
    ((expected, truth),) = composed(checkpoint, 1)
    close = 1e-5 * float(truth.abs().max())
    for tokens, logits in composed(checkpoint, world_size):
        assert tokens == expected
        torch.testing.assert_close(logits, truth, rtol=0, atol=close)
    kept = checkpoint.keeping_blocks()
    ((usual, alone),) = native(kept, 1)
    found = native(kept, world_size)
    assert all(torch.equal(logits, found[0][1]) for _, logits in found)
    near = (NEAR if kept.rounds_activations else NEARER) * float(truth.std())
    agree(usual, alone, *found[0], near)


def agree(
    usual: Sequence[int], alone: Tensor, tokens: Sequence[int], logits: Tensor, near: float
) -> None:
    """Logits of the same context differ by `near` in the mean, and the first other token of both
    was as likely but for a few times that."""
    pairs = zip(usual, tokens, strict=True)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    same = slice(None) if at is None else slice(at + 1)
    error = float((logits[same] - alone[same]).abs().mean())
    gap = 0.0 if at is None else float(alone[at, usual[at]] - alone[at, tokens[at]])
    print(f"mean error {error:.4f} of {near:.4f}, first other token {at}, gap {gap:.4f}")
    assert error <= near
    assert gap <= 5 * near


@pytest.mark.parametrize(
    ("name", "sizes", "world_size", "reason", "hint"),
    [
        (
            "awq-128",
            {"intermediate_size": 1024},
            8,
            "the 2 of 16 heads of a shard have 64 features, "
            "and `model.layers.0.self_attn.o_proj` is quantized in groups of 128",
            "use --num-shard 4 (1, 2 and 4 work)",
        ),
        (
            "fp8-block",
            {"intermediate_size": 384},
            4,
            "its 384 feed-forward features are shared out 128 at a time",
            "use --num-shard 2 (1 and 2 work)",
        ),
        (
            "fp8-ragged-block",
            {"num_attention_heads": 4},
            2,
            "the 2 of 4 heads of a shard have 64 features, "
            "and `model.layers.0.self_attn.o_proj` is quantized in groups of 48",
            "leave --num-shard away: no number of shards works for this model",
        ),
        (
            "mxfp4",
            {"head_dim": 16, "num_key_value_heads": 16},
            16,
            "the 1 of 16 heads of a shard have 16 features, "
            "and `model.layers.0.self_attn.o_proj` is quantized in groups of 32",
            "use --num-shard 8 (1, 2, 4 and 8 work)",
        ),
    ],
)
def test_groups_that_do_not_divide_are_named(
    name: str, sizes: dict[str, int], world_size: int, reason: str, hint: str, tmp_path: Path
) -> None:
    packer, config, _ = CASES[name]
    packed, _ = write_pair(tmp_path, packer, config, **{**SIZES, **sizes})
    checkpoint = open_checkpoint(str(packed)).keeping_blocks()
    with pytest.raises(UsageError) as caught:
        checkpoint.partition(0, world_size)
    assert caught.value.message.endswith(reason)
    assert caught.value.hint == hint


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_orders_that_reach_into_other_shards_are_planned_as_dense(
    world_size: int, tmp_path: Path
) -> None:
    """The inputs of a group lie on every rank; a rank has too few of each to multiply them so."""
    packer, config, _ = CASES["gptq-act-order"]
    packed, _ = write_pair(tmp_path, packer, config, **SIZES)
    checkpoint = open_checkpoint(str(packed)).keeping_blocks()

    def work(collective: Collective) -> None:
        layer = Decoder.build(checkpoint, backend_of(collective), torch.bfloat16).layers[0]
        cut = DenseWeight if world_size > 1 else GroupedWeight
        assert isinstance(layer.attention.output.weight, cut)
        assert isinstance(layer.mlp.down.weight, cut)
        assert isinstance(layer.attention.qkv.weight, GroupedWeight)
        assert isinstance(layer.mlp.gate_up.weight, GroupedWeight)

    on_ranks(world_size, work)
