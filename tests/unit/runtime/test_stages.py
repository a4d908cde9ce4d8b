from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from tgi_cli.engine.messages import Request
from tgi_cli.engine.rows import LogitRows, TokenHistory
from tgi_cli.engine.stages import Stages, apply_stages
from tgi_cli.sampling import SamplingParams, Watermark

VOCAB = 1000
PROMPT, OUTPUT = [5, 6, 7, 5, 9], [11, 12, 11, 11]


def request_of(
    prompt: list[int] = PROMPT,
    output: list[int] = OUTPUT,
    eos: tuple[int, ...] = (2,),
    **sampling: Any,
) -> Request:
    return Request(
        id="r",
        prompt_ids=prompt,
        output_ids=output,
        eos_token_ids=eos,
        sampling=SamplingParams(**sampling),
    )


def processed(logits: Tensor, requests: list[Request], drafts: list[list[int]] | None = None):
    """Run all stages over one row per request (1 + k with drafts)."""
    history = TokenHistory(len(requests), 64, logits.shape[-1])
    stages = Stages(len(requests))
    for row, request in enumerate(requests):
        history.add(row, request, request.output_ids)
        for stage in stages:
            stage.add(row, request, request.output_ids)
    counts = None
    if drafts is not None:
        counts = np.array([len(ids) for ids in drafts])
        for row, ids in enumerate(drafts):
            history.propose(row, ids)
    out = logits.clone()
    apply_stages(stages, out, LogitRows.of(history, np.arange(len(requests)), counts))
    return out


def logits_of(rows: int, vocab_size: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


MARK = WatermarkLogitsProcessor(VOCAB, "cpu", greenlist_ratio=0.5, bias=2.0)
CASES = {
    "watermark": ({"watermark": Watermark()}, [MARK]),
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 17}, [TopKLogitsWarper(17)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "top_p wide": ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),
    "top_p narrow": ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
    "min_p": ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
    "typical": ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
    "repetition": ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    "repetition below one": ({"repetition_penalty": 0.6}, [RepetitionPenaltyLogitsProcessor(0.6)]),
    "top_k then top_p": (
        {"top_k": 40, "top_p": 0.7},
        [TopKLogitsWarper(40), TopPLogitsWarper(0.7)],
    ),
    "all": (
        {
            "repetition_penalty": 1.2,
            "temperature": 1.4,
            "top_k": 300,
            "top_p": 0.9,
            "min_p": 0.01,
            "typical_p": 0.8,
        },
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(300),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.01),
            TypicalLogitsWarper(0.8),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_equals_transformers(name: str, seed: int) -> None:
    sampling, processors = CASES[name]
    logits = logits_of(1, seed=seed)
    if "top_k" in name or name == "all":
        logits = logits * 0.4  # flatter, so that the nucleus is wide
    expected = LogitsProcessorList(processors)(torch.tensor([PROMPT + OUTPUT]), logits.clone())
    actual = processed(logits, [request_of(**sampling)])
    assert torch.equal(actual.isinf(), expected.isinf())
    assert actual.isfinite().sum() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_nucleus_wider_than_the_first_partial_sort() -> None:
    logits = logits_of(1, vocab_size=5000) * 0.01  # nearly uniform: 0.9 needs some 4,500 tokens
    expected = TopPLogitsWarper(0.9)(torch.tensor([[1]]), logits.clone())
    actual = processed(logits, [request_of(top_p=0.9)])
    assert actual.isfinite().sum() > 4000
    assert torch.equal(actual.isinf(), expected.isinf())


def test_frequency_and_presence_count_outputs_only() -> None:
    logits = logits_of(1)
    actual = processed(logits, [request_of(frequency_penalty=0.5, presence_penalty=-0.25)])
    expected = logits.clone()
    expected[0, 11] -= 3 * 0.5 - 0.25
    expected[0, 12] -= 0.5 - 0.25
    torch.testing.assert_close(actual, expected)


def test_frequency_without_outputs_changes_nothing() -> None:
    logits = logits_of(1)
    assert torch.equal(processed(logits, [request_of(output=[], presence_penalty=2.0)]), logits)


def test_minimum_masks_stop_tokens_until_it_is_reached() -> None:
    logits = logits_of(2)
    requests = [
        request_of(min_tokens=5, stop_token_ids=(40,)),  # four outputs so far
        request_of(min_tokens=4, stop_token_ids=(40,)),
    ]
    actual = processed(logits, requests)
    assert actual[0].isinf().nonzero()[:, 0].tolist() == [2, 40]
    assert torch.equal(actual[1], logits[1])


def test_minimum_leaves_an_ignored_end_token_alone() -> None:
    logits = logits_of(1)
    actual = processed(logits, [request_of(min_tokens=9, ignore_eos=True)])
    assert torch.equal(actual, logits)


def test_logit_bias_adds() -> None:
    logits = logits_of(2)
    actual = processed(logits, [request_of(logit_bias={3: 5.0, 900: -100.0}), request_of()])
    expected = logits.clone()
    expected[0, 3] += 5.0
    expected[0, 900] -= 100.0
    assert torch.equal(actual, expected)


def test_greedy_requests_are_not_truncated_or_scaled() -> None:
    logits = logits_of(1)
    request = request_of(temperature=0.0, top_k=1, top_p=0.1, min_p=0.9, typical_p=0.1)
    assert torch.equal(processed(logits, [request]), logits)


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.zeros(1, 10)
    logits[0, :3] = 1.0
    assert processed(logits, [request_of(prompt=[1], output=[], top_k=2)]).isfinite().sum() == 3


def test_drafts_before_a_row_count_as_outputs() -> None:
    logits = logits_of(1).expand(3, -1).clone()
    request = request_of(repetition_penalty=1.5, frequency_penalty=0.5, min_tokens=6)
    actual = processed(logits, [request], drafts=[[20, 11]])
    for i, extra in enumerate(([], [20], [20, 11])):
        follower = request_of(
            output=OUTPUT + extra, repetition_penalty=1.5, frequency_penalty=0.5, min_tokens=6
        )
        assert torch.equal(actual[i], processed(logits[i : i + 1], [follower])[0])


MIXED = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.9},
    {"top_k": 50},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 100_000, "min_p": 0.1},
    {"top_p": 0.9999, "temperature": 1.5},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.3, "typical_p": 0.9, "top_p": 0.95},
    {"frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"min_tokens": 20, "logit_bias": {7: -3.0}},
]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_neighbours(threads: int) -> None:
    """Bit for bit, alone or among others; a big vocabulary so that torch would split lone rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits = logits_of(len(MIXED), vocab_size=50_001)
        requests = [
            request_of(output=OUTPUT * (1 + i % 3), **sampling) for i, sampling in enumerate(MIXED)
        ]
        together = processed(logits, requests)
        for i, request in enumerate(requests):
            alone = processed(logits[i : i + 1], [request])
            assert torch.equal(together[i], alone[0]), MIXED[i]
    finally:
        torch.set_num_threads(before)


def test_neutral_requests_touch_nothing() -> None:
    logits = logits_of(2)
    history = TokenHistory(2, 64, VOCAB)
    stages = Stages(2)
    for row in range(2):
        for state in (history, *stages):
            state.add(row, request_of(), OUTPUT)
    assert not apply_stages(stages, logits, LogitRows.of(history, np.arange(2)))


def test_a_removed_row_is_neutral_again() -> None:
    stages = Stages(1)
    history = TokenHistory(1, 64, VOCAB)
    request = request_of(**CASES["all"][0], logit_bias={1: 1.0}, min_tokens=9, presence_penalty=1.0)
    for stage in stages:
        stage.add(0, request, OUTPUT)
        stage.remove(0)
    history.add(0, request_of(), OUTPUT)
    assert not apply_stages(stages, logits_of(1), LogitRows.of(history, np.arange(1)))


def test_a_watermark_can_be_detected() -> None:
    """Text drawn from marked noise has far more green tokens than chance gives."""
    mark, output = Watermark(gamma=0.25, delta=3.0), [5]
    theirs = WatermarkLogitsProcessor(VOCAB, "cpu", greenlist_ratio=0.25, bias=3.0)
    green = 0
    for step in range(60):
        request = request_of(prompt=[1], output=output, watermark=mark)
        token = int(processed(logits_of(1, seed=step), [request]).argmax())
        green += token in theirs._get_greenlist_ids(torch.tensor(output)).tolist()
        output = [*output, token]
    assert green > 30  # 15 are expected of unmarked text, with a deviation of 3.4
