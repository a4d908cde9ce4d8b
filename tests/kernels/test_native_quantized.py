"""Grouped 8- and 4-bit matrices: packed without loss, multiplied exactly but for fp32 sums."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor

from tests.kernels.grouped_weights import RandomGroups, exact_product, magnitude, minima_of
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.library import Gemm, pointer
from tgi_cli.kernels.cpu.packed import FORMS, PackedWeight, interleave, matrix_bytes
from tgi_cli.kernels.grouped import (
    INT4,
    INT4_MINIMUM,
    INT8,
    MXFP4,
    GroupedRows,
    GroupScheme,
    wide,
)
from tgi_cli.quantize.formats.mxfp4 import mxfp4_matrix
from tgi_cli.quantize.formats.packed import GroupedWeight

LOADED = library.load()
VARIANTS = LOADED.variants() if LOADED else []
WIDE = [wide(bits, group, minimum=minimum) for bits, group, minimum in
        ((4, 64, True), (4, 32, False), (8, 96, False), (8, 32, True))]  # fmt: skip
FLOATS = [MXFP4, *(wide(4, 32, codes=codes) for codes in ("nf4", "fp4", "e2m1"))]
FLOATS += [wide(4, 64, codes="nf4"), wide(8, 96, codes="e4m3"), wide(8, 32, codes="e4m3")]
INTEGERS = [scheme for scheme in FORMS if scheme.codes == "integer"]
SCHEMES = [*INTEGERS, *WIDE]
# Further groups of bf16 activations' kernels: 128 and whole rows.
ROW_WIDE = [wide(8, 576, codes="e4m3"), wide(4, 576, codes="nf4"), wide(8, 160), wide(4, 64)]
BF16_ACTIVATIONS = [s for s in (*SCHEMES, *FLOATS) if 192 % s.group == 0]
SHAPES = [(1, 32), (31, 64), (32, 96), (77, 160), (96, 576), (2080, 32)]
ROWS = 200
ADD_FLOAT, SILU_MUL, GELU_MUL = 2, 3, 4

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


@pytest.fixture(params=VARIANTS)
def context(request: pytest.FixtureRequest) -> Iterator[library.Context]:
    assert LOADED is not None
    made = LOADED.context(request.param, 2)
    yield made
    made.close()


def name_of(scheme: GroupScheme) -> str:
    kind = "minimum" if scheme.minimum else "zero"
    kind = f"{scheme.codes}{scheme.bits}-{scheme.group}-{kind}"
    return f"{kind}-{str(scheme.scale).removeprefix('torch.')}"


def cases(schemes: list[GroupScheme]) -> list[ParameterSet]:
    """Schemes with the shapes whose inputs their groups divide."""
    return [
        pytest.param(scheme, shape, id=f"{name_of(scheme)}-{shape}")
        for scheme in schemes
        for shape in SHAPES
        if shape[1] % scheme.group == 0
    ]


def activations(columns: int) -> Tensor:
    x = torch.randn((ROWS, columns), generator=torch.Generator().manual_seed(columns))
    x[3, :32] = 0
    x[4, ::2] *= 100
    x[5] *= 1e-20
    return x.bfloat16()


@pytest.mark.parametrize(("scheme", "shape"), cases([*SCHEMES, *FLOATS]))
def test_packing_loses_nothing(
    scheme: GroupScheme, shape: tuple[int, int], context: library.Context
) -> None:
    weight = RandomGroups(scheme, *shape)
    assert isinstance(weight, GroupedRows)
    packed = PackedWeight.grouped(context, weight)
    dense = weight.dequantize()
    assert torch.equal(packed.dequantize(), dense)
    assert packed.nbytes == matrix_bytes(scheme, *shape)
    ids = torch.tensor([0, shape[0] - 1, shape[0] // 2])
    assert torch.equal(packed.embed(ids, 0.5), dense[ids] * 0.5)
    if shape[0] % 32 == 0:
        mixed = PackedWeight.grouped(context, weight, interleaved=True)
        assert torch.equal(mixed.dequantize(), dense)
        x = activations(shape[1])
        assert torch.equal(mixed.matmul(x, None), packed.matmul(x, None))


@pytest.mark.parametrize(("scheme", "shape"), cases(SCHEMES))
def test_products_equal_the_integer_model(
    scheme: GroupScheme, shape: tuple[int, int], context: library.Context
) -> None:
    weight = RandomGroups(scheme, *shape)
    packed = PackedWeight.grouped(context, weight)
    x = activations(shape[1])
    found = packed.matmul_float(x)
    # One rounding for each group's scale and sum, and one for each addition.
    groups = shape[1] // 16
    error = (found - exact_product(x, weight)).abs()
    assert (error <= (groups + 4) * 2.0**-24 * magnitude(x, weight)).all()
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 13, 95, 96, 97):
        assert torch.equal(packed.matmul_float(x[:tokens]), found[:tokens]), tokens
    assert torch.equal(packed.matmul_float(x[7:100]), found[7:100])


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if 576 % s.group == 0], ids=name_of)
def test_threads_and_instruction_sets_change_no_bit(scheme: GroupScheme) -> None:
    assert LOADED is not None
    weight, x = RandomGroups(scheme, 300, 576), activations(576)
    results = []
    for variant in VARIANTS:
        for threads in (1, 2, 3):
            context = LOADED.context(variant, threads)
            results.append(PackedWeight.grouped(context, weight).matmul_float(x))
            context.close()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("scheme", "shape"), cases([*SCHEMES, *FLOATS, *ROW_WIDE]))
def test_bf16_activations_multiply_by_the_numbers_themselves(
    scheme: GroupScheme, shape: tuple[int, int], context: library.Context
) -> None:
    weight = RandomGroups(scheme, *shape)
    packed = PackedWeight.grouped(context, weight, wide_activations=True)
    x = activations(shape[1])
    found = packed.matmul_float(x)
    dense = weight.dequantize().double()
    error = (found - x.double() @ dense.T).abs()
    # Two inputs are added with one or two roundings, which arm64 does not make to nearest, a group
    # with two; minima cancel what was added.
    summands = x.double().abs() @ dense.abs().T
    if scheme.minimum:
        summands += 2 * x.double().abs() @ minima_of(weight).T
    relative = (shape[1] + 8) * 2.0**-23
    if scheme.codes == "nf4":
        relative += 2.0**-9  # alone no bf16 numbers
    assert (error <= relative * summands).all()
    for tokens in (*range(1, 18), 95, 96, 97, 128, 129):
        assert torch.equal(packed.matmul_float(x[:tokens]), found[:tokens]), tokens
    assert torch.equal(packed.matmul_float(x[7:100]), found[7:100])


@pytest.mark.parametrize("scheme", BF16_ACTIVATIONS, ids=name_of)
def test_threads_change_no_bit_with_bf16_activations(scheme: GroupScheme) -> None:
    assert LOADED is not None
    weight, x = RandomGroups(scheme, 300, 576), activations(576)
    for variant in VARIANTS:
        results = []
        for threads, tokens in itertools.product((1, 2, 3), (1, 4, 9, ROWS)):
            context = LOADED.context(variant, threads)
            packed = PackedWeight.grouped(context, weight, wide_activations=True)
            results.append(packed.matmul_float(x[:tokens])[:1])
            context.close()
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize(
    ("codes", "bits"),
    [("nf4", 4), ("fp4", 4), ("e2m1", 4), ("e4m3", 8), ("integer", 4), ("integer", 8)],
)
def test_every_code_is_its_number(
    codes: str, bits: int, tokens: int, context: library.Context
) -> None:
    """Each input meets one code alone, subnormals and both zeros among them."""
    scheme = wide(bits, 32, codes=codes)
    weight = RandomGroups(scheme, 256, 32)
    every = torch.arange(256).view(-1, 1) + 5 * torch.arange(32)
    every %= 1 << bits
    if codes == "e4m3":
        every[every % 128 == 127] = 0  # NaN
    weight.replace(every.byte(), torch.ones(256, 1))
    packed = PackedWeight.grouped(context, weight, wide_activations=True)
    x = torch.eye(32).repeat(2, 1)[:tokens].bfloat16()
    expected = weight.dequantize().T.repeat(2, 1)[:tokens]
    tolerance = 2.0**-9 if codes == "nf4" else 2.0**-23 if codes == "fp4" else 0
    torch.testing.assert_close(packed.matmul_float(x), expected, atol=0, rtol=tolerance)


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_every_exponent_of_mxfp4_is_its_power(tokens: int, context: library.Context) -> None:
    """E8M0 from 2^-127, which is subnormal, to 2^127, with every code."""
    exponents = torch.arange(255, dtype=torch.uint8).repeat_interleave(16).view(-1, 1)
    halves = (torch.arange(len(exponents)) % 16).byte().view(-1, 1).expand(-1, 16)
    weight = GroupedWeight([mxfp4_matrix("", halves * 17, exponents)], torch.bfloat16)
    assert weight.scheme == MXFP4
    values = MXFP4.values(halves[:, :1]).double()
    expected = values * 2.0 ** (exponents.double() - 127)
    # 2^127 times more than 1.5 is beyond float32.
    expected = expected.float().expand(-1, 32)
    packed = PackedWeight.grouped(context, weight)
    for found in (weight.dequantize(), packed.dequantize()):
        assert torch.equal(found, expected)
    assert torch.equal(packed.embed(torch.arange(len(exponents)), 1.0), expected)
    x = torch.eye(32).repeat(2, 1)[:tokens].bfloat16()
    assert torch.equal(packed.matmul_float(x), expected[:, :1].T.expand(tokens, -1))


@pytest.mark.parametrize("scheme", BF16_ACTIVATIONS, ids=name_of)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_bf16_activations_that_are_not_finite_spoil_their_row_alone(
    scheme: GroupScheme, tokens: int, context: library.Context
) -> None:
    packed = PackedWeight.grouped(context, RandomGroups(scheme, 64, 192), wide_activations=True)
    x = activations(192)[:tokens]
    clean = packed.matmul_float(x)
    x[0, 40] = torch.nan
    found = packed.matmul_float(x)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], clean[1:])


@pytest.mark.parametrize("scheme", [*SCHEMES, *FLOATS], ids=name_of)
@pytest.mark.parametrize("wide", [False, True])
def test_inputs_out_of_order_are_gathered(
    scheme: GroupScheme, wide: bool, context: library.Context
) -> None:
    columns = -(-128 // scheme.group) * scheme.group
    plain, ordered = RandomGroups(scheme, 96, columns), RandomGroups(scheme, 96, columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    ordered.order = order
    first, other = (
        PackedWeight.grouped(context, weight, wide_activations=wide) for weight in (ordered, plain)
    )
    for tokens in (1, 5, 97):
        x = activations(columns)[:tokens]
        wanted = other.matmul_float(x[:, order].contiguous())
        assert torch.equal(first.matmul_float(x), wanted)
    assert torch.equal(first.dequantize()[:, order], other.dequantize())


@pytest.mark.parametrize("scheme", [INT8, INT4, INT4_MINIMUM], ids=name_of)
def test_epilogues(scheme: GroupScheme, context: library.Context) -> None:
    rows, columns = 96, 64
    weight, x = RandomGroups(scheme, rows, columns), activations(columns)[:9]
    packed = PackedWeight.grouped(context, weight)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    product = packed.matmul_float(x) + bias
    residual = torch.randn((9, rows), generator=torch.Generator().manual_seed(2))

    def run(matrix: PackedWeight, bias: Tensor, out: Tensor, epilogue: int) -> Tensor:
        arguments = Gemm(
            pointer(x), matrix.matrix, pointer(bias), pointer(out), 9, columns, out.shape[1],
            epilogue,
        )  # fmt: skip
        context.call("gemm", arguments)
        return out

    assert torch.equal(run(packed, bias, residual.clone(), ADD_FLOAT), residual + product)
    mixed = PackedWeight.grouped(context, weight, interleaved=True)
    gate, up = product.chunk(2, dim=1)
    for epilogue, function in (
        (SILU_MUL, torch.nn.functional.silu),
        (GELU_MUL, lambda g: torch.nn.functional.gelu(g, approximate="tanh")),
    ):
        out = torch.empty((9, rows // 2), dtype=torch.bfloat16)
        found = run(mixed, interleave(bias), out, epilogue)
        torch.testing.assert_close(found, (function(gate) * up).bfloat16(), atol=1e-2, rtol=1e-2)


def test_what_is_not_finite_spoils_its_row_alone(context: library.Context) -> None:
    packed = PackedWeight.grouped(context, RandomGroups(INT8, 64, 96))
    x = activations(96)[:12]
    clean = packed.matmul_float(x)
    for row, value in ((2, torch.inf), (5, torch.nan), (7, -torch.inf)):
        x[row, 40] = value
    found = packed.matmul_float(x)
    spoilt = torch.zeros(12, dtype=torch.bool)
    spoilt[[2, 5, 7]] = True
    assert found[spoilt].isnan().all()
    assert torch.equal(found[~spoilt], clean[~spoilt])


def test_ragged_inputs_are_refused(context: library.Context) -> None:
    with pytest.raises(ValueError, match="48 inputs are no multiple of 32"):
        PackedWeight.grouped(context, RandomGroups(INT8, 32, 48))
