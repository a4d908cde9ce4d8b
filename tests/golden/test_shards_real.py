"""Real models on several ranks answer as on one.

Another order of summation may turn two logits that are nearly equal; so at the first token that
differs, one process must have held both for nearly as likely.
"""

from __future__ import annotations

import pytest

from tests.golden.engine import make_core, request_of, run
from tests.golden.test_generate_real import PROMPTS, gguf_path
from tgi_cli.engine.messages import Request
from tgi_cli.errors import UsageError
from tgi_cli.kernels.cpu import library
from tgi_cli.tokenizer import load_tokenizer

COUNT = 16
#: By activations: float32 differs in the last bits, 8-bit activations are rounded once more.
GAPS = {"float32": 1e-3, "bfloat16": 0.25, "int8": 0.5}

pytestmark = [
    pytest.mark.slow,
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
    same = 0
    for request in asked:
        whole, divided = (answers[request.id] for answers in found)
        if whole.token_ids == divided.token_ids:
            same += 1
            continue
        pairs = zip(whole.token_ids, divided.token_ids, strict=True)
        at = next(i for i, (one, other) in enumerate(pairs) if one != other)
        logprobs = [each for delta in whole.deltas for each in delta.logprobs or []][at]
        top = dict(zip(logprobs.top_ids, logprobs.top_logprobs, strict=True))
        assert divided.token_ids[at] in top, f"token {at} of {request.id}"
        gap = logprobs.logprob - top[divided.token_ids[at]]
        print(f"token {at} of {request.id} differs by {gap:.4f}")
        assert gap <= GAPS[activations], f"token {at} of {request.id}: gap {gap}"
    print(f"{name}, {num_shard} ranks, {activations}: {same} of {len(asked)} equal")
    if activations == "float32":
        assert same >= len(asked) - 1


def test_two_ranks_cannot_share_nine_heads() -> None:
    with pytest.raises(UsageError, match="9 attention heads and 3 key/value heads") as caught:
        make_core(gguf_path("smollm2"), num_shard=2)
    assert caught.value.hint == "use --num-shard 3 (1, 3 and 9 work)"
