"""The native step program: near the truth, and equal bits however a batch is composed.

Truth is float32 on the same bfloat16 weights. The program keeps the residual stream in float32, so
its mean distance from the truth must not exceed that of `transformers` in bfloat16.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto import AutoModelForCausalLM

from tests.golden.native import Stepped
from tests.golden.paged import Paged, paged
from tests.tiny import FAMILIES
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.packed import PackedWeight, deinterleave, interleave
from tgi_cli.kernels.cpu.program import NativeStep, reason_against
from tgi_cli.kernels.kv_rows import KV_DTYPES
from tgi_cli.model.batch import Batch
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder

Checkpoints = Callable[..., Path]
LOADED = library.load()
VARIANTS = LOADED.variants() if LOADED else []
TOKENS = torch.randint(3, 512, (83,), generator=torch.Generator().manual_seed(7)).tolist()
OTHERS = torch.randint(3, 512, (29,), generator=torch.Generator().manual_seed(8)).tolist()

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


@pytest.fixture
def context() -> Iterator[library.Context]:
    assert LOADED is not None
    made = LOADED.context(VARIANTS[0], 2)
    yield made
    made.close()


def native(path: Path, context: library.Context, **options: Any) -> Paged:
    backend = select("cpu")
    decoder = Decoder.build(open_checkpoint(str(path)), backend, torch.bfloat16)
    assert reason_against(decoder) is None
    stepped = Stepped(NativeStep(context, decoder), decoder)
    options = {"block_size": 16, "max_len": 96, **options}
    return Paged(stepped, backend, torch.bfloat16, **options)  # type: ignore[arg-type]


def oracle(path: Path, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0].float()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_nearer_to_the_truth_than_transformers(
    family: str, variant: str, tiny_checkpoint: Checkpoints
) -> None:
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    assert LOADED is not None
    context = LOADED.context(variant, 1)
    ours = native(path, context).run(TOKENS, len(TOKENS))
    context.close()
    truth, theirs = oracle(path, torch.float32), oracle(path, torch.bfloat16)
    assert (ours - truth).abs().mean() <= (theirs - truth).abs().mean()
    assert (ours - truth).abs().max() <= 1.5 * (theirs - truth).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_threads_change_no_bit(
    family: str, context: library.Context, tiny_checkpoint: Checkpoints
) -> None:
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    driver = native(path, context)
    expected = driver.run(TOKENS, len(TOKENS))
    for chunk in (1, 2, 3, 5, 7, 16, 17, 31, 64, 82):
        assert torch.equal(driver.afresh(seed=chunk, block_size=16, max_len=96).run(TOKENS, chunk),
                           expected), chunk  # fmt: skip
    assert LOADED is not None
    single = LOADED.context(VARIANTS[0], 1)
    assert torch.equal(native(path, single).run(TOKENS, 13), expected)
    single.close()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_strangers_change_no_bit(
    family: str, context: library.Context, tiny_checkpoint: Checkpoints
) -> None:
    """Prompts, decodes and single tokens of many sequences share each step."""
    driver = native(tiny_checkpoint(family, dtype=torch.bfloat16), context, num_seqs=40)
    options = {"block_size": 16, "max_len": 96}
    alone = driver.afresh(**options).run(TOKENS, 83)
    stranger = driver.afresh(**options).run(OTHERS, 29)
    got: list[Tensor] = []
    for i, chunk in enumerate((40, 1, 1, 20, 1, 1, 19)):
        start = sum((40, 1, 1, 20, 1, 1, 19)[:i])
        rows = [(seq, OTHERS[4 * i : 4 * i + 1 + seq % 4]) for seq in range(1, 40) if seq % 4 == 3]
        rows.insert(i % 3, (0, TOKENS[start : start + chunk]))
        logits = driver.step(rows)
        got.append(logits[i % 3])
        for (seq, _), each in zip(rows, logits, strict=True):
            if seq == 3:
                assert torch.equal(each, stranger[4 * i : 4 * i + 4])
    assert torch.equal(torch.cat(got), alone)


@pytest.mark.parametrize("name", KV_DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_form_of_the_cache_is_rounded_as_the_oracle_rounds(
    family: str, name: str, context: library.Context, tiny_checkpoint: Checkpoints
) -> None:
    """It comes near float32 mathematics over a cache of the same form.

    Nearer than that is to no rounding: codes flip where rows differ in their last bits.
    """
    path, kv_dtype = tiny_checkpoint(family, dtype=torch.bfloat16), KV_DTYPES[name]
    options: dict[str, Any] = {"block_size": 16, "max_len": 96, "kv_dtype": kv_dtype}
    truth = paged(path, **options).run(TOKENS, len(TOKENS))
    exact = paged(path, block_size=16, max_len=96).run(TOKENS, len(TOKENS))
    ours = native(path, context, **options).run(TOKENS, len(TOKENS))
    plain = native(path, context).run(TOKENS, len(TOKENS))
    arithmetic, rounding = (plain - exact).abs().mean(), (truth - exact).abs().mean()
    assert (ours - truth).abs().mean() <= 1.3 * arithmetic + 0.7 * rounding


class Chosen:
    """A program that gives logits of `rows` alone, NaN for the others."""

    def __init__(self, step: NativeStep, decoder: Decoder) -> None:
        self.spec, self._step = decoder.spec, step
        self.rows: list[int] = []

    def forward(self, batch: Batch, caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        rows = torch.tensor(self.rows, dtype=torch.int64)
        asked = dataclasses.replace(batch, logit_rows=rows)
        full = torch.full((len(batch.input_ids), self.spec.vocab_size), torch.nan)
        full[rows] = self._step.logits(asked, caches, torch.empty(9, self.spec.vocab_size))
        return full

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_few_rows_are_those_of_all_rows(
    family: str, context: library.Context, tiny_checkpoint: Checkpoints
) -> None:
    """Rows that nobody wants are left out of the last layer, and no other bit changes."""
    backend = select("cpu")
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    decoder = Decoder.build(open_checkpoint(str(path)), backend, torch.bfloat16)
    step = NativeStep(context, decoder)
    few, options = Chosen(step, decoder), {"num_seqs": 3, "block_size": 16, "max_len": 96}
    asked = Paged(few, backend, torch.bfloat16, **options)  # type: ignore[arg-type]
    every = Paged(Stepped(step, decoder), backend, torch.bfloat16, **options)  # type: ignore[arg-type]
    for rows, wanted in (
        ([(0, TOKENS[:40])], []),
        ([(0, TOKENS[40:43]), (1, OTHERS[:7]), (2, OTHERS[:1])], [2, 7, 9, 10]),
        ([(0, TOKENS[43:44]), (1, OTHERS[7:8])], [0, 1]),
        ([(2, OTHERS[1:20]), (0, TOKENS[44:46])], [18, 19]),
    ):
        few.rows = wanted
        got, expected = torch.cat(asked.step(rows)), torch.cat(every.step(rows))
        assert torch.equal(got[wanted], expected[wanted])
        assert bool(got.isnan().all(-1).sum() == len(got) - len(wanted))


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (31, 64), (32, 16), (77, 130), (96, 48)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_matrices_multiply_and_unpack(rows: int, columns: int, variant: str) -> None:
    assert LOADED is not None
    context = LOADED.context(variant, 2)
    generator = torch.Generator().manual_seed(rows)
    dense = torch.randn((rows, columns), generator=generator).bfloat16()
    weight = PackedWeight.dense(context, dense)
    assert torch.equal(weight.dequantize(), dense)
    x = torch.randn((201, columns), generator=generator).bfloat16()
    full = weight.matmul(x, None)
    torch.testing.assert_close(full, (x.float() @ dense.float().T).bfloat16(), atol=2e-2, rtol=2e-2)
    for tokens in (1, 2, 5, 6, 7, 13, 95, 97):
        assert torch.equal(weight.matmul(x[:tokens], None), full[:tokens])
    if rows % 32 == 0:
        gated = PackedWeight.dense(context, dense, interleaved=True)
        assert torch.equal(gated.dequantize(), dense)
        assert torch.equal(gated.matmul(x, None), full)
    context.close()


def test_interleaving_alternates_runs_of_sixteen() -> None:
    rows = torch.arange(64)
    mixed = interleave(rows)
    assert mixed[:32].tolist() == [*range(16), *range(32, 48)]
    assert torch.equal(deinterleave(mixed), rows)


def test_other_dtypes_have_no_program(tiny_checkpoint: Checkpoints) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama")))
    decoder = Decoder.build(checkpoint, select("cpu"), torch.float32)
    assert reason_against(decoder) == "its dtype is float32"


def test_an_idle_pool_uses_no_cpu(context: library.Context) -> None:
    weight = PackedWeight.dense(context, torch.ones((512, 64), dtype=torch.bfloat16))
    weight.matmul(torch.ones((8, 64), dtype=torch.bfloat16), None)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_unknown_variants_are_refused() -> None:
    assert LOADED is not None
    with pytest.raises(ValueError, match="cannot run the `sse` kernels"):
        LOADED.context("sse", 1)
