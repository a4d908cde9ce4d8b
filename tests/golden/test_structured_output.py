"""Answers of real decoders held to grammars: always valid, and the same whatever else runs.

The weights are random, so nothing but the grammar makes an answer well-formed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import torch

from tests.golden.engine import Answer, make_core, request_of, run
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.messages import Request
from tgi_cli.grammar import Grammar
from tgi_cli.kernels.cpu import library
from tgi_cli.tokenizer import Tokenizer, load_tokenizer

TIGHT = {"x-guidance": {"whitespace_pattern": " "}}
STRING = {"type": "string", "maxLength": 6}


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": record(a=record(b=record(c={"type": "boolean"}), d=STRING), e={"type": "null"}),
    "enum": record(colour={"enum": ["rot", "grün", "blå", 3, None]}, kind={"const": "東京"}),
    "numbers": record(
        n={"type": "integer", "minimum": -3, "maximum": 1200},
        x={"type": "number", "minimum": 0, "exclusiveMaximum": 2.5},
    ),
    "arrays": record(
        tags={"type": "array", "items": STRING, "minItems": 1, "maxItems": 3},
        pair={
            "prefixItems": [{"type": "boolean"}, {"enum": ["l", "r"]}],
            "items": False,
            "minItems": 2,
            "type": "array",
        },
    ),
    "optional": {
        **record(id={"enum": [1, 2, 3]}, note={"enum": ["a", "b"]}, more={"type": "boolean"}),
        "required": ["id"],
    },
    "references": {
        **record(left={"$ref": "#/$defs/tree"}, right={"$ref": "#/$defs/leaf"}),
        "$defs": {
            "leaf": record(v={"type": "boolean"}),
            "tree": {"anyOf": [{"$ref": "#/$defs/leaf"}, record(t={"$ref": "#/$defs/leaf"})]},
        },
    },
    "strings": record(
        code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        day={"type": "string", "format": "date"},
        one={"type": "string", "minLength": 1, "maxLength": 4},
    ),
    "alternatives": {"anyOf": [record(a={"type": "boolean"}), {"enum": ["none", "ünï"]}]},
    "top-level array": {"type": "array", "items": {"enum": [True, "x"]}, "maxItems": 4},
}

TEXTS = {
    "regex": (Grammar.regex(r"\d{2,3}(\.[a-fé]{2})?"), r"[0-9]{2,3}(\.[a-fé]{2})?"),
    "choice": (Grammar.choice(["ja", "nein", "🙂 vielleicht"]), "ja|nein|🙂 vielleicht"),
    "grammar": (
        Grammar.lark('start: "<" WORD ("," WORD)~1..2 ">"\nWORD: /[a-c]{1,3}/'),
        "<[a-c]{1,3}(,[a-c]{1,3}){1,2}>",
    ),
}


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(str(path))


@pytest.fixture(scope="module")
def core(path: Path) -> EngineCore:
    return make_core(path, max_model_len=512, kv_cache_tokens=8192)


def constrained(name: str, grammar: Grammar, tokenizer: Tokenizer, **sampling: Any) -> Request:
    sampling.setdefault("max_tokens", 400)
    request = request_of(name, tokenizer.encode("The answer is ", False), **sampling)
    eos = tuple(tokenizer.eos_token_ids)
    return msgspec.structs.replace(request, grammar=grammar, eos_token_ids=eos)


def variants(grammar: Grammar, tokenizer: Tokenizer) -> list[Request]:
    """Greedy and sampled, truncated and penalized, with the end token ignored and asked to wait."""
    chosen: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.5, "seed": 2, "top_p": 0.7, "logprobs": 2},
        {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3, "ignore_eos": True},
        {"temperature": 1.0, "seed": 4, "top_k": 5, "min_tokens": 300, "typical_p": 0.9},
    ]
    return [
        constrained(f"r{i}", grammar, tokenizer, **sampling) for i, sampling in enumerate(chosen)
    ]


def text_of(answer: Answer, tokenizer: Tokenizer) -> str:
    assert answer.last.finish in ("eos", "stop")
    raw = b"".join(map(tokenizer.token_bytes, answer.token_ids[: _length(answer, tokenizer)]))
    return raw.decode()  # and strictly: no half characters


def _length(answer: Answer, tokenizer: Tokenizer) -> int:
    ended = answer.token_ids[-1] in tokenizer.eos_token_ids
    return len(answer.token_ids) - ended


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_is_valid(name: str, core: EngineCore, tokenizer: Tokenizer) -> None:
    schema = SCHEMAS[name]
    answers = run(core, variants(Grammar.json_schema({**schema, **TIGHT}), tokenizer))
    checker = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for answer in answers.values():
        checker.validate(json.loads(text_of(answer, tokenizer)))


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_of_their_grammar(name: str, core: EngineCore, tokenizer: Tokenizer) -> None:
    grammar, pattern = TEXTS[name]
    for answer in run(core, variants(grammar, tokenizer)).values():
        assert re.fullmatch(pattern, text_of(answer, tokenizer))


def test_logprobs_are_of_the_raw_distribution(core: EngineCore, tokenizer: Tokenizer) -> None:
    """A forced text has the log probabilities that it has as a prompt."""
    text = "qzx wvk"
    grammar = Grammar.choice([text])
    request = constrained("r", grammar, tokenizer, logprobs=1)
    answer = run(core, [request])["r"]
    entries = [entry for delta in answer.deltas for entry in delta.logprobs or []]
    assert [entry.token_id for entry in entries] == answer.token_ids
    assert any(entry.rank > 1 and entry.top_ids[0] != entry.token_id for entry in entries)
    scored = request_of("s", request.prompt_ids + answer.token_ids, max_tokens=1, prompt_logprobs=1)
    prompt_logprobs = run(core, [scored])["s"].deltas[0].prompt_logprobs
    assert prompt_logprobs is not None
    for entry, expected in zip(entries, prompt_logprobs[len(request.prompt_ids) :], strict=True):
        assert expected is not None
        assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_an_answer_may_be_cut(core: EngineCore, tokenizer: Tokenizer) -> None:
    answer = run(core, [constrained("r", Grammar.regex("[a-z]{40}"), tokenizer, max_tokens=3)])["r"]
    assert (answer.last.finish, len(answer.token_ids)) == ("length", 3)
    whole = run(core, [constrained("r", Grammar.choice(["a"]), tokenizer, max_tokens=1)])["r"]
    assert whole.last.finish == "stop"  # complete and cut at once: complete


@pytest.mark.skipif(library.load() is None, reason="the native kernels are not built")
def test_one_request_one_answer(tiny_checkpoint: Callable[..., Path], tokenizer: Tokenizer) -> None:
    """Promise one with grammars: alone, in batches, in chunks, preempted, on prefix hits."""
    path = tiny_checkpoint("llama", dtype=torch.bfloat16)
    grammars = [Grammar.json_schema({**schema, **TIGHT}) for schema in SCHEMAS.values()]
    sampling = {"temperature": 1.0, "max_tokens": 60, "logprobs": 1}
    requests = [
        constrained(f"r{i}", grammar, tokenizer, seed=i, **sampling)
        for i, grammar in enumerate([*grammars[:5], TEXTS["regex"][0]])
    ]
    free = request_of("free", requests[0].prompt_ids, max_tokens=60, seed=9, temperature=1.0)
    requests.insert(2, free)

    def core(**options: Any) -> EngineCore:
        return make_core(path, dtype="bfloat16", block_size=16, **options)

    def outcome(core: EngineCore, chosen: list[Request], **options: Any) -> dict[str, Any]:
        return {
            name: (a.token_ids, [lp for d in a.deltas for lp in d.logprobs or []], a.last.finish)
            for name, a in run(core, chosen, **options).items()
        }

    lonely = core(prefix_caching=False)
    assert lonely.facts.deterministic
    expected: dict[str, Any] = {}
    for request in requests:
        expected |= outcome(lonely, [request])
    batched = core(max_batch_tokens=19)
    assert outcome(batched, requests, stagger=2) == expected
    assert outcome(batched, requests) == expected
    tight = core(kv_cache_tokens=160, max_model_len=96, prefix_caching=False)
    for _ in range(2):  # once compiled, no grammar keeps a request from running with the others
        assert outcome(tight, requests) == expected
    assert tight.stats().preemptions > 0
