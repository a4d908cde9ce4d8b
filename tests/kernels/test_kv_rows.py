"""Rows of the KV cache: what rounding costs, and that the native store gives the oracle's bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.kv_blocks import native_blocks
from tgi_cli.cli.launch_flags import WORKING
from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.library import BLOCK, RopeStore, pointer
from tgi_cli.kernels.cpu.program import KV_FORMS
from tgi_cli.kernels.kv_rows import KV_ALIASES, KV_DTYPES, decode, encode, kv_dtype_name, row_width

LOADED = library.load()
VARIANTS = LOADED.variants() if LOADED else []
#: Largest error relative to the number itself (floats), or to the row's largest (int8).
ERRORS = {
    "bfloat16": 2**-8,
    "float16": 2**-11,
    "float32": 0.0,
    "int8": 0.5001 / 127,
    "fp8_e4m3": 2**-4,
    "fp8_e5m2": 2**-3,
}


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    """Rows of magnitudes from 1e-2 to 1e2, with an outlier in each."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator)
    rows[..., 3] *= 30
    return rows * 10 ** (4 * torch.rand((*shape[:-1], 1), generator=generator) - 2)


@pytest.mark.parametrize("name", KV_DTYPES)
def test_rounding_is_to_the_nearest(name: str) -> None:
    rows = random_rows(50, 3, 64)
    cached = encode(rows, KV_DTYPES[name])
    assert cached.shape == (50, 3, row_width(64, KV_DTYPES[name]))
    back = decode(cached, 64).double()
    largest = rows.abs().amax(-1, keepdim=True).double()
    relative = largest if name == "int8" else rows.abs().double()
    # Small numbers count as zero in 8-bit floats, and are subnormal in 16 bits.
    floor = largest * 2**-14 if name.startswith("fp8") else 2**-25 if name == "float16" else 0.0
    assert bool(((back - rows.double()).abs() <= relative * ERRORS[name] + floor).all())
    if KV_DTYPES[name].itemsize == 1:  # the largest is kept whatever it is
        torch.testing.assert_close(back.abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", KV_DTYPES)
def test_zeros_are_exact_and_what_is_not_finite_stays_so(name: str) -> None:
    rows = torch.zeros(4, 32)
    rows[1, 5], rows[2, 6] = torch.nan, torch.inf
    rows[3] = 1e-40
    back = decode(encode(rows, KV_DTYPES[name]), 32)
    assert torch.equal(back[0], rows[0])
    assert bool((~back[1:3].isfinite()).any(-1).all())
    assert bool(back[3].isfinite().all())


def test_names_are_those_of_the_flag() -> None:
    [setting] = [each for each in WORKING if each.name == "kv_cache_dtype"]
    assert set(setting.choices) == {"auto", *KV_DTYPES, *KV_ALIASES}
    assert [kv_dtype_name(dtype) for dtype in KV_DTYPES.values()] == list(KV_DTYPES)
    assert set(KV_ALIASES.values()) <= set(KV_DTYPES)


@pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", KV_DTYPES)
def test_native_store_writes_what_the_oracle_writes(
    backend: Backend, name: str, variant: str
) -> None:
    """The same bytes, in the native order, in the slots of the step and in no other."""
    dtype, heads, kv_heads, dim, tokens = KV_DTYPES[name], 2, 3, 48, 29
    qkv = random_rows(tokens, heads + 2 * kv_heads, dim)
    table = torch.cat([torch.ones(5, dim // 2), torch.zeros(5, dim // 2)], -1)  # turns by nothing
    slots = torch.randperm(4 * BLOCK, generator=torch.Generator().manual_seed(1))[:tokens]
    q, k, v = (part.clone() for part in qkv.split([heads, kv_heads, kv_heads], dim=1))
    shape = (4, BLOCK, kv_heads, row_width(dim, dtype))
    expected = [torch.zeros(shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype)
                for _ in range(2)]  # fmt: skip
    positions = torch.arange(tokens) % 5
    backend.ops.rope_store(q, k, v, table, positions, *expected, slots)
    caches = [torch.zeros(4, kv_heads, BLOCK * shape[-1] * dtype.itemsize, dtype=torch.uint8)
              for _ in range(2)]  # fmt: skip
    queries = torch.empty(tokens, heads, dim, dtype=torch.bfloat16)
    assert LOADED is not None
    context = LOADED.context(variant, 2)
    context.call(
        "rope_store",
        RopeStore(
            pointer(qkv), pointer(table), None, None, pointer(positions), pointer(slots),
            pointer(queries), *map(pointer, caches), tokens, heads, kv_heads, dim, dim, 1e-5,
            KV_FORMS[dtype],
        ),
    )  # fmt: skip
    context.close()
    for cache, rows, keys in zip(caches, expected, (True, False), strict=True):
        wanted = native_blocks(rows.flatten(0, 1), dim, keys=keys)
        wanted[wanted == 0x80] = 0 if name.startswith("fp8") else 0x80  # either sign of zero
        cache[cache == 0x80] = 0 if name.startswith("fp8") else 0x80
        assert torch.equal(cache, wanted)
