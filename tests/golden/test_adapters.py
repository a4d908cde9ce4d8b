"""Adapters against PEFT on the same weights, and promise one with several of them in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.engine import make_core, reference_tokens, request_of, run
from tests.golden.native import Stepped
from tests.golden.paged import Paged
from tests.golden.ranks import backend_of, on_ranks
from tests.golden.test_determinism import outcome
from tests.tiny.adapters import adapted_model, logits_of, make_adapter
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.messages import Request
from tgi_cli.kernels.backend import select
from tgi_cli.kernels.collective import Collective
from tgi_cli.kernels.cpu import library
from tgi_cli.kernels.cpu.program import NativeStep
from tgi_cli.model.adapter_files import OpenedAdapter
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.model.lora import AdapterBank

Checkpoints = Callable[..., Path]
LOADED = library.load()
VARIANTS = LOADED.variants() if LOADED else []
TOKENS = torch.randint(3, 500, (45,), generator=torch.Generator().manual_seed(7)).tolist()

needs_native = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


def decoder_with(path: Path, adapters: Sequence[Path], dtype: torch.dtype) -> Decoder:
    checkpoint, backend = open_checkpoint(str(path)), select("cpu")
    decoder = Decoder.build(checkpoint, backend, dtype)
    if adapters:
        whole = checkpoint.partition(0, 1)
        opened = [OpenedAdapter(folder, checkpoint.spec) for folder in adapters]
        decoder.attach(AdapterBank([each.load(whole, dtype, backend.device) for each in opened]))
    return decoder


@contextmanager
def native_with(
    path: Path, adapters: Sequence[Path], *, variant: str = "", threads: int = 2, **options: int
) -> Iterator[Paged]:
    assert LOADED is not None
    context = LOADED.context(variant or VARIANTS[0], threads)
    decoder = decoder_with(path, adapters, torch.bfloat16)
    stepped: Any = Stepped(NativeStep(context, decoder), decoder)
    yield Paged(
        stepped, select("cpu"), torch.bfloat16, **{"block_size": 16, "max_len": 96, **options}
    )
    context.close()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama-biased-tied", {"use_rslora": True, "r": 5}),
        ("qwen2", {"target_modules": ["k_proj", "up_proj"]}),
        ("qwen3", {"rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 12}}),
        ("gemma3", {"alpha_pattern": {"o_proj": 3.5}, "layers_to_transform": [1, 3]}),
    ],
)
def test_logits_are_pefts(
    family: str, settings: dict[str, Any], tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = tiny_checkpoint(family)
    adapter = make_adapter(path, tmp_path / "adapter", **settings)
    expected = logits_of(adapted_model(path, adapter), TOKENS)
    driver = Paged(
        decoder_with(path, [adapter], torch.float32), select("cpu"), torch.float32, num_seqs=2
    )
    plain = driver.run(TOKENS, 9)
    driver = driver.afresh(num_seqs=2)
    driver.adapters = [1, 0]
    beside = [driver.step([(0, TOKENS[:20]), (1, TOKENS[:30])])]
    beside.append(driver.step([(1, TOKENS[30:]), (0, TOKENS[20:])])[::-1])
    ours, base = (torch.cat([step[seq] for step in beside]) for seq in (0, 1))
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(base, plain, atol=2e-4, rtol=1e-4)
    assert float((ours - plain).abs().mean()) > 0.05  # the adapter matters


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "llama-biased-tied", "qwen2", "qwen3", "gemma3"])
def test_native_logits_are_nearer_to_the_truth_than_pefts(
    family: str, variant: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    adapter = make_adapter(path, tmp_path / "adapter", r=11)
    with native_with(path, [adapter], variant=variant, threads=1) as driver:
        driver.adapters = [1]
        ours = driver.run(TOKENS, len(TOKENS))
    truth = logits_of(adapted_model(path, adapter), TOKENS)
    theirs = logits_of(adapted_model(path, adapter, torch.bfloat16), TOKENS)
    assert (ours - truth).abs().mean() <= (theirs - truth).abs().mean()


@needs_native
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_strangers_with_other_adapters_change_no_bit(
    family: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Nor do chunks, threads and the number of adapters; rows without one are those of a server
    without adapters."""
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    adapters = [
        make_adapter(path, tmp_path / "one", seed=1, r=9),
        make_adapter(path, tmp_path / "two", seed=2, target_modules=["v_proj", "gate_proj"]),
    ]
    with native_with(path, []) as driver:
        alone = [driver.run(TOKENS, len(TOKENS))]
    for adapter in adapters:
        with native_with(path, [adapter], threads=1) as driver:
            driver.adapters = [1]
            alone.append(driver.run(TOKENS, len(TOKENS)))
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[1], alone[2])
    with native_with(path, adapters, num_seqs=40) as driver:
        driver.adapters = [seq % 3 for seq in range(40)]
        got: list[list[torch.Tensor]] = [[], [], []]
        start = 0
        for i, chunk in enumerate((20, 1, 1, 3, 20)):
            rows = [(seq, TOKENS[start : start + chunk]) for seq in range(3)]
            rows += [(seq, TOKENS[i : i + 1 + seq % 3]) for seq in range(3, 40, 1 + i % 2)]
            for seq, logits in zip(range(3), driver.step(rows), strict=False):
                got[seq].append(logits)
            start += chunk
    for seq in range(3):
        assert torch.equal(torch.cat(got[seq]), alone[seq])


def tuned(path: Path, folder: Path) -> list[str]:
    """Two adapters of different rank, as the command line names them."""
    one = make_adapter(path, folder / "one", seed=1, r=9)
    two = make_adapter(path, folder / "two", seed=2, r=4, target_modules=["v_proj", "down_proj"])
    return [f"one={one}", f"two={two}"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_greedy_tokens_are_pefts(family: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = tiny_checkpoint(family)
    adapters = tuned(path, tmp_path)
    core = make_core(path, adapters=adapters)
    asked = [
        request_of(name or "base", TOKENS[:21], max_tokens=12, ignore_eos=True, adapter=name)
        for name in ("one", "", "two")
    ]
    answers = run(core, asked)
    for name, item in zip(("one", "two"), adapters, strict=True):
        model: Any = adapted_model(path, Path(item.partition("=")[2]))
        assert answers[name].token_ids == reference_tokens(model, TOKENS[:21], 12)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == 3
    core.close()


@needs_native
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_one_request_one_answer(family: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Alone, beside other adapters, on prefix hits and preempted; base rows as without adapters."""
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    adapters = tuned(path, tmp_path)

    def core(**options: Any) -> EngineCore:
        return make_core(path, dtype="bfloat16", block_size=16, **options)

    def asked(*names: str) -> list[Request]:
        """The same prompts for each: a shared prefix would be as easy to mistake as can be."""
        return [
            request_of(
                f"{name}-{i}", TOKENS[: 33 + 6 * i], max_tokens=40, ignore_eos=True, logprobs=2,
                temperature=0.8 * (i % 2), seed=i, adapter=name,
            )
            for i in range(2)
            for name in names
        ]  # fmt: skip

    expected: dict[str, Any] = {}
    lonely = core(prefix_caching=False, adapters=adapters)
    for request in asked("one", "two"):
        expected |= outcome(lonely, [request])
    lonely.close()
    plain = core(prefix_caching=False)
    for request in asked(""):
        expected |= outcome(plain, [request])
    plain.close()

    for max_batch_tokens in (19, 64):
        batched = core(max_batch_tokens=max_batch_tokens, adapters=adapters)
        assert outcome(batched, asked("", "one", "two"), stagger=2) == expected
        assert outcome(batched, asked("two", "one", "")) == expected
        assert batched.stats().prefix_hit_tokens > 0
        batched.close()
    small = core(kv_cache_tokens=256, max_batch_tokens=32, adapters=adapters)
    assert outcome(small, asked("", "one", "two")) == expected
    assert small.stats().preemptions > 0
    small.close()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@needs_native
def test_on_quantized_weights(quantize: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", dtype=torch.bfloat16)
    adapters = tuned(path, tmp_path)
    options: dict[str, Any] = {"dtype": "bfloat16", "block_size": 16, "quantize": quantize}
    core, plain = make_core(path, adapters=adapters, **options), make_core(path, **options)
    names = ("one", "", "two")
    asked = [
        request_of(name or "base", TOKENS, max_tokens=8, ignore_eos=True, adapter=name, logprobs=0)
        for name in names
    ]
    together = outcome(core, asked)
    assert together["base"] == outcome(plain, [asked[1]])["base"]
    for request in asked:
        assert outcome(core, [request]) == {request.id: together[request.id]}
    assert len({str(together[name or "base"]) for name in names}) == 3
    core.close()
    plain.close()


def test_unknown_adapters_end_their_request_alone(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = tiny_checkpoint("llama")
    core = make_core(path, adapters=tuned(path, tmp_path))
    core.accept(request_of("bad", TOKENS, adapter="three", max_tokens=3))
    core.accept(request_of("good", TOKENS, adapter="two", max_tokens=3, ignore_eos=True))
    deltas = []
    while core.has_work():
        deltas += core.step()
    by_id = {delta.id: delta for delta in deltas}
    assert by_id["bad"].error == "there is no adapter `three` here"
    assert by_id["good"].finish == "length"
    core.close()


@needs_native
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ranks_hold_a_part_each(family: str, tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Composed in float32 they are PEFT; native, strangers change no bit of a row."""
    path = tiny_checkpoint(family, dtype=torch.bfloat16)
    folder = make_adapter(path, tmp_path / "adapter")
    checkpoint, world_size = open_checkpoint(str(path)), 2

    def driver(collective: Collective, dtype: torch.dtype) -> Paged:
        backend = backend_of(collective)
        part = checkpoint.partition(collective.rank, world_size)
        decoder = Decoder.build(checkpoint, backend, dtype)
        adapter = OpenedAdapter(folder, checkpoint.spec).load(part, dtype, backend.device)
        decoder.attach(AdapterBank([adapter]))
        made: Any = decoder
        if dtype == torch.bfloat16:
            step = backend.plan(decoder, 16)
            assert step is not None
            made = Stepped(step, decoder)
        made = Paged(made, backend, dtype, block_size=16, max_len=96, num_seqs=3)
        made.adapters = [1, 0, 1]
        return made

    def composed(collective: Collective) -> Tensor:
        return driver(collective, torch.float32).run(TOKENS, 11)

    def native_rows(collective: Collective) -> Tensor:
        made = driver(collective, torch.bfloat16)
        alone = made.run(TOKENS, 45)
        made = made.afresh(block_size=16, max_len=96, num_seqs=3)
        made.adapters = [1, 0, 1]
        first = made.step([(1, TOKENS[:9]), (0, TOKENS[:30]), (2, TOKENS[3:9])])[1]
        second = made.step([(0, TOKENS[30:]), (1, TOKENS[9:20])])[0]
        assert torch.equal(torch.cat([first, second]), alone)
        return alone

    truth = logits_of(adapted_model(path, folder), TOKENS)
    theirs = logits_of(adapted_model(path, folder, torch.bfloat16), TOKENS)
    for logits in on_ranks(world_size, composed):
        torch.testing.assert_close(logits, truth, atol=2e-4, rtol=1e-4)
    for logits in on_ranks(world_size, native_rows):
        assert (logits - truth).abs().mean() <= (theirs - truth).abs().mean()
