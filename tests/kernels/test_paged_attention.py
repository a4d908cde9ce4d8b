"""`Ops.paged_attention` against naive dense attention: shapes, mixtures, windows, caps, sinks."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.dense_attention import dense_attention, make_case
from tgi_cli.kernels import reference
from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.kv_rows import KV_DTYPES

#: float32 differs by the order of summation; bfloat16 by one rounding of outputs of a few units.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]
#: (queries, keys) of each sequence.
LAYOUTS = {
    "one-token": [(1, 1)],
    "one-prompt": [(9, 9)],
    "chunk": [(5, 23)],
    "decodes": [(1, 8), (1, 11), (1, 16)],
    "uneven-decodes": [(1, 1), (1, 3), (1, 40), (1, 17), (1, 2)],
    "mixture": [(1, 30), (7, 7), (1, 5), (4, 21), (1, 29)],
}
HEADS = [(4, 4, 16), (4, 2, 16), (3, 1, 8)]  # query heads, key/value heads, head size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 6, 16, 100])
def test_equals_dense_attention(
    backend: Backend,
    dtype: torch.dtype,
    layout: str,
    heads: tuple[int, int, int],
    block_size: int,
    window: int | None,
) -> None:
    case = make_case(
        LAYOUTS[layout],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        block_size=block_size,
        dtype=dtype,
        window=window,
    )
    out = backend.ops.paged_attention(*case.arguments, scale=0.3, window=window)
    assert out.dtype == dtype
    expected = dense_attention(case, scale=0.3, window=window)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("with_slopes", [False, True])
def test_softcap_sinks_and_alibi(
    backend: Backend,
    layout: str,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    with_slopes: bool,
) -> None:
    case = make_case(
        LAYOUTS[layout],
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        block_size=4,
        dtype=torch.float32,
        window=window,
    )
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0]) if with_sinks else None
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if with_slopes else None
    options = {
        "scale": 1.0, "window": window, "softcap": softcap, "sinks": sinks, "slopes": slopes
    }  # fmt: skip
    out = backend.ops.paged_attention(*case.arguments, **options)
    expected = dense_attention(case, **options)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_form_of_the_cache(
    backend: Backend, layout: str, window: int | None, kv_dtype: str
) -> None:
    case = make_case(
        LAYOUTS[layout],
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        block_size=4,
        dtype=torch.float32,
        window=window,
        kv_dtype=KV_DTYPES[kv_dtype],
    )
    out = backend.ops.paged_attention(*case.arguments, scale=0.3, window=window)
    expected = dense_attention(case, scale=0.3, window=window)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)


def test_a_prompt_in_pieces(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention holds the scores, as with caps, a long prompt is taken in pieces."""
    case = make_case(
        [(70, 90), (1, 40)],
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        block_size=4,
        dtype=torch.float32,
        window=30,
    )
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    options = {"scale": 1.0, "window": 30, "softcap": 2.0, "sinks": None, "slopes": slopes}
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 4 * 90 * 16)
    out = backend.ops.paged_attention(*case.arguments, **options)
    torch.testing.assert_close(out.double(), dense_attention(case, **options), atol=2e-5, rtol=0)


def test_table_narrower_than_the_window(backend: Backend) -> None:
    """A window can reach over more columns than the table has."""
    case = make_case(
        [(1, 9), (1, 12)],
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        block_size=4,
        dtype=torch.float32,
    )
    case.block_tables = case.block_tables[:, :3].contiguous()
    out = backend.ops.paged_attention(*case.arguments, scale=1.0, window=10)
    expected = dense_attention(case, scale=1.0, window=10)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    case = make_case(
        [(1, 9), (3, 9)],
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        block_size=4,
        dtype=torch.float32,
    )
    out = backend.ops.paged_attention(*case.arguments, scale=1e4)
    assert torch.isfinite(out).all()
