"""Norms, activations, embedding, linear, rotation and store, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tgi_cli.kernels.backend import Backend

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 8), (5, 64), (3, 4, 16)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_rms_norm_is_llamas_with_a_weight_in_its_dtype(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    norm = LlamaRMSNorm(shape[-1], eps=1e-3).to(dtype)
    norm.weight.copy_(normal(shape[-1], seed=1))
    x = normal(*shape, dtype=dtype) * 3
    assert torch.equal(backend.ops.rms_norm(x, norm.weight, 1e-3), norm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_rms_norm_is_gemmas_with_a_float32_weight(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    norm = Gemma3RMSNorm(shape[-1], eps=1e-3).to(dtype)
    norm.weight.copy_(normal(shape[-1], seed=1))
    x = normal(*shape, dtype=dtype) * 3
    weight = 1.0 + norm.weight.float()
    assert torch.equal(backend.ops.rms_norm(x, weight, 1e-3), norm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_rounds_the_sum_first(backend: Backend, dtype: torch.dtype) -> None:
    x, residual, weight = (normal(5, 64, dtype=dtype, seed=seed) for seed in range(3))
    normed, summed = backend.ops.add_rms_norm(x, residual, weight[0], 1e-5)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, backend.ops.rms_norm(summed, weight[0], 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_activations(backend: Backend, dtype: torch.dtype) -> None:
    gate_up = normal(5, 32, dtype=dtype) * 2
    gate, up = gate_up.double().chunk(2, -1)
    silu = gate / (1 + torch.exp(-gate)) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    gelu = 0.5 * gate * (1 + torch.tanh(inner)) * up
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-1}[dtype]
    for name, expected in (("silu_mul", silu), ("gelu_tanh_mul", gelu)):
        out = getattr(backend.ops, name)(gate_up)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_and_embed(backend: Backend, dtype: torch.dtype) -> None:
    x, weight, bias = normal(3, 8, dtype=dtype), normal(6, 8, dtype=dtype), normal(6, dtype=dtype)
    expected = x.double() @ weight.double().T
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    out = backend.ops.linear(x, weight)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    out = backend.ops.linear(x, weight, bias)
    torch.testing.assert_close(out.double(), expected + bias.double(), atol=tolerance, rtol=0)
    ids = torch.tensor([5, 0, 5])
    assert torch.equal(backend.ops.embed(ids, weight), weight[ids])
    assert torch.equal(backend.ops.embed(ids, weight, 3.0), weight[ids] * 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_store_rotates_like_transformers_and_stores(
    backend: Backend, dtype: torch.dtype
) -> None:
    tokens, heads, kv_heads, head_dim = 7, 4, 2, 16
    qkv = normal(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = (part.clone() for part in qkv.split([heads, kv_heads, kv_heads], dim=1))
    positions = torch.tensor([0, 3, 11, 2, 19, 7, 7])
    frequencies = 1.0 / 100.0 ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(20)[:, None] * frequencies
    table = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
    cos, sin = (torch.cat([part, part], -1)[positions] for part in table.chunk(2, -1))
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)

    k_cache = torch.zeros(5, 4, kv_heads, head_dim, dtype=dtype)
    v_cache = torch.zeros_like(k_cache)
    slots = torch.tensor([19, 4, 7, 8, 13, 5, 6])
    views = qkv.split([heads, kv_heads, kv_heads], dim=1)
    backend.ops.rope_store(*views, table, positions, k_cache, v_cache, slots)
    assert torch.equal(views[0], expected_q)
    assert torch.equal(views[1], expected_k)
    assert torch.equal(k_cache.flatten(0, 1)[slots], expected_k)
    assert torch.equal(v_cache.flatten(0, 1)[slots], v)
    untouched = [slot for slot in range(20) if slot not in slots.tolist()]
    assert not k_cache.flatten(0, 1)[untouched].any()
    assert not v_cache.flatten(0, 1)[untouched].any()


def test_rope_store_leaves_what_a_narrow_table_does_not_cover(backend: Backend) -> None:
    q, k = normal(2, 1, 8), normal(2, 1, 8, seed=1)
    before = q.clone(), k.clone()
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1]])
    table = torch.cat([angles.cos(), angles.sin()], -1)
    cache = torch.zeros(1, 2, 1, 8)
    backend.ops.rope_store(
        q, k, k.clone(), table, torch.tensor([1, 1]), cache, cache.clone(), torch.tensor([0, 1])
    )
    for after, original in zip((q, k), before, strict=True):
        assert torch.equal(after[..., 4:], original[..., 4:])
        assert not torch.equal(after[..., :4], original[..., :4])
