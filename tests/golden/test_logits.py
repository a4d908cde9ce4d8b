"""Logits of every family against `transformers` on the same weights.

Tolerances: in float32 only the order of summation differs, so 1e-4 for logits of a few units. In
bfloat16 both sides round, at slightly different places; the truth is float32 on the same rounded
weights, and our mean distance from it may be 1.2 times that of `transformers`, the largest twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.auto import AutoModelForCausalLM

from tests.golden.paged import paged
from tests.tiny import FAMILIES
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder

FP32_TOLERANCE = 1e-4
TOKENS = torch.randint(3, 512, (43,), generator=torch.Generator().manual_seed(7)).tolist()
OTHERS = torch.randint(3, 512, (29,), generator=torch.Generator().manual_seed(8)).tolist()

Checkpoints = Callable[..., Path]


def oracle(path: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_equal_transformers(family: str, tiny_checkpoint: Checkpoints) -> None:
    path = tiny_checkpoint(family)
    logits = paged(path).run(TOKENS, len(TOKENS))
    torch.testing.assert_close(logits, oracle(path, TOKENS), atol=FP32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_are_as_near_as_transformers(
    family: str, tiny_checkpoint: Checkpoints
) -> None:
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    truth = oracle(path, TOKENS)
    ours = (paged(path, torch.bfloat16).run(TOKENS, len(TOKENS)) - truth).abs()
    theirs = (oracle(path, TOKENS, torch.bfloat16) - truth).abs()
    print(f"{family}: mean {ours.mean():.4f} against {theirs.mean():.4f}, ", end="")
    print(f"largest {ours.max():.3f} against {theirs.max():.3f}")
    assert ours.mean() < 1.2 * theirs.mean()
    assert ours.max() < 2 * theirs.max()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_chunk_size_gives_the_same_logits(family: str, tiny_checkpoint: Checkpoints) -> None:
    path = tiny_checkpoint(family)
    expected = oracle(path, TOKENS)
    driver = paged(path)
    for chunk in range(1, len(TOKENS)):
        logits = driver.afresh(seed=chunk).run(TOKENS, chunk)
        torch.testing.assert_close(logits, expected, atol=FP32_TOLERANCE, rtol=0, msg=str(chunk))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_size", [1, 16])
def test_strangers_in_the_batch_change_nothing(
    family: str, block_size: int, tiny_checkpoint: Checkpoints
) -> None:
    """Prompts, decodes and single tokens of three sequences share each step."""
    path = tiny_checkpoint(family)
    driver = paged(path, num_seqs=3, block_size=block_size)
    one, two, three = TOKENS, OTHERS, TOKENS[::-1]
    got: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for rows in (
        [(0, one[:17])],
        [(0, one[17:18]), (1, two[:9])],
        [(1, two[9:10]), (0, one[18:19]), (2, three[:1])],
        [(2, three[1:2]), (0, one[19:20]), (1, two[10:11])],
        [(2, three[2:30]), (1, two[11:12]), (0, one[20:42])],
        [(0, one[42:]), (1, two[12:28]), (2, three[30:])],
        [(1, two[28:])],
    ):
        for (seq, _), logits in zip(rows, driver.step(rows), strict=True):
            got[seq].append(logits)
    for seq, tokens in enumerate((one, two, three)):
        torch.testing.assert_close(
            torch.cat(got[seq]), oracle(path, tokens), atol=FP32_TOLERANCE, rtol=0
        )


def test_windows_are_groups_of_their_own(tiny_checkpoint: Checkpoints) -> None:
    groups = paged(tiny_checkpoint("gemma3")).groups
    assert [(group.window, group.layers) for group in groups] == [(10, (0, 1, 3)), (None, (2,))]
    assert all(group.num_kv_heads == 2 and group.head_dim == 32 for group in groups)


@pytest.mark.parametrize("first", [1, 2])
def test_layer_ranges_compose_to_the_whole(first: int, tiny_checkpoint: Checkpoints) -> None:
    """Two stages with the pair between them give what one decoder gives."""
    path = tiny_checkpoint("gemma3")
    checkpoint, backend = open_checkpoint(str(path)), select("cpu")
    stages = [
        Decoder.build(checkpoint, backend, torch.float32, layers=part)
        for part in (range(first), range(first, 4))
    ]
    assert stages[0].head is None
    assert stages[1].embedding is None
    driver = paged(path)
    expected = driver.run(TOKENS, 11)

    def in_stages(batch, kv_caches):  # type: ignore[no-untyped-def]
        delta = stages[0].embedding.forward(batch.input_ids)
        pair = stages[0].run_layers(delta, torch.zeros_like(delta), batch, kv_caches[:first])
        pair = stages[1].run_layers(*pair, batch, kv_caches[first:])
        return stages[1].norm.add_forward(*pair)[0]

    driver = paged(path)
    driver.decoder.forward = in_stages  # type: ignore[method-assign]
    driver.decoder.logits = stages[1].logits  # type: ignore[method-assign]
    assert torch.equal(driver.run(TOKENS, 11), expected)
