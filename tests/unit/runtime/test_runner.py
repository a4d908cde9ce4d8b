"""The runner with a tiny real model: faults of one row, drafts, log probabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.golden.engine import make_core, request_of, run
from tests.unit.runtime.harness import make_request
from tgi_cli.engine.messages import Delta
from tgi_cli.engine.runner import ModelRunner
from tgi_cli.engine.step import NewRow, RowOutput, ScheduledRow, Step

PROMPT = list(range(10, 33))


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("gemma3")


@pytest.fixture
def runner(path: Path) -> ModelRunner:
    core = make_core(path, max_num_seqs=4)
    runner = core._executor._runner  # type: ignore[attr-defined]
    assert isinstance(runner, ModelRunner)
    return runner


def enter(row: int, request, *, blocks: range) -> NewRow:
    table = list(blocks)
    return NewRow(row=row, request=request, block_ids=(table, table))


def scheduled(row: int, start: int, count: int, drafts: list[int] | None = None) -> ScheduledRow:
    drafts = drafts or []
    return ScheduledRow(
        row=row, start=start, num_tokens=count + len(drafts), sample=True, draft_ids=drafts
    )


def step_of(runner: ModelRunner, rows, new=(), removed=()) -> list[RowOutput]:
    runner.submit(Step(id=0, rows=list(rows), new_rows=list(new), removed_rows=list(removed)))
    return runner.collect().rows


def test_a_request_that_cannot_be_prepared_fails_alone(runner: ModelRunner) -> None:
    bad = make_request([5, 10**7, 6], request_id="bad")
    good = make_request(PROMPT, request_id="good", temperature=0.0)
    rows = [scheduled(0, 0, 3), scheduled(1, 0, len(PROMPT))]
    new = [enter(0, bad, blocks=range(1, 2)), enter(1, good, blocks=range(2, 20))]
    outputs = step_of(runner, rows, new)
    assert "10000000" in (outputs[0].error or "")
    assert outputs[1].error is None
    # Its row can be used again.
    [again] = step_of(
        runner,
        [scheduled(0, 0, len(PROMPT))],
        [enter(0, good, blocks=range(20, 40))],
        removed=[0, 1],
    )
    assert again.token_ids == outputs[1].token_ids


def test_a_row_state_that_raises_is_contained(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(row: int, request: object, output_ids: object) -> None:
        raise ZeroDivisionError

    stage = runner._sampler.stages.penalties
    monkeypatch.setattr(stage, "add", broken)
    [output] = step_of(
        runner, [scheduled(0, 0, 2)], [enter(0, make_request([1, 2]), blocks=range(1, 9))]
    )
    assert "internal error" in (output.error or "")
    assert "ZeroDivisionError" in caplog.text


def test_logits_that_are_not_finite_end_their_row_only(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = runner._decoder.logits

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(hidden)
        logits[0, 3] = float("nan")
        return logits

    monkeypatch.setattr(runner._decoder, "logits", poisoned)
    requests = [make_request([i + 1, 2], request_id=str(i)) for i in range(3)]
    new = [enter(i, r, blocks=range(1 + 9 * i, 10 + 9 * i)) for i, r in enumerate(requests)]
    outputs = step_of(runner, [scheduled(i, 0, 2) for i in range(3)], new)
    assert "finite" in (outputs[0].error or "")
    assert [len(output.token_ids) for output in outputs] == [0, 1, 1]
    after = step_of(runner, [scheduled(i, 2, 1) for i in (1, 2)], removed=[0])
    assert "finite" in (after[0].error or "")  # now the first of the batch


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 5, "top_p": 0.95}], ids=str)
def test_drafts_change_nothing_but_the_number_of_steps(
    path: Path, runner: ModelRunner, sampling: dict
) -> None:
    """Right, wrong and half-right drafts, verified against what was drawn without any."""
    request = make_request(PROMPT, logprobs=1, **sampling)
    new = enter(0, request, blocks=range(1, 40))
    [first] = step_of(runner, [scheduled(0, 0, len(PROMPT))], [new])
    expected, logprobs = list(first.token_ids), list(first.logprobs or [])
    for i in range(14):
        [output] = step_of(runner, [scheduled(0, len(PROMPT) + i, 1)])
        expected += output.token_ids
        logprobs += output.logprobs or []
    again = enter(1, request, blocks=range(40, 80))
    [first] = step_of(runner, [scheduled(1, 0, len(PROMPT))], [again])
    produced, seen = list(first.token_ids), list(first.logprobs or [])
    for num_right, num_wrong in ((3, 0), (0, 2), (1, 2), (0, 0), (2, 1)):
        done = len(produced)
        wrong = [(expected[done + num_right] + 1) % 500] * num_wrong
        drafts = expected[done : done + num_right] + wrong
        [output] = step_of(runner, [scheduled(1, len(PROMPT) + done - 1, 1, drafts)])
        assert len(output.token_ids) == num_right + 1
        assert len(output.logprobs or []) == num_right + 1
        produced += output.token_ids
        seen += output.logprobs or []
    assert produced == expected[: len(produced)]
    assert [entry.token_id for entry in seen] == produced
    for mine, plain in zip(seen, logprobs, strict=False):
        assert mine.logprob == pytest.approx(plain.logprob, abs=1e-4)


@pytest.mark.parametrize("chunk", [5, 64])
def test_prompt_logprobs_are_those_of_transformers(path: Path, chunk: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), -1)
    core = make_core(path, max_batch_tokens=chunk, max_num_seqs=3)
    warm = request_of("warm", PROMPT, max_tokens=2)  # fills the prefix cache
    asked = request_of("asked", PROMPT, max_tokens=3, prompt_logprobs=2, logprobs=0)
    run(core, [warm])
    answers = run(core, [asked, request_of("stranger", PROMPT[:7], max_tokens=5)])
    first: Delta = answers["asked"].deltas[0]
    entries = first.prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    assert len(entries) == len(PROMPT)
    for position, entry in enumerate(entries[1:]):
        assert entry is not None
        row = expected[position]
        assert entry.token_id == PROMPT[position + 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        assert entry.top_ids == row.topk(2).indices.tolist()
    assert all(delta.prompt_logprobs is None for delta in answers["stranger"].deltas)
    [chosen] = first.logprobs or []
    assert chosen.logprob == pytest.approx(float(expected[-1, chosen.token_id]), abs=1e-4)


def test_sampled_answers_survive_preemption(path: Path) -> None:
    """Seeded sampling with penalties, in a pool so small that rows are destroyed and rebuilt."""
    requests = [
        request_of(
            f"r{i}",
            PROMPT[: 5 + i],
            temperature=1.0,
            seed=i,
            top_p=0.95,
            frequency_penalty=0.5,
            repetition_penalty=1.1,
            min_tokens=30,
            max_tokens=40,
            logprobs=0,
        )
        for i in range(5)
    ]
    roomy = make_core(path, prefix_caching=False)
    tight = make_core(path, kv_cache_tokens=112, max_model_len=64, prefix_caching=False)
    expected, actual = run(roomy, requests), run(tight, requests)
    assert tight.stats().preemptions > 0
    assert roomy.stats().preemptions == 0
    for request in requests:
        assert actual[request.id].token_ids == expected[request.id].token_ids
