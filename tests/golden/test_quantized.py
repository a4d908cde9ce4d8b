"""Models whose GGUF blocks stay packed: the same weights, near the truth, and equal bits.

Truth is float32 on the weights that the file holds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.formats.gguf_models import VOCAB, tiny_model, write_model
from tests.golden.engine import make_core
from tests.golden.native import native
from tests.golden.paged import Paged, paged
from tgi_cli.config import EngineConfig, ModelConfig
from tgi_cli.engine.memory_plan import plan
from tgi_cli.engine.precision import with_activations
from tgi_cli.errors import UsageError
from tgi_cli.kernels.backend import Backend, select
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.packed import PackedWeight
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.quantize.formats.dense import DenseWeight
from tgi_cli.quantize.formats.packed import GroupedWeight

LOADED = library.load()
VARIANTS = LOADED.variants() if LOADED else []
FAMILIES = ["llama", "llama-bias", "mistral", "qwen2", "qwen3", "gemma3"]
KINDS = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
#: Mean error of logits in their standard deviations, with random weights: 0.02 to 0.03 measured.
NEAR = 0.04
#: The same with activations of bfloat16: half of it measured.
NEARER = 0.025
TOKENS = torch.randint(3, VOCAB, (83,), generator=torch.Generator().manual_seed(7)).tolist()

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


def mixed(name: str) -> Type:
    """Types that cannot be stacked in some layers, and a head of another type than the rest."""
    if name.endswith("attn_v.weight"):
        return Type.Q8_0
    return Type.Q5_1 if "token_embd" in name or name == "output.weight" else Type.Q4_0


def blocks_of(path: Path) -> Checkpoint:
    return open_checkpoint(str(path)).for_length(256).keeping_blocks()


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", kind) for kind in KINDS] + [(family, mixed) for family in FAMILIES],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", value)),
)
def test_kept_blocks_are_the_same_model(
    family: str, kind: Type | Callable[[str], Type], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model(family), kind)
    checkpoint = blocks_of(path)
    assert checkpoint.keeps_blocks
    # Before they are packed, blocks compose to the very model of dense weights.
    backend, options = select("cpu"), {"max_len": 96, "block_size": 16}
    decoder = Decoder.build(checkpoint, backend, torch.bfloat16)
    kept = Paged(decoder, backend, torch.bfloat16, **options).run(TOKENS, 83)
    assert torch.equal(kept, paged(path, torch.bfloat16, **options).run(TOKENS, 83))
    # Packed and multiplied by 8-bit activations, they are near the truth ...
    truth = paged(path, **options).run(TOKENS, 83)
    with native(checkpoint) as driver:
        logits = driver.run(TOKENS, 83)
        assert (logits - truth).abs().mean() <= NEAR * truth.std()
        # ... whatever the chunks.
        for chunk in (1, 5, 32):
            assert torch.equal(driver.afresh(max_len=96, block_size=16).run(TOKENS, chunk), logits)
    # With 16-bit activations they are nearer, from the same packed weights.
    with native(checkpoint.keeping_blocks(wide_activations=True)) as driver:
        wide = driver.run(TOKENS, 83)
    assert (wide - truth).abs().mean() <= NEARER * truth.std()
    for variant in VARIANTS[1:]:
        with native(checkpoint, variant=variant, threads=1) as driver:
            assert (driver.run(TOKENS, 83) - truth).abs().mean() <= NEAR * truth.std()


def test_matrices_are_packed_as_their_types_allow(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model("llama"), mixed)
    checkpoint, backend = blocks_of(path), select("cpu")
    decoder = Decoder.build(checkpoint, backend, torch.bfloat16)
    layer = decoder.layers[0]
    assert isinstance(layer.attention.qkv.weight, DenseWeight)  # of two schemes
    assert isinstance(layer.mlp.gate_up.weight, GroupedWeight)
    backend.plan(decoder, 16)
    weights = [
        each
        for layer in decoder.layers
        for each in (
            layer.attention.qkv.weight,
            layer.attention.output.weight,
            layer.mlp.gate_up.weight,
            layer.mlp.down.weight,
        )
    ]
    weights += [decoder.embedding.weight, decoder.head.weight]
    assert all(isinstance(weight, PackedWeight) for weight in weights)
    norms = (2 * len(decoder.layers) + 1) * checkpoint.spec.hidden_size * 2
    tables = 256 * checkpoint.spec.layers[0].attention.head_dim * 2
    packed = sum(weight.nbytes for weight in weights)
    assert checkpoint.weights_bytes(torch.bfloat16) == pytest.approx(packed + norms + tables, 0.01)


def config_of(path: Path, **model: str) -> EngineConfig:
    return EngineConfig(model=ModelConfig(model_id=str(path), device="cpu", **model))


def held(path: Path, backend: Backend, **model: str) -> Checkpoint:
    return with_activations(open_checkpoint(str(path)), config_of(path, **model), backend)


def test_activations_are_the_users_choice(tmp_path: Path) -> None:
    quantized = write_model(tmp_path / "q.gguf", tiny_model("llama"), Type.Q4_1)
    plain = write_model(tmp_path / "f.gguf", tiny_model("llama"), Type.F16)
    backend = select("cpu")
    assert held(quantized, backend).keeps_blocks
    assert held(quantized, backend, activation_dtype="int8").keeps_blocks
    exact = held(quantized, backend, activation_dtype="bfloat16")
    assert exact.keeps_blocks
    assert not exact.rounds_activations
    assert not held(quantized, backend, dtype="float32").keeps_blocks
    assert not held(plain, backend).keeps_blocks
    with pytest.raises(UsageError, match="its weights are not quantized"):
        held(plain, backend, activation_dtype="int8")
    with pytest.raises(UsageError, match="its dtype is float32"):
        held(quantized, backend, activation_dtype="int8", dtype="float32")
    with pytest.raises(UsageError, match="unknown activation dtype `int4`"):
        held(quantized, backend, activation_dtype="int4")


def test_engine_holds_what_it_says(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_model("qwen3"), Type.Q8_0)
    facts = make_core(path, dtype="auto", block_size=16).facts
    assert facts.activation_dtype == "int8"
    dense = plan(open_checkpoint(str(path)), config_of(path), select("cpu"))
    assert facts.weights_bytes < 0.7 * dense.weights_bytes
    # Blocks of 4 tokens have no native program, so the weights are dense.
    assert make_core(path, dtype="auto", block_size=4).facts.activation_dtype == "bfloat16"
