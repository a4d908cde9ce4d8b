"""Steps that begin before they are asked for: the same tokens as without, whatever comes between.

The oracle is the same engine with the guessing taken out, and each request alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.engine import make_core, request_of, run
from tests.kernels.test_native_step import VARIANTS
from tests.kernels.test_steps_ahead import UNCAPPED
from tests.tiny.adapters import make_adapter
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.decode_run import DecodeRun
from tgi_cli.engine.messages import Abort, Request
from tgi_cli.engine.runner import ModelRunner
from tgi_cli.engine.step import NewRow, ScheduledRow, Step

Checkpoints = Callable[..., Path]
VOCAB = 512
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "seed": 11},
    {"repetition_penalty": 1.2},
    {"frequency_penalty": 0.5, "temperature": 0.7, "seed": 5},
    {"temperature": 1.3, "top_k": 40, "min_p": 0.02, "seed": 3},
]

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the native kernels are not built here")


def requests(*, new: int = 40) -> list[Request]:
    """Lengths around those of blocks; some answers end by a token of the model's own choice."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, length in enumerate((5, 15, 16, 17, 33, 47)):
        prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        stops = {"stop_token_ids": tuple(range(i, VOCAB, 23))} if i % 2 else {"ignore_eos": True}
        made.append(request_of(f"r{i}", prompt, max_tokens=new + i, **stops, **SAMPLINGS[i]))
    return made


def runner_of(core: EngineCore) -> ModelRunner:
    runner = core._executor._runner  # type: ignore[attr-defined]
    assert isinstance(runner, ModelRunner)
    return runner


def guessing(core: EngineCore) -> DecodeRun:
    decode_run = runner_of(core)._decode_run
    assert decode_run is not None
    return decode_run


class Counted:
    """Counts the steps that had begun before they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.guessed = 0
        plain = DecodeRun.go_on

        def counted(this: DecodeRun) -> Any:
            self.guessed += 1
            return plain(this)

        monkeypatch.setattr(DecodeRun, "go_on", counted)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def tokens(core: EngineCore, chosen: list[Request], **options: Any) -> dict[str, list[int]]:
    return {name: answer.token_ids for name, answer in run(core, chosen, **options).items()}


def without(core: EngineCore) -> EngineCore:
    runner_of(core)._decode_run = None
    return core


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_the_same_tokens_as_without(
    family: str, kv_cache_dtype: str, tiny_checkpoint: Checkpoints, counted: Counted
) -> None:
    path = tiny_checkpoint(family, dtype=torch.bfloat16, **UNCAPPED.get(family, {}))

    def core(**options: Any) -> EngineCore:
        return make_core(
            path, dtype="bfloat16", block_size=16, kv_cache_dtype=kv_cache_dtype, **options
        )

    expected = tokens(without(core()), requests(new=75))
    assert counted.guessed == 0
    assert any(len(ids) < 60 for ids in expected.values())  # some stopped
    lonely = core()
    for request in requests(new=75):
        assert tokens(lonely, [request])[request.id] == expected[request.id]
    alone = counted.guessed
    # All but the first two tokens and those at the beginning of a block.
    assert alone >= sum(len(ids) - 3 - len(ids) // 16 for ids in expected.values())
    for stagger in (0, 1, 3, 9):
        assert tokens(core(), requests(new=75), stagger=stagger) == expected, stagger
    assert counted.guessed > alone
    crowded = core(kv_cache_tokens=144, max_model_len=128, prefix_caching=False)
    assert tokens(crowded, requests(new=75), stagger=1) == expected
    assert crowded.stats().preemptions > 0


def test_strangers_that_come_and_go_change_nothing(
    tiny_checkpoint: Checkpoints, counted: Counted
) -> None:
    """Aborts, requests of other kinds and rows that are used again between any two steps."""
    path = tiny_checkpoint("llama", dtype=torch.bfloat16)
    core = make_core(path, dtype="bfloat16", block_size=16)
    [kept] = [request for request in requests(new=120) if request.id == "r2"]
    expected = tokens(without(make_core(path, dtype="bfloat16", block_size=16)), [kept])["r2"]
    core.accept(kept)
    produced: list[int] = []
    others = iter(range(100))
    running: list[str] = []
    for number in range(300):
        if not core.has_work():
            break
        if number % 7 == 3:
            name = f"stranger-{next(others)}"
            wish = [{}, {"logprobs": 2}, {"typical_p": 0.8, "temperature": 1.0}][number % 3]
            core.accept(request_of(name, [3, 4, 5 + number], max_tokens=9, **wish))
            running.append(name)
        if number % 11 == 8 and running:
            core.accept(Abort([running.pop()]))
        for delta in core.step():
            assert delta.error is None
            if delta.id == "r2":
                produced += delta.token_ids
    assert produced == expected
    assert counted.guessed > 20


def test_a_wrong_guess_leaves_the_cache_as_it_was(tiny_checkpoint: Checkpoints) -> None:
    """Answers read what others cached, though each of those ended in a step too many."""
    path = tiny_checkpoint("llama", dtype=torch.bfloat16)
    core = make_core(path, dtype="bfloat16", block_size=16)
    first = request_of("first", list(range(3, 30)), max_tokens=23, ignore_eos=True)
    answer = tokens(core, [first])["first"]
    again = request_of("again", [*range(3, 30), *answer], max_tokens=30, ignore_eos=True)
    fresh = without(make_core(path, dtype="bfloat16", block_size=16, prefix_caching=False))
    assert tokens(core, [again])["again"] == tokens(fresh, [again])["again"]
    assert core.stats().prefix_hit_tokens >= 48


def test_an_adapter_goes_on_with_its_row(
    tiny_checkpoint: Checkpoints, tmp_path: Path, counted: Counted
) -> None:
    path = tiny_checkpoint("llama", dtype=torch.bfloat16)
    adapters = [f"a={make_adapter(path, tmp_path / 'adapter')}"]

    def asked() -> list[Request]:
        plain = request_of("plain", [3, 4, 5], max_tokens=14, ignore_eos=True)
        with_it = request_of("with", [3, 4, 5], max_tokens=14, ignore_eos=True, adapter="a")
        return [plain, with_it]

    core = make_core(path, dtype="bfloat16", block_size=16, adapters=adapters)
    expected = tokens(
        without(make_core(path, dtype="bfloat16", block_size=16, adapters=adapters)), asked()
    )
    assert expected["plain"] != expected["with"]
    assert tokens(core, asked()) == expected
    assert counted.guessed > 8


def test_who_wants_more_than_a_token_is_not_guessed_for(
    tiny_checkpoint: Checkpoints, counted: Counted
) -> None:
    path = tiny_checkpoint("llama", dtype=torch.bfloat16)
    core = make_core(path, dtype="bfloat16", block_size=16)
    for wish in (
        {"logprobs": 1},
        {"typical_p": 0.5, "temperature": 1.0},
        {"min_tokens": 12, "stop_token_ids": (4,)},
    ):
        tokens(core, [request_of("r", [3, 4, 5], max_tokens=12, **wish)])
    assert counted.guessed == 0


def test_logits_that_are_not_native_are_not_guessed(
    tiny_checkpoint: Checkpoints, counted: Counted
) -> None:
    path = tiny_checkpoint("gemma3", dtype=torch.bfloat16)  # torch bends them
    core = make_core(path, dtype="bfloat16", block_size=16)
    assert runner_of(core).deterministic
    tokens(core, requests()[:2])
    assert counted.guessed == 0


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_changes_nothing(
    num_threads: int, tiny_checkpoint: Checkpoints
) -> None:
    path = tiny_checkpoint("llama", dtype=torch.bfloat16)
    expected = tokens(make_core(path, dtype="bfloat16", block_size=16), requests())
    core = make_core(path, dtype="bfloat16", block_size=16, num_threads=num_threads)
    assert tokens(core, requests()) == expected


def test_a_step_that_was_not_collected_is_kept(tiny_checkpoint: Checkpoints) -> None:
    """Another kind of step may be submitted before it is: its tokens come in their turn."""
    path = tiny_checkpoint("llama", dtype=torch.bfloat16)
    core = make_core(path, dtype="bfloat16", block_size=16)
    decode_run = guessing(core)
    request = request_of("r", [3, 4, 5], max_tokens=30, ignore_eos=True)
    expected = tokens(core, [request])["r"]
    core.accept(request)
    produced = [token for _ in range(6) for delta in core.step() for token in delta.token_ids]
    scheduler, executor = core._scheduler, core._executor
    step = scheduler.schedule()
    assert step is not None
    executor.submit(step)
    decode_run.end()
    [delta] = scheduler.update(step, executor.collect())
    produced += delta.token_ids
    while core.has_work():
        produced += [token for delta in core.step() for token in delta.token_ids]
    assert produced == expected


def test_a_row_that_is_used_again_is_not_taken_for_the_last_one(
    tiny_checkpoint: Checkpoints,
) -> None:
    """Another sequence at the very position that was guessed, and a position that was not."""
    path = tiny_checkpoint("llama", dtype=torch.bfloat16)
    first, second = list(range(3, 11)), [*range(3, 10), 400]

    def enters(prompt: list[int]) -> NewRow:
        request = request_of(str(prompt), prompt, max_tokens=30, ignore_eos=True)
        return NewRow(row=0, request=request, block_ids=([1, 2],))

    def drawn(runner: ModelRunner, start: int, count: int = 1, **step: Any) -> list[int]:
        row = ScheduledRow(row=0, start=start, num_tokens=count, sample=True)
        runner.submit(Step(id=0, rows=[row], **step))
        return runner.collect().rows[0].token_ids

    fresh = runner_of(make_core(path, dtype="bfloat16", block_size=16))
    expected = drawn(fresh, 0, 8, new_rows=[enters(second)])
    core = make_core(path, dtype="bfloat16", block_size=16)
    runner = runner_of(core)
    assert drawn(runner, 0, 7, new_rows=[enters(first[:7])])
    assert drawn(runner, 6) != expected  # and guesses the step at 7
    assert drawn(runner, 7, new_rows=[enters(second)], removed_rows=[0]) == expected
    elsewhere = ScheduledRow(row=0, start=10, num_tokens=1, sample=True)
    assert guessing(core)._room > 0
    assert not guessing(core).goes_on_with([elsewhere])
