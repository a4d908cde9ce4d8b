"""`--quantize` on dense checkpoints: errors of each method, by both paths, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from tests.formats import packers
from tests.formats.packed_models import SIZES, is_linear, write_pair
from tests.golden.engine import make_core, request_of, run
from tests.golden.native import native
from tests.golden.paged import Paged, paged
from tests.tiny import make_checkpoint
from tgi_cli.config import EngineConfig, ModelConfig
from tgi_cli.engine.memory_plan import plan
from tgi_cli.engine.precision import quantized_as_asked, with_activations
from tgi_cli.errors import UsageError
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.packed import PackedWeight
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.quantize.formats.at_load import METHODS
from tgi_cli.quantize.formats.base import WHOLE, Shard
from tgi_cli.quantize.formats.packed import GroupedWeight
from tgi_cli.quantize.formats.roundings import Int4Groups, decoded

NATIVE = library.load() is not None
TOKENS = torch.randint(3, 512, (48,), generator=torch.Generator().manual_seed(5)).tolist()
NEAR = 0.05  # of logits to those of the same rounded weights, in their standard deviations
NEARER = 0.035  # with activations of bfloat16; of a dense model 0.018
KEY = "model.layers.0.self_attn.o_proj.weight"

#: Root mean square error of normally distributed weights, relative to them: measured, + 5 %.
ERRORS = {
    "int8": 0.0057, "int4": 0.088, "eetq": 0.0075, "bitsandbytes": 0.0075,
    "bitsandbytes-nf4": 0.096, "bitsandbytes-fp4": 0.135, "fp8": 0.029,
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return make_checkpoint(folder / "model", "llama", dtype=torch.bfloat16, **SIZES)


def at_load(path: Path, method: str) -> Checkpoint:
    return open_checkpoint(str(path)).for_length(256).quantized_at_load(method)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_rounded_as_well_as_the_method_can(method: str, dense: Path) -> None:
    checkpoint = at_load(dense, method)
    source = checkpoint.source
    for form in (checkpoint.format, checkpoint.format.packing()):
        for key in filter(is_linear, source.keys()):
            assert form.covers(source, key)
            found = form.load(source, key, WHOLE, torch.float32).dequantize()
            true = source.read(key).float()
            error = (found - true).pow(2).mean().sqrt() / true.std()
            assert 0.8 * ERRORS[method] < error < ERRORS[method], key
            for world in (2, 4):
                for dim in (0, 1):
                    parts = [
                        form.load(source, key, Shard(dim, rank, world), torch.float32)
                        for rank in range(world)
                        if true.shape[dim] // world % form.column_unit(source, key) == 0
                    ]
                    whole = (
                        torch.cat([part.dequantize() for part in parts], dim) if parts else found
                    )
                    assert torch.equal(whole, found)


@pytest.mark.parametrize("method", METHODS)
def test_logits(method: str, dense: Path) -> None:
    checkpoint = at_load(dense, method)
    options = {"max_len": 64, "block_size": 16}

    def logits(checkpoint: Checkpoint) -> Tensor:
        decoder = Decoder.build(checkpoint, select("cpu"), torch.float32)
        return Paged(decoder, select("cpu"), torch.float32, **options).run(TOKENS, 48)

    truth = logits(checkpoint)
    # What a method costs on random weights, in standard deviations of logits.
    cost = (truth - paged(dense).run(TOKENS, 48)).abs().mean() / truth.std()
    assert cost < 6 * ERRORS[method] + 0.01
    kept = checkpoint.keeping_blocks()
    assert kept.keeps_blocks
    if not NATIVE:
        return
    # The table is rounded only where it is packed; `ends` leave their mark on the truth too.
    with native(kept) as driver:
        error = (driver.run(TOKENS, 48) - truth).abs().mean()
    assert error <= (NEAR if kept.rounds_activations else NEARER) * truth.std()
    with native(checkpoint.keeping_blocks(wide_activations=True)) as driver:
        error = (driver.run(TOKENS, 48) - truth).abs().mean()
    assert error <= NEARER * truth.std()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.skipif(not NATIVE, reason="the native kernels are not built here")
def test_the_plan_knows_what_will_be_packed(method: str, dense: Path) -> None:
    checkpoint, backend = at_load(dense, method).keeping_blocks(), select("cpu")
    decoder = Decoder.build(checkpoint, backend, torch.bfloat16)
    assert isinstance(decoder.layers[0].attention.qkv.weight, GroupedWeight)
    backend.plan(decoder, 16)
    weights = [
        linear.weight
        for layer in decoder.layers
        for linear in (
            layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down,
        )
    ]  # fmt: skip
    assert all(isinstance(weight, PackedWeight) for weight in weights)
    packed = sum(weight.nbytes for weight in weights) + decoder.head.weight.nbytes
    table = getattr(decoder.embedding, "weight", None)
    packed += decoder.embedding.table.nbytes if table is None else table.nbytes
    norms = (2 * len(decoder.layers) + 1) * checkpoint.spec.hidden_size * 2
    tables = 256 * checkpoint.spec.layers[0].attention.head_dim * 2
    assert checkpoint.weights_bytes(torch.bfloat16) == packed + norms + tables
    assert packed < 0.8 * open_checkpoint(str(dense)).weights_bytes(torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("nf4", "bitsandbytes-nf4"), ("fp4", "bitsandbytes-fp4")],
)
@pytest.mark.filterwarnings("ignore")  # the library warns of kernels it cannot fetch
def test_four_bit_floats_are_those_of_bitsandbytes(kind: str, method: str, dense: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    checkpoint = at_load(dense, method)
    found = checkpoint.format.load(checkpoint.source, KEY, WHOLE, torch.float32).dequantize()
    weight = checkpoint.source.read(KEY).float()
    packed, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64)
    expected = functional.dequantize_4bit(packed, state)
    # A weight in the middle between two levels may go either way.
    same = torch.isclose(found, expected, rtol=1e-5, atol=1e-7)
    assert same.float().mean() > 0.999
    torch.testing.assert_close(
        (found - weight).abs(), (expected - weight).abs(), rtol=0.01, atol=1e-3
    )


def test_ragged_inputs_stay_right(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 48}
    path = make_checkpoint(tmp_path / "ragged", "llama", **sizes)
    for method in METHODS:
        checkpoint = at_load(path, method).keeping_blocks()
        key = "model.layers.0.mlp.down_proj.weight"
        weight = checkpoint.format.load(checkpoint.source, key, WHOLE, torch.float32)
        assert not isinstance(weight, GroupedWeight)
        true = checkpoint.source.read(key).float()
        error = (weight.dequantize() - true).pow(2).mean().sqrt() / true.std()
        assert error < 1.2 * ERRORS[method]


def test_four_bits_lose_less_than_q4_0() -> None:
    rows = torch.randn(2000, 64, generator=torch.Generator().manual_seed(5))
    rounding = Int4Groups()
    ours = rounding.scheme(64).decode(rounding.grouped(rows))
    theirs = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q4_0)
    theirs = torch.from_numpy(gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q4_0))
    assert (ours - rows).square().mean() < 0.92 * (theirs - rows).square().mean()


def test_zeros_stay_zeros() -> None:
    rows = torch.zeros(3, 64)
    rows[1, 5] = 1e-30
    for name, method in METHODS.items():
        found = decoded(method.layers, rows)
        assert found.isfinite().all(), name
        assert found.abs().max() <= 1e-30


def test_an_engine_serves_it(dense: Path) -> None:
    for method in ("int8", "bitsandbytes-nf4"):
        core = make_core(dense, dtype="auto", block_size=16, quantize=method)
        assert core.facts.quantization == method
        rounded = NATIVE and method == "int8"
        assert core.facts.activation_dtype == ("int8" if rounded else "bfloat16")
        answer = run(core, [request_of("a", TOKENS[:9], max_tokens=6)])["a"]
        assert 1 <= len(answer.token_ids) <= 6


def test_activations_of_floats_are_not_rounded(dense: Path) -> None:
    config = EngineConfig(
        model=ModelConfig(
            model_id=str(dense), device="cpu", quantize="fp8", activation_dtype="int8"
        )
    )
    words = "weights are floats" if NATIVE else "the native kernels are not built"
    with pytest.raises(UsageError, match=words):
        with_activations(open_checkpoint(str(dense)), config, select("cpu"))


def config_of(path: Path, method: str) -> EngineConfig:
    return EngineConfig(model=ModelConfig(model_id=str(path), device="cpu", quantize=method))


def test_the_plan_is_smaller(dense: Path) -> None:
    backend = select("cpu")
    sizes = {}
    for method in ("int4", "int8", None):
        config = config_of(dense, method)
        checkpoint = with_activations(open_checkpoint(str(dense)), config, backend)
        sizes[method] = plan(checkpoint, config, backend).weights_bytes
    if NATIVE:
        assert sizes["int4"] < sizes["int8"] < 0.6 * sizes[None]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("stored")
    paths = {
        "gptq": write_pair(folder / "gptq", packers.gptq(), GPTQ)[0],
        "awq": write_pair(folder / "awq", packers.awq(), AWQ)[0],
        "dense": make_checkpoint(folder / "dense", "llama"),
    }
    return paths.__getitem__


@pytest.mark.parametrize(
    ("name", "method"),
    [("gptq", "gptq"), ("gptq", "marlin"), ("awq", "awq"), ("awq", "gptq"), ("awq", "marlin")],
)
def test_names_of_stored_formats_are_checked(
    name: str, method: str, stored: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(str(stored(name)))
    assert quantized_as_asked(checkpoint, method) is checkpoint


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("gptq", "awq", "`--quantize awq` does not fit the checkpoint, .* with gptq"),
        ("gptq", "int8", "`--quantize int8` does not fit"),
        ("awq", "compressed-tensors", "does not fit .* with awq"),
        ("dense", "gptq", "wants a checkpoint in gptq or awq, and this one is not quantized"),
        ("dense", "marlin", "wants a checkpoint in gptq or awq"),
        ("dense", "exl2", "EXL2 checkpoints are not read; this build reads .*GPTQ, AWQ"),
        ("dense", "int3", "unknown quantization `int3`"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, method: str, words: str, stored: Callable[[str], Path]
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        quantized_as_asked(open_checkpoint(str(stored(name))), method)
    assert caught.value.hint
