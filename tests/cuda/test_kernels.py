"""Every operation of the reference backend on a GPU against the same on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.kernels.dense_attention import dense_attention, make_case
from tgi_cli.engine.draw import argmax, draw_dense, draw_gumbel
from tgi_cli.kernels import reference
from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.kv_rows import KV_DTYPES, decode, encode
from tgi_cli.kernels.philox import _gumbel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Of the largest magnitude: sums in another order, and one rounding of the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LAYOUTS = {
    "prompt": [(70, 70)],
    "chunk": [(5, 23)],
    "decodes": [(1, 8), (1, 11), (1, 16)],
    "mixture": [(1, 30), (7, 7), (1, 5), (4, 21), (1, 129)],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 6},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([-1.0, 0.0, 1.0, 3.0])},
    "slopes": {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "all": {
        "window": 20,
        "softcap": 2.0,
        "sinks": torch.tensor([-1.0, 0.0, 1.0, 3.0]),
        "slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
    },
}


def there(value: Any) -> Any:
    """The same on the GPU; in-place operations write there."""
    return tree_map(lambda each: each.cuda() if isinstance(each, Tensor) else each, value)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(ours: Tensor, expected: Tensor) -> None:
    assert ours.device.type == "cuda"
    assert ours.dtype == expected.dtype
    size = float(expected.abs().max())
    off = float((ours.cpu().double() - expected.double()).abs().max())
    assert off <= TOLERANCE[expected.dtype] * size, (off, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elementwise(dtype: torch.dtype, gpu: Backend, cpu: Backend) -> None:
    x, residual = random(37, 576).to(dtype), random(37, 576, seed=1).to(dtype)
    for weight in (random(576, seed=2).to(dtype), random(576, seed=2)):
        near(gpu.ops.rms_norm(*there((x, weight)), 1e-5), cpu.ops.rms_norm(x, weight, 1e-5))
        ours = gpu.ops.add_rms_norm(*there((x, residual, weight)), 1e-5)
        for mine, other in zip(ours, cpu.ops.add_rms_norm(x, residual, weight, 1e-5), strict=True):
            near(mine, other)
    near(gpu.ops.silu_mul(there(x)), cpu.ops.silu_mul(x))
    near(gpu.ops.gelu_tanh_mul(there(x)), cpu.ops.gelu_tanh_mul(x))
    ids = torch.tensor([3, 0, 36, 3])
    near(gpu.ops.embed(*there((ids, x)), 3.5), cpu.ops.embed(ids, x, 3.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype: torch.dtype, gpu: Backend, cpu: Backend) -> None:
    x, weight, bias = random(37, 576).to(dtype), random(192, 576).to(dtype), random(192).to(dtype)
    near(gpu.ops.linear(*there((x, weight, bias))), cpu.ops.linear(x, weight, bias))
    y, a, b = random(37, 192).to(dtype), random(8, 576).to(dtype), random(8, 192).to(dtype)
    rows = torch.tensor([0, 5, 36])
    ours = there(y)
    gpu.ops.lora_add(ours, *there((x, a, b)), 0.3, there(rows))
    cpu.ops.lora_add(y, x, a, b, 0.3, rows)
    near(ours, y)


def test_float32_is_no_tf32(gpu: Backend) -> None:
    """TF32 would be off by 3e-4 of the result."""
    x, weight = random(256, 4096), random(256, 4096, seed=1)
    exact = x.double() @ weight.double().T
    off = (gpu.ops.linear(*there((x, weight))).cpu().double() - exact).norm() / exact.norm()
    assert float(off) < 3e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_rope_and_store(dtype: torch.dtype, kv_dtype: str, gpu: Backend, cpu: Backend) -> None:
    q, k, v = (random(9, heads, 64, seed=heads).to(dtype) for heads in (6, 2, 2))
    table = random(40, 64).to(dtype)
    positions, slots = torch.arange(20, 29), torch.arange(9) * 3 + 5
    caches = cpu.allocate_kv(8, 4, 2, 64, KV_DTYPES[kv_dtype])
    on_gpu = gpu.allocate_kv(8, 4, 2, 64, KV_DTYPES[kv_dtype])
    rotated = there((q, k))
    gpu.ops.rope_store(*rotated, *there((v, table, positions)), *on_gpu, there(slots))
    cpu.ops.rope_store(q, k, v, table, positions, *caches, slots)
    for mine, other in zip(rotated, (q, k), strict=True):
        near(mine, other)
    values, expected = on_gpu[1].view(torch.uint8).cpu(), caches[1].view(torch.uint8)
    assert torch.equal(values, expected)  # values are stored as they come


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_rows_of_eight_bits_have_the_same_bits(kv_dtype: str) -> None:
    rows = random(4000, 64) * 10 ** random(4000, 1, seed=1)
    rows[7] = 0.0
    rows[8, 3] = torch.inf
    ours, expected = encode(rows.cuda(), KV_DTYPES[kv_dtype]), encode(rows, KV_DTYPES[kv_dtype])
    finite = torch.arange(4000) != 8
    assert torch.equal(ours.view(torch.uint8).cpu()[finite], expected.view(torch.uint8)[finite])
    assert decode(ours, 64)[8].isnan().all()
    assert torch.equal(decode(ours, 64).cpu()[finite], decode(expected, 64)[finite])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention(dtype: torch.dtype, layout: str, name: str, gpu: Backend) -> None:
    case = make_case(
        LAYOUTS[layout],
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=dtype,
        window=OPTIONS[name].get("window"),
    )
    expected = dense_attention(case, scale=0.3, **{**_NONE, **OPTIONS[name]})
    ours = gpu.ops.paged_attention(*there(case.arguments), scale=0.3, **there(OPTIONS[name]))
    off = (ours.cpu().double() - expected).abs().max()
    assert float(off) <= {torch.float32: 2e-5}.get(dtype, 2e-2)


_NONE = {"window": None, "softcap": None, "sinks": None, "slopes": None}


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_over_every_cache(kv_dtype: str, layout: str, gpu: Backend) -> None:
    case = make_case(
        LAYOUTS[layout],
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=torch.float32,
        kv_dtype=KV_DTYPES[kv_dtype],
    )
    ours = gpu.ops.paged_attention(*there(case.arguments), scale=0.3)
    expected = dense_attention(case, scale=0.3)
    assert float((ours.cpu().double() - expected).abs().max()) <= 2e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_in_pieces(name: str, gpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(
        [(200, 260)],
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
        dtype=torch.float32,
        window=OPTIONS[name].get("window"),
    )
    arguments, options = there(case.arguments), there(OPTIONS[name])
    whole = gpu.ops.paged_attention(*arguments, scale=0.3, **options)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 4 * 260 * 64)
    pieces = gpu.ops.paged_attention(*arguments, scale=0.3, **options)
    torch.testing.assert_close(pieces, whole, atol=2e-6, rtol=0)


def test_noise_is_that_of_the_cpu(gpu: Backend, cpu: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (40,), generator=generator)
    positions = torch.randint(0, 2**40, (40,), generator=generator)
    ids = torch.randint(0, 49152, (40, 17), generator=generator)
    ours = gpu.ops.gumbel_noise(*there((seeds, positions)), 49150)
    assert torch.equal(ours.cpu(), cpu.ops.gumbel_noise(seeds, positions, 49150))
    some = gpu.ops.gumbel_noise_at(*there((seeds, positions, ids)))
    assert torch.equal(some.cpu(), cpu.ops.gumbel_noise_at(seeds, positions, ids))


def test_noise_of_every_uniform() -> None:
    """The two logarithms of a GPU, rounded to float32, against the CPU's: all 2**23 values."""
    words = torch.arange(2**23, dtype=torch.int64) << 9
    ours, expected = _gumbel(words.cuda()).cpu(), _gumbel(words)
    different = (ours != expected).nonzero().flatten().tolist()
    assert set(different) <= {3085996}  # see `Ops.gumbel_noise`


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_draws_are_those_of_the_cpu(scale: float, gpu: Backend, cpu: Backend) -> None:
    logits = random(64, 49152) * scale
    logits[3, 5:] = -torch.inf
    seeds, positions = torch.arange(64) * 977 - 5, torch.arange(64) % 7
    drawn = draw_gumbel(*there((logits, seeds, positions)), gpu.ops)
    assert torch.equal(drawn.cpu(), draw_gumbel(logits, seeds, positions, cpu.ops))
    assert torch.equal(drawn, draw_dense(*there((logits, seeds, positions)), gpu.ops))


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(5, 1000)
    logits[0, [999, 500, 3]] = 2.0
    logits[1, 700] = torch.nan
    logits[2, 255:257] = 1.0
    logits[4] = -torch.inf
    assert argmax(logits.cuda()).tolist() == [3, 700, 255, 0, 0]
