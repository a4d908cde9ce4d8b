"""`LLM` on a tiny real model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tgi_cli
from tgi_cli.errors import EngineUnavailable, GenerationFailed, InvalidRequest, ModelMissing
from tgi_cli.grammar import Grammar
from tgi_cli.llm import LLM
from tgi_cli.sampling import SamplingParams


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Callable[..., Path]) -> Iterator[LLM]:
    with LLM(
        str(tiny_checkpoint("llama")), device="cpu", kv_cache_tokens=4096, num_threads=1
    ) as llm:
        yield llm


def greedy(max_tokens: int, **sampling: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **sampling)


def test_texts_and_ids_in_their_order(llm: LLM) -> None:
    texts = ["hello world", "a", "some longer text than that"]
    outputs = llm.generate(texts, greedy(6))
    assert [output.prompt_ids for output in outputs] == [
        llm.tokenizer.encode(text, True) for text in texts
    ]
    for output in outputs:
        assert len(output.token_ids) == 6
        assert output.finish_reason == "length"
        [alone] = llm.generate(output.prompt_ids, greedy(6))
        assert alone.token_ids == output.token_ids
        assert alone.text == output.text
    [one] = llm.generate("hello world", greedy(6))
    assert one.token_ids == outputs[0].token_ids


def test_log_probabilities(llm: LLM) -> None:
    [output] = llm.generate([4, 5, 6], greedy(3, logprobs=2, prompt_logprobs=0))
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert all(entry.rank == 1 and len(entry.top_ids) == 2 for entry in output.logprobs)
    assert output.prompt_logprobs is not None
    assert [entry and entry.token_id for entry in output.prompt_logprobs] == [None, 5, 6]


def test_a_stop_string_ends_and_is_cut(llm: LLM) -> None:
    [whole] = llm.generate("hello", greedy(20))
    middle = next(
        whole.text[i : i + 2]
        for i in range(4, len(whole.text))
        if whole.text[i : i + 2].isprintable() and "\ufffd" not in whole.text[i : i + 2]
    )
    [stopped] = llm.generate("hello", greedy(20, stop=(middle,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(middle)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < 20


def test_one_bad_prompt_fails_the_call_and_nothing_else(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        llm.generate([[1, 2], []])
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate("a", SamplingParams(temperature=-1.0))
    with pytest.raises(GenerationFailed, match="600 tokens"):
        llm.generate([[1] * 600, [1, 2]], greedy(400))
    assert len(llm.generate("a", greedy(2))[0].token_ids) == 2


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing):
        LLM(str(tmp_path / "nothing"))


def test_closed_is_closed(tiny_checkpoint: Callable[..., Path]) -> None:
    llm = LLM(str(tiny_checkpoint("llama")), device="cpu", kv_cache_tokens=512, num_threads=1)
    llm.close()
    llm.close()
    with pytest.raises(EngineUnavailable):
        llm.generate("a")


def test_the_package_loads_it_on_first_use() -> None:
    assert tgi_cli.LLM is LLM
    assert tgi_cli.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="no attribute"):
        tgi_cli.Nothing  # noqa: B018
    code = "import sys, tgi_cli; sys.exit('torch' in sys.modules or 'msgspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_answers_can_be_held_to_a_grammar(llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=40)
    outputs = llm.generate(["One", "Two"], sampling, grammar=Grammar.choice(["up", "down"]))
    assert {output.text for output in outputs} <= {"up", "down"}
    assert {output.finish_reason for output in outputs} <= {"stop", "eos"}
    with pytest.raises(GenerationFailed, match=r"grammar is not valid: .*unclosed group"):
        llm.generate("One", sampling, grammar=Grammar.regex("("))
    assert llm.generate("One", SamplingParams(max_tokens=2))[0].token_ids
