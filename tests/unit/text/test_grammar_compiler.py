"""Grammars over a tiny vocabulary: masks against brute force, and every refusal's sentence."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import make_tokenizer
from tests.unit.text.factories import gguf_bpe, gguf_gemma, gguf_sentencepiece
from tgi_cli import grammar_compiler
from tgi_cli.errors import InvalidRequest
from tgi_cli.grammar import Grammar
from tgi_cli.grammar_compiler import GrammarCompiler, GrammarMatcher
from tgi_cli.tokenizer import Tokenizer, load_tokenizer

#: More columns than the tokenizer has tokens, and no multiple of 32, as models have it.
VOCAB_SIZE = 541


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(lambda: tokenizer, VOCAB_SIZE)


def allowed(compiler: GrammarCompiler, matcher: GrammarMatcher) -> tuple[set[int], bool]:
    """Tokens that may come next, and whether the text may end."""
    words = np.zeros(compiler.num_words, np.int32)
    matcher.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    size = compiler.vocab_size
    assert not bits[size + 1 :].any()
    return set(np.flatnonzero(bits[:size]).tolist()), bool(bits[size])


def products(parts: Iterable[Iterable[str]]) -> set[str]:
    return {"".join(chosen) for chosen in itertools.product(*parts)}


FINITE = {
    "alternatives": (Grammar.regex("the|then|there|th"), {"the", "then", "there", "th"}),
    "repetition": (
        Grammar.regex("(a|bc){1,3}d?"),
        {w + d for n in (1, 2, 3) for w in products([("a", "bc")] * n) for d in ("", "d")},
    ),
    "unicode": (Grammar.regex("[é東🙂]{2}"), products(["é東🙂"] * 2)),
    "digits are ten": (Grammar.regex(r"\d\d"), products(["0123456789"] * 2)),
    "choice": (Grammar.choice(["yes", "no", 'a "b"\n', "東京"]), {"yes", "no", 'a "b"\n', "東京"}),
    "enum": (Grammar.json_schema({"enum": ["on", "off", 12]}), {'"on"', '"off"', "12"}),
    "boolean": (Grammar.json_schema({"type": "boolean"}), {"true", "false"}),
    "bounds": (
        Grammar.json_schema({"type": "integer", "minimum": 8, "maximum": 112}),
        {str(n) for n in range(8, 113)},
    ),
    "lark": (Grammar.lark('start: "x" item "y"\nitem: "1" | "22"'), {"x1y", "x22y"}),
    "gbnf": (Grammar.lark('root ::= "on" | "off"'), {"on", "off"}),
    "anchors": (Grammar.regex("^ab?$"), {"a", "ab"}),
}


@pytest.mark.parametrize("name", FINITE)
def test_masks_equal_brute_force(
    name: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """In every state that tokens can reach: exactly those that some text goes on with.

    But where the next character is certain, perhaps fewer: how it is written may be certain too.
    """
    grammar, language = FINITE[name]
    texts = {text.encode() for text in language}
    tokens = {
        i: raw
        for i in range(tokenizer.vocab_size)
        if (raw := tokenizer.token_bytes(i)) and not tokenizer.is_special(i)
    }
    seen: set[bytes] = set()
    open_paths: list[list[int]] = [[]]
    while open_paths:
        path = open_paths.pop()
        prefix = b"".join(tokens[i] for i in path)
        if prefix in seen:
            continue
        seen.add(prefix)
        matcher = compiler.compile(grammar).start()
        assert matcher.consume(path) == len(path)
        expected = {
            i for i, raw in tokens.items() if any(text.startswith(prefix + raw) for text in texts)
        }
        if path and not expected:
            assert matcher.complete
        masked, may_end = allowed(compiler, matcher)
        assert may_end == (prefix in texts)
        following = {
            text[len(prefix)] for text in texts if text.startswith(prefix) and text != prefix
        }
        if len(following) > 1 or may_end:
            assert masked == expected
        else:  # what must come is written as the tokenizer writes it
            assert masked <= expected
            assert bool(masked) == bool(expected)
        open_paths += [[*path, i] for i in expected]
    assert texts <= seen


@pytest.mark.parametrize("make", [gguf_bpe, gguf_sentencepiece, gguf_gemma])
def test_forced_texts_come_out_whole_with_every_kind_of_tokenizer(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    """SentencePiece would put a space before what must come next; byte fallback splits it."""
    options = ("gpt-2",) if make is gguf_bpe else ()
    tokenizer = load_tokenizer(str(make(tmp_path / "model.gguf", *options)))
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)
    for text in ("hello world, 12", "x\n 東京 🙂"):
        matcher = compiler.compile(Grammar.choice([text, "-"])).start()
        ids: list[int] = []
        while not matcher.complete:
            following, _ = allowed(compiler, matcher)
            wanted = [
                i
                for i in following
                if text.encode().startswith(b"".join(map(tokenizer.token_bytes, [*ids, i])))
            ]
            ids.append(max(wanted, key=lambda i: len(tokenizer.token_bytes(i))))
            assert matcher.consume(ids[-1:]) == 1
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_rollback_is_undoing(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Grammar.regex("[a-z ]{3,8}!")).start()
    ids = tokenizer.encode("cached!", add_special_tokens=False)
    states = []
    for token in ids:
        states.append(allowed(compiler, matcher))
        assert matcher.consume([token]) == 1
    assert matcher.complete
    for back in range(1, len(ids) + 1):
        matcher.rollback(back)
        assert not matcher.complete
        assert allowed(compiler, matcher) == states[-back]
        assert matcher.consume(ids[-back:]) == back
        assert matcher.complete


def test_matchers_of_one_grammar_do_not_know_each_other(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(Grammar.choice(["aa", "bb"]))
    first, second = compiled.start(), compiled.start()
    before = allowed(compiler, second)
    [token, *_] = sorted(before[0])
    first.consume([token])
    assert allowed(compiler, second) == before


def test_a_token_that_does_not_follow_is_not_taken(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(Grammar.regex("ab")).start()
    ids = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "axb"]
    assert matcher.consume(ids) == 1
    assert not matcher.complete
    assert matcher.failed is None
    assert matcher.consume(ids[2:]) == 1
    assert matcher.complete


def test_blanks_between_json_tokens_are_bounded(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    blank = tokenizer.encode(" ", add_special_tokens=False)
    matcher = compiler.compile(Grammar.json_object()).start()
    matcher.consume(tokenizer.encode("{", add_special_tokens=False))
    assert sum(matcher.consume(blank) for _ in range(100)) == 40


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar.json_schema({"type": "strin"}), "invalid type: strin"),
        (Grammar.json_schema("[1]"), "a schema must be an object or a boolean"),
        (Grammar.json_schema("{"), "expecting property name"),
        (Grammar.json_schema({"not": {}}), 'unimplemented keys: ["not"]'),
        (Grammar.json_schema({"x-guidance": {"lenient": True}, "not": {}}), 'keys: ["not"]'),
        (Grammar.json_schema(False), "nothing satisfies"),
        (Grammar.json_schema({"$ref": "#/$defs/x"}), "pointer '/$defs/x' does not exist"),
        (
            Grammar.json_schema({"type": "string", "minLength": 3, "maxLength": 2}),
            "minLength (3) is greater than maxLength (2)",
        ),
        (Grammar.json_schema('{"items":' * 600 + "{}" + "}" * 600), "recursion limit"),
        (Grammar.json_schema({"pattern": "(?=a)b"}), "look-around"),
        (Grammar.regex("("), "unclosed group"),
        (Grammar.regex("a(?!b)"), "look-ahead and look-behind, is not supported"),
        (Grammar.regex(""), "no text other than the empty one"),
        (Grammar.regex("(" * 3000 + "a" + ")" * 3000), "..."),
        (Grammar.choice([]), "at least one text"),
        (Grammar.choice([""]), "no text other than the empty one"),
        (Grammar.lark('start: "a" b'), 'unknown name: "b"'),
        (Grammar.lark("root ::= ("), "Expected ')'"),
        (Grammar.lark("start: <|nonsense|>"), "nonsense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_grammar_is_refused_in_one_sentence(
    compiler: GrammarCompiler, grammar: Grammar, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(grammar)
    message = caught.value.message
    assert message.startswith("grammar is not valid: ")
    assert words in message
    assert "\n" not in message
    assert len(message) < 400


def test_compiled_grammars_are_kept_and_those_in_use_stay(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "_NUM_KEPT", 2)
    compiler = GrammarCompiler(lambda: tokenizer, VOCAB_SIZE)
    assert not compiler.prepared
    grammars = [Grammar.choice([name]) for name in "abc"]
    held = compiler.compile(grammars[0])
    assert compiler.prepared
    assert compiler.compile(grammars[0]) is held
    for grammar in grammars[1:]:
        compiler.compile(grammar)
    compiler.compile(Grammar.choice(["d"]))  # b and a are no longer among the two last ones
    assert compiler.cached(grammars[1]) is None
    assert compiler.cached(grammars[0]) is held


def test_equal_sources_are_one_grammar() -> None:
    schema = {"type": "object", "properties": {"ü": {"type": "null"}}}
    assert Grammar.json_schema(schema) == Grammar.json_schema(
        json.dumps(schema, ensure_ascii=False)
    )
    assert hash(Grammar.regex("a")) == hash(Grammar.regex("a"))
    assert Grammar.regex("a") != Grammar.lark("a")
