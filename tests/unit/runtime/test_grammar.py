"""The grammar's stage and queue: masks on logits, drafts, ends, parked requests, deadlines."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import make_tokenizer
from tests.unit.runtime.harness import Bench, make_request
from tests.unit.runtime.test_core import FACTS, CountingExecutor, make_core
from tgi_cli.config import SchedulerConfig
from tgi_cli.engine.block_table import KVGroupLayout
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.grammar import GrammarMask
from tgi_cli.engine.grammar_queue import GrammarQueue
from tgi_cli.engine.inline_client import InlineClient
from tgi_cli.engine.messages import Abort, Request
from tgi_cli.engine.process import ZmqTransport
from tgi_cli.engine.rows import LogitRows, TokenHistory
from tgi_cli.engine.sampler import Sampler
from tgi_cli.engine.scheduler import Scheduler
from tgi_cli.errors import InvalidRequest
from tgi_cli.grammar import Grammar
from tgi_cli.grammar_compiler import CompiledGrammar, GrammarCompiler
from tgi_cli.kernels.backend import select
from tgi_cli.tokenizer import Tokenizer, load_tokenizer

VOCAB = 512
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(lambda: tokenizer, VOCAB)


@pytest.fixture
def bench(compiler: GrammarCompiler) -> Bench:
    return Bench(Sampler(select("cpu").ops, 4, compiler), TokenHistory(4, 64, VOCAB))


def constrained(
    grammar: Grammar | None, output_ids: Sequence[int] = (), **sampling: Any
) -> Request:
    sampling.setdefault("temperature", 0.0)
    request = make_request([5, 6], output_ids, eos_token_ids=(EOS,), **sampling)
    return msgspec.structs.replace(request, grammar=grammar)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a character, so that every prefix of the text is a prefix of the tokens."""
    return [token for c in text for token in tokenizer.encode(c, add_special_tokens=False)]


def logits_for(*orders: Sequence[int]) -> torch.Tensor:
    """Logit rows that like these ids best, in this order; the others follow by their id."""
    rows = torch.linspace(0, -1, VOCAB).repeat(len(orders), 1)
    for row, order in zip(rows, orders, strict=True):
        for rank, token in enumerate(order):
            row[token] = 10.0 - rank
    return rows


def test_only_rows_with_a_grammar_are_masked(bench: Bench, tokenizer: Tokenizer) -> None:
    x, y, a = ids_of(tokenizer, "xya")
    bench.put(0, constrained(None))
    bench.put(1, constrained(Grammar.regex("[ab]c")))
    bench.put(2, constrained(Grammar.choice(["y", "z"]), logprobs=2))
    logits = logits_for([x, y, a], [x, y, a], [x, y, a])
    sampled = bench.sample(logits, [0, 1, 2])
    assert sampled.token_ids.tolist() == [x, a, y]
    assert sampled.valid.all()
    # Log probabilities are the model's own: the likeliest token is the one that was forbidden.
    entry = sampled.logprobs[2]
    assert entry.top_ids == [x, y]
    assert (entry.token_id, entry.rank) == (y, 2)
    bench.take(1)
    bench.put(1, constrained(None))
    assert bench.sample(logits[1:2], [1]).token_ids.tolist() == [x]


def test_a_text_ends_where_the_grammar_lets_it_end(bench: Bench, tokenizer: Tokenizer) -> None:
    a, x = ids_of(tokenizer, "ax")
    bench.put(0, constrained(Grammar.regex("a+")))
    bench.put(1, constrained(Grammar.regex("a+"), [a]))
    bench.put(2, constrained(Grammar.regex("a+"), [a], ignore_eos=True, max_tokens=9))
    bench.put(3, constrained(Grammar.regex("a+"), [a], min_tokens=2))
    logits = logits_for(*[[EOS, x, a]] * 4)
    assert bench.sample(logits, [0, 1, 2, 3]).token_ids.tolist() == [a, EOS, a, a]
    assert bench.sampler.accept(0, [a]) is None
    assert bench.sampler.accept(1, [EOS]) == 1  # an end token ends it where the text may end


def test_a_complete_text_ends_the_answer(bench: Bench, tokenizer: Tokenizer) -> None:
    a, b = ids_of(tokenizer, "ab")
    bench.put(0, constrained(Grammar.choice(["ab"]), min_tokens=5, ignore_eos=True))
    assert bench.sampler.accept(0, [a]) is None
    assert bench.sampler.accept(0, [b]) == 1
    bench.put(0, constrained(Grammar.choice(["ab", "ba"])))
    assert bench.sampler.accept(0, [a, b, EOS]) == 2
    bench.put(1, constrained(None))
    assert bench.sampler.accept(1, [a, b]) is None


def test_masks_follow_drafts_and_forget_them(bench: Bench, tokenizer: Tokenizer) -> None:
    """1 + k logit rows: each masked as if the drafts before it were the answer."""
    a, b, c, x = ids_of(tokenizer, "abcx")
    grammar = Grammar.regex("a(b|c)c?")
    bench.put(0, constrained(grammar))
    bench.put(1, constrained(None))

    def draw(drafts: list[int], likes: Sequence[Sequence[int]]) -> list[int]:
        bench.history.propose(0, drafts)
        batch = LogitRows.of(bench.history, np.array([0, 1]), np.array([len(drafts), 0]))
        bench.sampler.prepare(batch)
        sampled = bench.sampler.sample(logits_for(*likes, [x]), batch)
        assert sampled.token_ids[-1] == x
        return sampled.token_ids[:-1].tolist()

    like = [x, EOS, b, a, c]
    # Behind `abc` the text is whole: nothing but its end, whatever the model likes.
    assert draw([a, b, c], [like] * 4) == [a, b, EOS, EOS]
    assert draw([a, c], [like] * 3) == [a, b, EOS]
    assert draw([x, c], [like] * 3)[0] == a  # what stands behind a wrong draft is not looked at
    assert draw([], [like]) == [a]
    assert bench.sampler.accept(0, [a]) is None
    bench.history.append(0, [a])
    assert draw([c, c], [like] * 3) == [b, EOS, EOS]


@given(data=st.data())
def test_rows_are_a_function_of_request_and_outputs(
    data: st.DataObject, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """Rows destroyed and rebuilt at random, beside others, draw what an untouched one draws."""
    grammars = [
        Grammar.regex("[ab]{2,4}(é|東)c*"),
        Grammar.json_schema(
            {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "ü"]}},
                "required": ["a"],
                "additionalProperties": False,
            }
        ),
        Grammar.lark('start: "(" start ")" | "0"'),
    ]
    ops = select("cpu").ops
    request = constrained(
        data.draw(st.sampled_from(grammars)), temperature=1.0, seed=data.draw(st.integers(0, 99))
    )
    stranger = constrained(grammars[0], temperature=1.0, seed=3)
    steps = 14
    logits = torch.randn(steps, VOCAB, generator=torch.Generator().manual_seed(1))

    def answer(rebuild: Callable[[], bool], crowd: bool) -> list[int]:
        bench = Bench(Sampler(ops, 4, compiler), TokenHistory(4, 64, VOCAB))
        row, outputs = 0, list[int]()
        bench.put(row, request)
        for step in range(steps):
            if rebuild():
                bench.take(row)
                row = (row + 1) % 3
                bench.put(row, msgspec.structs.replace(request, output_ids=list(outputs)))
            rows = [row]
            if crowd:
                bench.put(3, stranger)
                rows = [3, row]
            sampled = bench.sample(logits[step].repeat(len(rows), 1), rows)
            token = int(sampled.token_ids[-1])
            outputs.append(token)
            bench.history.append(row, [token])
            if bench.sampler.accept(row, [token]) is not None:
                break
        return outputs

    untouched = answer(lambda: False, crowd=False)
    assert answer(lambda: data.draw(st.booleans()), crowd=True) == untouched


@pytest.mark.parametrize(
    ("text", "words"), [("ax", "output token 1 does not follow"), ("ab", "nothing can follow")]
)
def test_outputs_that_cannot_be_resumed_are_refused(
    text: str, words: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    mask = GrammarMask(2, compiler)
    outputs = ids_of(tokenizer, text)
    with pytest.raises(InvalidRequest, match=words):
        mask.add(0, constrained(Grammar.choice(["ab", "ac"]), outputs), outputs)


def test_a_matcher_that_gives_up_ends_its_row_alone(bench: Bench, tokenizer: Tokenizer) -> None:
    bench.put(0, constrained(Grammar.regex("a+b")))
    bench.put(1, constrained(Grammar.regex("a+b")))
    [x] = ids_of(tokenizer, "x")
    # A matcher that is given what it forbids is broken for good, as one is that hits a limit.
    bench.sampler._grammar._constraints[0].matcher._matcher.consume_token(x)
    sampled = bench.sample(logits_for([x], [x]), [0, 1])
    assert sampled.valid.tolist() == [False, True]
    assert "cannot be followed" in (bench.sampler.failure(0) or "")
    assert bench.sampler.failure(1) is None
    bench.take(0)
    assert bench.sampler.failure(0) is None


class SlowCompiler(GrammarCompiler):
    """Compiles when it is allowed to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(lambda: tokenizer, VOCAB)
        self.prepare()
        self.allowed = threading.Event()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        self.allowed.wait(30)
        return super().compile(grammar)


def core_with(queue: GrammarQueue) -> tuple[EngineCore, CountingExecutor]:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4, max_batch_tokens=16),
        groups=[KVGroupLayout(None, 65)],
        block_size=4,
        max_model_len=64,
    )
    executor = CountingExecutor()
    return EngineCore(scheduler, executor, FACTS, grammars=queue), executor


def named(name: str, grammar: Grammar | None, max_tokens: int = 3) -> Request:
    request = make_request([1, 2], request_id=name, max_tokens=max_tokens)
    return msgspec.structs.replace(request, grammar=grammar)


def step_until(core: EngineCore, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        core.step()
        time.sleep(0.001)


def wait_for_threads() -> None:
    """Return once nothing is being compiled any more."""
    deadline = time.monotonic() + 30
    while any(thread.name == "tgi-compile" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_nobody_waits_for_someone_elses_grammar(tokenizer: Tokenizer) -> None:
    compiler = SlowCompiler(tokenizer)
    queue = GrammarQueue(compiler)
    core, executor = core_with(queue)
    core.accept(named("slow", Grammar.regex("a")))
    core.accept(named("plain", None))
    ended = {delta.id for _ in range(6) for delta in core.step() if delta.finish}
    assert ended == {"plain"}
    assert len(queue) == 1
    assert core.has_work()
    compiler.allowed.set()
    step_until(core, lambda: not core.has_work())
    entered = [new.request.id for step in executor.steps for new in step.new_rows]
    assert entered == ["plain", "slow"]
    core.accept(named("again", Grammar.regex("a")))  # compiled: it does not wait
    assert len(queue) == 0
    core.close()


def test_a_grammar_has_a_deadline_and_its_request_can_be_aborted(tokenizer: Tokenizer) -> None:
    compiler = SlowCompiler(tokenizer)
    queue = GrammarQueue(compiler, deadline=0.05)
    core, _ = core_with(queue)
    core.accept(named("late", Grammar.regex("b")))
    core.accept(named("gone", Grammar.regex("c")))
    core.accept(Abort(["gone"]))
    deltas = {delta.id: delta for delta in core.step()}
    assert deltas["gone"].finish == "abort"
    seen = []
    step_until(core, lambda: bool(seen.extend(core.step()) or seen))
    assert [(delta.id, delta.finish) for delta in seen] == [("late", "error")]
    assert "takes more than 0.05 seconds" in (seen[0].error or "")
    compiler.allowed.set()
    wait_for_threads()
    assert core.step() == []  # what comes too late is of no use to anyone
    assert not core.has_work()
    core.close()


def test_a_bad_grammar_ends_its_request_alone(tokenizer: Tokenizer) -> None:
    core, _ = core_with(GrammarQueue(GrammarCompiler(lambda: tokenizer, VOCAB)))
    core.accept(named("bad", Grammar.regex("(")))
    core.accept(named("good", Grammar.regex("a")))
    with pytest.raises(InvalidRequest, match="in use"):
        core._grammars.park(named("bad", Grammar.regex("d")))
    seen = []
    step_until(core, lambda: bool(seen.extend(core.step())) or not core.has_work())
    finished = {delta.id: delta for delta in seen if delta.finish}
    assert finished["bad"].finish == "error"
    assert "unclosed group" in finished["bad"].error
    assert finished["good"].finish == "length"
    core.close()


def test_an_engine_without_grammars_refuses_them() -> None:
    core, _ = make_core()
    core.accept(named("r", Grammar.regex("a")))
    [delta] = core.step()
    assert (delta.finish, delta.error) == ("error", "grammar is not supported")


async def test_a_waiting_engine_is_woken_by_a_compiled_grammar(tokenizer: Tokenizer) -> None:
    compiler = SlowCompiler(tokenizer)
    core, _ = core_with(GrammarQueue(compiler))
    client = InlineClient(core)
    finishes = []

    async def read() -> None:
        async with aclosing(client.generate(named("r", Grammar.regex("a")))) as deltas:
            finishes.extend([delta.finish async for delta in deltas])

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    assert not finishes
    compiler.allowed.set()
    await asyncio.wait_for(reading, 30)
    assert finishes[-1] == "length"
    await client.close()


def test_a_socket_transport_is_woken(tmp_path: Path) -> None:
    transport = ZmqTransport(f"ipc://{tmp_path}/engine.sock")
    threading.Timer(0.05, transport.wake).start()
    assert transport.receive(wait=True) == []
    transport.wake()
    assert transport.receive(wait=False) == []
    assert transport.receive(wait=True) == []
    transport._socket.close()
    transport._context.term()
