"""Quantized checkpoints: the numbers they stand for, logits by both paths, shards and faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats import packers
from tests.formats.packed_models import describe, edit, is_linear, write_pair
from tests.formats.packers import Packer
from tests.golden.native import native
from tests.golden.paged import Paged, paged
from tgi_cli.errors import CheckpointError, TgiError, UnsupportedModel, UsageError
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.grouped import INT4, INT8, MXFP4, GroupScheme, wide
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.quantize.formats.base import WHOLE, Shard
from tgi_cli.quantize.formats.dense import DenseWeight
from tgi_cli.quantize.formats.packed import GroupedWeight
from tgi_cli.quantize.formats.table import TableMatrix

NATIVE = library.load() is not None
TOKENS = torch.randint(3, 512, (48,), generator=torch.Generator().manual_seed(5)).tolist()
#: Mean error of logits in their standard deviations with activations rounded to int8.
NEAR = 0.05
#: The same with activations of bfloat16; of the dense model 0.018.
NEARER = 0.025
KEY = "model.layers.1.mlp.down_proj.weight"


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, **changes}


def awq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, **changes}


#: Name to packer, configuration and whether a kernel multiplies it as it is.
CASES: dict[str, tuple[Packer, dict[str, Any], bool]] = {
    "gptq-sym": (packers.gptq(), gptq_config(checkpoint_format="gptq"), True),
    "gptq-no-index": (packers.gptq(group=128, with_index=False), gptq_config(group_size=128), True),
    "gptq-asym": (
        packers.gptq(symmetric=False, group=64),
        gptq_config(sym=False, group_size=64),
        True,
    ),
    "gptq-v2": (
        packers.gptq(symmetric=False, version=2),
        gptq_config(sym=False, checkpoint_format="gptq_v2"),
        True,
    ),
    "gptq-v2-sym": (packers.gptq(version=2), gptq_config(checkpoint_format="gptq_v2"), True),
    "gptq-channel": (packers.gptq(group=-1), gptq_config(group_size=-1), True),
    "gptq-8": (packers.gptq(bits=8), gptq_config(bits=8), True),
    "gptq-8-asym": (packers.gptq(bits=8, symmetric=False), gptq_config(bits=8, sym=False), True),
    "gptq-3": (packers.gptq(bits=3), gptq_config(bits=3), True),
    "gptq-3-asym": (packers.gptq(bits=3, symmetric=False), gptq_config(bits=3, sym=False), True),
    "gptq-2": (packers.gptq(bits=2, symmetric=False), gptq_config(bits=2, sym=False), True),
    "gptq-act-order": (packers.gptq(shuffle=3), gptq_config(desc_act=True), True),
    "gptq-act-order-asym": (
        packers.gptq(shuffle=3, symmetric=False, group=64),
        gptq_config(desc_act=True, sym=False, group_size=64),
        True,
    ),
    "awq": (packers.awq(), awq_config(version="gemm"), True),
    "awq-128": (packers.awq(128), awq_config(group_size=128), True),
    "awq-old-keys": (packers.awq(64), {"w_bit": 4, "q_group_size": 64, "zero_point": True}, True),
    "fp8-block": (
        packers.float8((128, 128), "weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        True,
    ),
    "fp8-ragged-block": (
        packers.float8((48, 48), "weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [48, 48]},
        False,
    ),
    "fp8-tensor": (
        packers.float8((0, 0), "weight_scale", "scalar"),
        {"quant_method": "fp8", "activation_scheme": "static"},
        True,
    ),
    "fbgemm-fp8": (
        packers.float8((1, 0), "weight_scale"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        True,
    ),
    "mxfp4": (packers.mxfp4(), {"quant_method": "mxfp4"}, True),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, bool]:
    packer, config, packs = CASES[request.param]
    return *write_pair(tmp_path, packer, config), packs


def test_logits(case: tuple[Path, Path, bool]) -> None:
    packed, twin, packs = case
    truth = paged(twin).run(TOKENS, 48)
    # Decoded in float32, it is the twin, but for the twin's rounding to float32.
    close = 1e-5 * float(truth.abs().max())
    torch.testing.assert_close(paged(packed).run(TOKENS, 48), truth, rtol=0, atol=close)
    checkpoint = open_checkpoint(str(packed)).for_length(256)
    assert checkpoint.stored_dtype == torch.float16
    assert checkpoint.quantized == checkpoint.keeping_blocks().keeps_blocks == packs
    # Kept as stored, the composition decodes to the same numbers ...
    kept = checkpoint.keeping_blocks()
    decoder = Decoder.build(kept, select("cpu"), torch.float32)
    weight = decoder.layers[0].attention.qkv.weight
    assert isinstance(weight, GroupedWeight if packs else DenseWeight)
    options = {"max_len": 64, "block_size": 16}
    logits = Paged(decoder, select("cpu"), torch.float32, **options).run(TOKENS, 48)
    torch.testing.assert_close(logits, truth, rtol=0, atol=close)
    if not NATIVE:
        return
    # ... and the kernels multiply them by rounded activations.
    with native(kept) as driver:
        error = (driver.run(TOKENS, 48) - truth).abs().mean()
    assert error <= (NEAR if kept.rounds_activations else NEARER) * truth.std()
    with native(checkpoint.keeping_blocks(wide_activations=True)) as driver:
        error = (driver.run(TOKENS, 48) - truth).abs().mean()
    assert error <= NEARER * truth.std()


def test_matrices_and_their_shards(case: tuple[Path, Path, bool]) -> None:
    packed, twin, packs = case
    for checkpoint in (open_checkpoint(str(packed)), open_checkpoint(str(packed)).keeping_blocks()):
        source, form = checkpoint.source, checkpoint.format
        expected = open_checkpoint(str(twin)).source
        for key in filter(is_linear, expected.keys()):
            assert form.covers(source, key)
            assert form.shape(source, key) == expected.shape(key)
            whole = form.load(source, key, WHOLE, torch.float32)
            torch.testing.assert_close(whole.dequantize(), expected.read(key), rtol=1e-6, atol=1e-6)
            shards = [form.load(source, key, Shard(0, rank, 4), torch.float32) for rank in range(4)]
            rows = torch.cat([shard.dequantize() for shard in shards])
            assert torch.equal(rows, whole.dequantize())
            fused = form.fuse(shards)
            assert isinstance(fused, GroupedWeight) == (packs and form.packs)
            assert torch.equal(fused.dequantize(), whole.dequantize())
        assert set(form.names(source)) == set(expected.keys())


@pytest.mark.parametrize(
    ("name", "world", "fits"),
    [
        ("gptq-sym", 4, True),
        ("gptq-asym", 2, True),
        ("gptq-channel", 4, True),
        ("gptq-act-order", 4, True),
        ("awq-128", 2, True),
        ("awq-128", 4, False),
        ("fp8-tensor", 4, True),
        ("fp8-block", 4, False),
        ("mxfp4", 16, False),
    ],
)
def test_shards_of_the_inputs_keep_groups_whole(
    name: str, world: int, fits: bool, tmp_path: Path
) -> None:
    packer, config, _ = CASES[name]
    packed, _ = write_pair(tmp_path, packer, config)
    checkpoint = open_checkpoint(str(packed)).keeping_blocks()
    source, form = checkpoint.source, checkpoint.format
    if not fits:
        with pytest.raises(UsageError, match=rf"matrix `{KEY}` shares scales among \d+ inputs"):
            form.load(source, KEY, Shard(1, 0, world), torch.float32)
        return
    whole = form.load(source, KEY, WHOLE, torch.float32)
    parts = [form.load(source, KEY, Shard(1, rank, world), torch.float32) for rank in range(world)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), whole.dequantize())
    if isinstance(whole, GroupedWeight) and whole.order is not None:
        assert {type(part) for part in parts} == {DenseWeight}  # groups reach into other shards
    elif isinstance(whole, GroupedWeight):
        assert {type(part) for part in parts} == {GroupedWeight}
        codes = torch.cat([part.rows(3, 9).codes for part in parts], 1)
        assert torch.equal(codes, whole.rows(3, 9).codes)


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_parts_in_different_orders_become_one_dense_matrix(part: str, tmp_path: Path) -> None:
    packed, _ = write_pair(tmp_path, packers.gptq(shuffle=3), gptq_config(desc_act=True))
    stem = "model.layers.1.self_attn."
    keys = [f"{stem}{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    source = open_checkpoint(str(packed)).source
    edit(packed, **{f"{stem}{part}.g_idx": source.read(f"{stem}{part}.g_idx").flip(0)})
    checkpoint = open_checkpoint(str(packed)).keeping_blocks()
    form, source = checkpoint.format, checkpoint.source
    assert form.scheme(source, keys) is None
    assert form.scheme(source, keys[:1]) is not None
    parts = [form.load(source, key, WHOLE, torch.float32) for key in keys]
    fused = form.fuse(parts)
    assert isinstance(fused, DenseWeight)
    assert torch.equal(fused.dequantize(), torch.cat([each.dequantize() for each in parts]))


def test_groups_of_unequal_sizes_are_decoded(tmp_path: Path) -> None:
    packed, _ = write_pair(tmp_path, packers.gptq(shuffle=3), gptq_config(desc_act=True))
    name = KEY.replace("weight", "g_idx")
    index = open_checkpoint(str(packed)).source.read(name)
    edit(packed, **{name: index.clamp(min=1)})
    checkpoint = open_checkpoint(str(packed)).keeping_blocks()
    assert checkpoint.format.scheme(checkpoint.source, [KEY]) is None
    weight = checkpoint.format.load(checkpoint.source, KEY, WHOLE, torch.float32)
    assert isinstance(weight, DenseWeight)


@pytest.mark.parametrize(
    ("name", "scheme", "like", "ratio"),
    [
        ("gptq-sym", INT4, INT4, 1.0),
        ("gptq-act-order", INT4, INT4, 1.0),
        ("gptq-no-index", wide(4, 128), INT4, 0.95),
        ("gptq-3", INT4, INT4, 1.0),
        ("awq-128", wide(4, 128, minimum=True), INT4, 1.0),
        ("gptq-8", INT8, INT8, 1.0),
        ("fp8-block", wide(8, 128, codes="e4m3"), INT8, 0.98),
        ("mxfp4", MXFP4, INT4, 1.0),
    ],
)
def test_formats_meet_in_the_layouts_of_gguf(
    name: str, scheme: GroupScheme, like: GroupScheme, ratio: float, tmp_path: Path
) -> None:
    packer, config, _ = CASES[name]
    packed, _ = write_pair(tmp_path, packer, config)
    checkpoint = open_checkpoint(str(packed)).keeping_blocks()
    assert checkpoint.format.scheme(checkpoint.source, [KEY]) == scheme
    # What a decoded token reads, beside Q4_0 or Q8_0.
    assert scheme.nbytes(64, 128) <= ratio * like.nbytes(64, 128)


def test_scales_that_are_no_powers_of_two_stay_in_float32() -> None:
    """E2M1 alone does not make a matrix MXFP4."""
    scales = torch.rand(8, generator=torch.Generator().manual_seed(0))
    packed = torch.arange(8 * 16, dtype=torch.uint8).view(8, 16)
    matrix = TableMatrix(
        "", (8, 32), packed, "e2m1", lambda first, last: scales[first:last], 32, high_first=False
    )
    assert matrix.scheme == wide(4, 32, codes="e2m1")
    assert torch.equal(matrix.rows(2, 8).scales.flatten(), scales[2:])
    assert torch.equal(matrix.scheme.decode(matrix.rows(2, 8)), matrix.decode(2, 8))


def test_scales_may_be_bfloat16(tmp_path: Path) -> None:
    packed, _ = write_pair(tmp_path, packers.gptq(), gptq_config())
    name = KEY.replace("weight", "scales")
    source = open_checkpoint(str(packed)).source
    rounded = source.read(name).bfloat16()
    edit(packed, **{name: rounded})
    edited = open_checkpoint(str(packed)).keeping_blocks()
    weight = edited.format.load(edited.source, KEY, WHOLE, torch.float32)
    assert isinstance(weight, GroupedWeight)
    codes = weight.rows(0, weight.out_features).codes.float() - 8
    assert torch.equal(weight.dequantize(), codes * rounded.T.float().repeat_interleave(32, dim=1))


Damage = Callable[[Path], None]


def damaged(ending: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    def damage(folder: Path) -> None:
        name = KEY.removesuffix(".weight") + ending
        edit(folder, **{name: change(open_checkpoint(str(folder)).source.read(name).clone())})

    return damage


def spoilt(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[7] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("gptq-sym", damaged(".qweight", lambda t: None), r"`.*down_proj\.weight` is missing"),
        ("gptq-sym", damaged(".scales", lambda t: None), r"`.*down_proj\.scales` is missing"),
        ("gptq-sym", damaged(".qzeros", lambda t: t[:, :3]), r"`.*down_proj\.qzeros` has shape"),
        ("gptq-sym", damaged(".qweight", lambda t: t[:8]), r"`.*down_proj\.scales` has shape"),
        ("gptq-sym", damaged(".qweight", lambda t: t.short()), r"\.qweight` has dtype int16"),
        ("gptq-sym", damaged(".scales", spoilt), r"`.*down_proj\.scales` holds scales that are"),
        ("gptq-sym", damaged(".g_idx", lambda t: t + 7), r"`.*down_proj\.g_idx` names a group"),
        ("awq", damaged(".qzeros", lambda t: t.T.contiguous()), r"`.*\.qzeros` has shape"),
        ("awq", damaged(".scales", spoilt), r"`.*\.scales` holds scales"),
        ("fp8-block", damaged(".weight_scale_inv", lambda t: None), r"`.*\.weight` is packed"),
        ("fp8-block", damaged(".weight_scale_inv", lambda t: t[:, :1]), r"_scale_inv` has shape"),
        ("fp8-block", damaged(".weight", lambda t: t.view(torch.int8)), r"` has dtype int8"),
        ("mxfp4", damaged("_scales", lambda t: t[1:]), r"down_proj_scales` has shape"),
        ("mxfp4", damaged("_scales", lambda t: t.fill_(255)), r"down_proj_scales` holds scales"),
    ],
)  # fmt: skip
def test_damage_is_named(name: str, damage: Damage, words: str, tmp_path: Path) -> None:
    packer, config, _ = CASES[name]
    packed, _ = write_pair(tmp_path, packer, config)
    damage(packed)
    with pytest.raises(CheckpointError, match=words):
        Decoder.build(open_checkpoint(str(packed)), select("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (gptq_config(bits=5), UnsupportedModel, "`bits` 5; this build reads 2, 3, 4, 8"),
        (gptq_config(checkpoint_format="marlin"), UnsupportedModel, "`checkpoint_format` 'marlin'"),
        (gptq_config(bits="4"), CheckpointError, "`bits` '4', but a whole number is needed"),
        (gptq_config(bits=8), CheckpointError, "has shape"),
        (gptq_config(group_size=64), CheckpointError, r"\.scales` has shape"),
        (awq_config(), CheckpointError, "has shape"),
        (awq_config(version="gemv"), UnsupportedModel, "`version` 'gemv'"),
        ({"quant_method": "fp8"}, CheckpointError, "says `fp8`, but no tensor .* is stored so"),
        ({"quant_method": "exl2"}, UnsupportedModel, "`exl2`, which this build does not read"),
        ({"quant_method": "aqlm"}, UnsupportedModel, "it reads .* GPTQ, AWQ"),
    ],
)
def test_a_wrong_description_is_refused(
    config: dict[str, Any], error: type[TgiError], words: str, tmp_path: Path
) -> None:
    packed, _ = write_pair(tmp_path, packers.gptq(), gptq_config())
    describe(packed, config)
    with pytest.raises(error, match=words):
        Decoder.build(open_checkpoint(str(packed)), select("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_older_tools_describe_it_in_a_file_of_its_own(name: str, tmp_path: Path) -> None:
    packer, config = (
        (packers.gptq(), gptq_config()) if "ize" in name else (packers.awq(), awq_config())
    )
    del config["quant_method"]
    packed, twin = write_pair(tmp_path, packer, {})
    (packed / name).write_text(json.dumps(config))
    assert torch.equal(paged(packed).run(TOKENS, 48), paged(twin).run(TOKENS, 48))


def test_plain_and_packed_matrices_stand_side_by_side(tmp_path: Path) -> None:
    packed, twin = write_pair(tmp_path, packers.gptq(), gptq_config())
    plain = "model.layers.0.self_attn.k_proj"
    dense = open_checkpoint(str(twin)).source.read(f"{plain}.weight")
    edit(packed, **{f"{plain}.{end}": None for end in ("qweight", "qzeros", "scales", "g_idx")})
    edit(packed, **{f"{plain}.weight": dense})
    truth = paged(twin).run(TOKENS, 48)
    assert torch.equal(paged(packed).run(TOKENS, 48), truth)
    kept = open_checkpoint(str(packed)).for_length(256).keeping_blocks()
    decoder = Decoder.build(kept, select("cpu"), torch.bfloat16)
    assert isinstance(decoder.layers[0].attention.qkv.weight, DenseWeight)
    assert isinstance(decoder.layers[1].attention.qkv.weight, GroupedWeight)
    if NATIVE:
        with native(kept) as driver:
            assert (driver.run(TOKENS, 48) - truth).abs().mean() <= NEAR * truth.std()
