"""A model divided over ranks against the same model whole.

In float32 only the order of summation differs. Native ranks keep sums in float32 as one process
does, so they stay as near to the truth as it; and for a fixed number of ranks bits do not depend on
chunks or strangers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from tests.formats.gguf_models import VOCAB, tiny_model, write_model
from tests.golden.native import Stepped
from tests.golden.paged import Paged, paged
from tests.golden.ranks import backend_of, on_ranks
from tests.tiny import FAMILIES
from tgi_cli.kernels.collective import Collective
from tgi_cli.kernels.cpu import library
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.quantize.formats.packed import GroupedWeight

TOKENS = torch.randint(3, 500, (43,), generator=torch.Generator().manual_seed(7)).tolist()
OTHERS = torch.randint(3, 500, (29,), generator=torch.Generator().manual_seed(8)).tolist()

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native kernels are not built")

Checkpoints = Callable[..., Path]


def composed(path: Path, world_size: int) -> list[Tensor]:
    """Logits of the Python composition on each rank, in float32."""

    def work(collective: Collective) -> Tensor:
        backend = backend_of(collective)
        decoder = Decoder.build(open_checkpoint(str(path)), backend, torch.float32)
        return Paged(decoder, backend, torch.float32).run(TOKENS, 11)

    return on_ranks(world_size, work)


def native(checkpoint: Checkpoint, world_size: int, run: Callable[[Paged], Tensor]) -> list[Tensor]:
    """What `run` gives with a native program on each rank, in bfloat16."""

    def work(collective: Collective) -> Tensor:
        backend = backend_of(collective)
        decoder = Decoder.build(checkpoint, backend, torch.bfloat16)
        step = backend.plan(decoder, 16)
        assert step is not None
        options = {"block_size": 16, "max_len": 96, "num_seqs": 4}
        return run(Paged(Stepped(step, decoder), backend, torch.bfloat16, **options))  # type: ignore[arg-type]

    return on_ranks(world_size, work)


@pytest.mark.parametrize("world_size", [2, 4])  # each with its own key/value heads, or shared ones
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compose_to_the_whole(
    family: str, world_size: int, tiny_checkpoint: Checkpoints
) -> None:
    if world_size == 4:
        path = tiny_checkpoint(family, intermediate_size=160)  # 5 units of 32: one rank has two
    else:
        path = tiny_checkpoint(family)
    whole = paged(path).run(TOKENS, 43)
    parts = composed(path, world_size)
    assert torch.equal(parts[0], parts[-1])
    assert (parts[0] - whole).abs().max() < 1e-4


def test_three_ranks_of_nine_heads(tiny_checkpoint: Checkpoints) -> None:
    """SmolLM2's heads; a vocabulary of 512 that three do not divide evenly."""
    path = tiny_checkpoint(
        "llama", num_attention_heads=9, num_key_value_heads=3, head_dim=16, hidden_size=144
    )
    whole = paged(path).run(TOKENS, 43)
    assert (composed(path, 3)[1] - whole).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "llama-biased-tied", "qwen2", "qwen3", "gemma3"])
def test_native_ranks_are_as_near_to_the_truth(family: str, tiny_checkpoint: Checkpoints) -> None:
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(str(path))

    def chunked(driver: Paged) -> Tensor:
        """Alone, in chunks, then again among strangers: all the same bits."""
        expected = driver.run(TOKENS, 43)
        fresh = driver.afresh(block_size=16, max_len=96, num_seqs=4)
        assert torch.equal(fresh.run(TOKENS, 5), expected)
        busy = driver.afresh(block_size=16, max_len=96, num_seqs=4)
        rows = [(3, OTHERS[:9]), (0, TOKENS[:30]), (1, OTHERS[9:])]
        got = [busy.step(rows)[1], busy.step([(0, TOKENS[30:]), (3, OTHERS[9:])])[0]]
        assert torch.equal(torch.cat(got), expected)
        return expected

    truth = paged(path, block_size=16, max_len=96).run(TOKENS, 43)
    alone = native(checkpoint, 1, chunked)[0]
    parts = native(checkpoint, 2, chunked)
    assert torch.equal(parts[0], parts[-1])
    error, usual = (parts[0] - truth).abs().mean(), (alone - truth).abs().mean()
    assert error <= 1.1 * usual


@pytest.mark.parametrize(
    ("family", "kind", "world_size"),
    [
        ("llama", Type.Q4_0, 2),
        ("llama-bias", Type.Q8_0, 2),
        ("qwen3", Type.Q5_1, 2),
        ("gemma3", Type.Q4_1, 2),
    ],
)
def test_blocks_stay_packed_on_ranks(
    family: str, kind: Type, world_size: int, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model(family), kind)
    checkpoint = open_checkpoint(str(path)).for_length(256).keeping_blocks()
    tokens = [token % VOCAB for token in TOKENS]

    def work(collective: Collective) -> Tensor:
        backend = backend_of(collective)
        decoder = Decoder.build(checkpoint, backend, torch.bfloat16)
        for layer in decoder.layers:
            for linear in (layer.attention.output, layer.mlp.gate_up, layer.mlp.down):
                assert isinstance(linear.weight, GroupedWeight)
        step = backend.plan(decoder, 16)
        assert step is not None
        stepped = Stepped(step, decoder)
        driver = Paged(stepped, backend, torch.bfloat16, block_size=16, max_len=96)  # type: ignore[arg-type]
        expected = driver.run(tokens, 43)
        assert torch.equal(driver.afresh(block_size=16, max_len=96).run(tokens, 4), expected)
        return expected

    truth = paged(path, block_size=16, max_len=96).run(tokens, 43)
    parts = on_ranks(world_size, work)
    assert torch.equal(parts[0], parts[1])
    assert (parts[0] - truth).abs().mean() <= 0.04 * truth.std()  # as for one rank
