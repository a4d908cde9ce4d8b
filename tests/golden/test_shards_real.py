"""Real models on several ranks answer as on one.

Another order of summation may turn two logits that are nearly equal; so at the first token that
differs, one process must have held both for nearly as likely. What rounding activations to 8 bits
costs is measured on real text, as for one process, and is the same on ranks.
`pytest -m real_model -s tests/golden/test_shards_real.py` prints the figures that
docs/tensor-parallel.md quotes; TGI_TEST_1B names a folder that `benchmarks/tensor_parallel.py
--make` has written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor

from tests.golden.engine import Answer, make_core, request_of, run
from tests.golden.native import Stepped
from tests.golden.paged import Paged, paged
from tests.golden.ranks import backend_of, on_ranks
from tests.golden.test_generate_real import PROMPTS, gguf_path
from tests.golden.test_quantized_real import TOPICS, Cost
from tgi_cli.engine.messages import Request
from tgi_cli.errors import UsageError
from tgi_cli.kernels.collective import Collective
from tgi_cli.kernels.cpu import library
from tgi_cli.model.checkpoint import open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.tokenizer import load_tokenizer

COUNT = 16
#: By activations: float32 differs in the last bits, 8-bit activations are rounded once more.
GAPS = {"float32": 1e-3, "bfloat16": 0.25, "int8": 0.5}

#: For random weights, whose best tokens lie close together.
FLAT_GAPS = {"float32": 1e-4, "bfloat16": 0.025, "int8": 0.1, "int4": 0.1}
LENGTH = 256  # tokens of a text

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(library.load() is None, reason="the native kernels are not built"),
]


def requests(name: str) -> list[Request]:
    tokenizer = load_tokenizer(str(gguf_path(name)))
    return [
        request_of(
            f"r{i}", tokenizer.encode(text, True), max_tokens=COUNT, ignore_eos=True, logprobs=5
        )
        for i, text in enumerate(PROMPTS[:10])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("name", "num_shard"),
    [("smollm2", 3), ("gemma3", 2), ("gemma3", 4)],  # Gemma's one key/value head is shared
)
def test_tokens_are_those_of_one_process(name: str, num_shard: int, activations: str) -> None:
    options = {
        "dtype": "float32" if activations == "float32" else "bfloat16",
        "activation_dtype": "auto" if activations == "float32" else activations,
        "kv_cache_tokens": 4096,
        "block_size": 16,
    }
    asked, found = requests(name), []
    for count in (1, num_shard):
        core = make_core(gguf_path(name), num_shard=count, **options)
        try:
            found.append(run(core, asked, stagger=1))
        finally:
            core.close()
    same = equal(asked, *found, GAPS[activations])
    print(f"{name}, {num_shard} ranks, {activations}: {same} of {len(asked)} equal")
    if activations == "float32":
        assert same >= len(asked) - 1


def equal(
    asked: Sequence[Request], whole: dict[str, Answer], divided: dict[str, Answer], most: float
) -> int:
    """How many answers are the same; the others' first other token is as likely but for `most`."""
    same = 0
    for request in asked:
        one, other = whole[request.id], divided[request.id]
        if one.token_ids == other.token_ids:
            same += 1
            continue
        pairs = zip(one.token_ids, other.token_ids, strict=True)
        at = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
        logprobs = [each for delta in one.deltas for each in delta.logprobs or []][at]
        top = dict(zip(logprobs.top_ids, logprobs.top_logprobs, strict=True))
        assert other.token_ids[at] in top, f"token {at} of {request.id}"
        gap = logprobs.logprob - top[other.token_ids[at]]
        print(f"token {at} of {request.id} differs by {gap:.4f}")
        assert gap <= most, f"token {at} of {request.id}: gap {gap}"
    return same


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_shard", "texts"), [("smollm2", 3, 3), ("gemma3", 2, 1), ("gemma3", 4, 1)]
)
def test_int8_activations_cost_on_ranks_what_they_cost_on_one(
    name: str, num_shard: int, texts: int
) -> None:
    """Against float32 on the same weights, in the bounds of `test_quantized_real`."""
    path = gguf_path(name)
    tokenizer = load_tokenizer(str(path))
    read = [tokenizer.encode(topics[topic], False)[:LENGTH] for topic in TOPICS[:texts]]
    options = {"max_len": LENGTH, "block_size": 16}
    true = paged(path, **options)
    truths = [true.afresh(**options).run(text, LENGTH) for text in read]
    checkpoint = open_checkpoint(str(path)).for_length(LENGTH).keeping_blocks()

    def work(collective: Collective) -> list[Tensor]:
        backend = backend_of(collective)
        decoder = Decoder.build(checkpoint, backend, torch.bfloat16)
        step = backend.plan(decoder, 16)
        assert step is not None
        driver = Paged(Stepped(step, decoder), backend, torch.bfloat16, **options)  # type: ignore[arg-type]
        logits = [driver.afresh(**options).run(text, LENGTH) for text in read]
        return logits if collective.rank == 0 else []

    costs = []
    for count in (1, num_shard):
        cost = Cost(texts)
        for logits, truth, text in zip(on_ranks(count, work)[0], truths, read, strict=True):
            cost.add(logits, truth, text)
        costs.append(cost)
        print(
            f"{name}, {count} ranks, int8: KL {cost.divergence / cost.tokens:.2e}, top-1 "
            f"agreement {cost.agreeing / cost.tokens:.2%}, perplexity x {cost.perplexity_ratio:.5f}"
        )
    one, several = costs
    assert several.divergence <= 1.1 * one.divergence
    assert several.divergence / several.tokens < 1e-2
    assert several.agreeing / several.tokens > 0.94
    if name == "smollm2":  # Gemma's perplexity over one text is off by as much on one rank
        assert several.perplexity_ratio == pytest.approx(1, abs=0.01)


def test_two_ranks_cannot_share_nine_heads() -> None:
    with pytest.raises(UsageError, match="9 attention heads and 3 key/value heads") as caught:
        make_core(gguf_path("smollm2"), num_shard=2)
    assert caught.value.hint == "use --num-shard 3 (1, 3 and 9 work)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "counts"),
    [("bfloat16", (2, 4)), ("float32", (2,)), ("int8", (2, 4)), ("int4", (2,))],
)
def test_the_shape_of_a_billion_parameters(numbers: str, counts: tuple[int, ...]) -> None:
    """32 heads, 4 key/value heads; random weights, between whose best tokens there is little."""
    model = os.environ.get("TGI_TEST_1B")
    if model is None:
        pytest.skip("TGI_TEST_1B names no folder made by `benchmarks/tensor_parallel.py --make`")
    generator = torch.Generator().manual_seed(0)
    asked = [
        request_of(
            f"r{i}",
            torch.randint(0, 49152, (3 + 20 * i,), generator=generator).tolist(),
            max_tokens=COUNT,
            ignore_eos=True,
            logprobs=5,
        )
        for i in range(6)
    ]
    rounded = numbers.startswith("int")  # while loading, with 8-bit activations
    found = []
    for count in (1, *counts):
        core = make_core(
            Path(model),
            dtype="bfloat16" if rounded else numbers,
            quantize=numbers if rounded else None,
            num_shard=count,
            kv_cache_tokens=2048,
            block_size=16,
        )
        try:
            found.append(run(core, asked, stagger=1))
        finally:
            core.close()
    for count, divided in zip(counts, found[1:], strict=True):
        same = equal(asked, found[0], divided, FLAT_GAPS[numbers])
        print(f"1.17 billion parameters, {count} ranks, {numbers}: {same} of {len(asked)} equal")
        if numbers == "float32":
            assert same >= len(asked) - 1
