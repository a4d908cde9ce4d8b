"""From a `Grammar` to masks over the vocabulary, by `llguidance`.

The one place that knows that library. HTTP workers compile to refuse what is wrong before an
answer begins, the engine to constrain it; both with this code over the same tokenizer. Knows no
logits, no rows and no requests. Everything here may be used from several threads, except that a
matcher belongs to one at a time.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final
from weakref import WeakValueDictionary

import llguidance
import numpy as np
from numpy.typing import NDArray

from tgi_cli.errors import InvalidRequest
from tgi_cli.grammar import Grammar, GrammarKind
from tgi_cli.tokenizer import Tokenizer

#: Seconds a grammar may take to compile. Sane ones take milliseconds.
COMPILE_DEADLINE: Final = 10.0
#: Characters of a grammar: the compiler recurses over them, on a stack that ends.
MAX_SOURCE: Final = 1 << 18
#: Compiled grammars kept for the next request.
_NUM_KEPT: Final = 128
_MAX_MESSAGE: Final = 300
#: Between JSON's tokens. Unbounded, a weak model can write blanks until its tokens run out.
_WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{1,40}"

_LARK_PLACE = re.compile(r"^at \d+\(\d+\): ")


class GrammarMatcher:
    """Where one answer is in its grammar: a function of the grammar and the tokens consumed."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing may follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def failed(self) -> str | None:
        """Why the matcher cannot go on, None while it can."""
        return _sentence(self._matcher.get_error()) if self._matcher.is_error() else None

    def consume(self, token_ids: Sequence[int]) -> int:
        """Go on by these tokens as far as the grammar allows; return how many it took."""
        taken: int = self._matcher.try_consume_tokens(list(token_ids))
        return taken

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens consumed."""
        if num_tokens:
            self._matcher.rollback(num_tokens)

    def fill(self, words: NDArray[np.int32]) -> None:
        """Write which tokens may come next, one bit each; drops the interpreter lock meanwhile.

        Bit `vocab_size` says that the text may end here. `words` is [num_words] and contiguous.
        """
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)


class CompiledGrammar:
    """A grammar over one vocabulary, ready to be matched any number of times."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> GrammarMatcher:
        """A matcher at the beginning. Cheap: copies share what the lexer has worked out."""
        return GrammarMatcher(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars over a model's vocabulary and remembers the last ones.

    Args:
        load: gives the tokenizer; called once, when the first grammar comes.
        vocab_size: columns of the model's logits.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        #: Words of a mask: a bit for each token and one for the end of the text.
        self.num_words = (vocab_size + 1 + 31) // 32
        self._load = load
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._limits = llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=50_000)
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._recent: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        # Those in use by a request outlive their place among the recent ones.
        self._alive: WeakValueDictionary[Grammar, CompiledGrammar] = WeakValueDictionary()

    @property
    def prepared(self) -> bool:
        """Whether the vocabulary has been read: afterwards a compilation takes milliseconds."""
        return self._vocabulary is not None

    def prepare(self) -> llguidance.LLTokenizer:
        """Read the vocabulary, once: about a second for 50,000 tokens."""
        with self._building:
            if self._vocabulary is None:
                vocabulary = _Vocabulary(self._load(), self.vocab_size)
                self._vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))
            return self._vocabulary

    def cached(self, grammar: Grammar) -> CompiledGrammar | None:
        """The compiled grammar if it is at hand."""
        with self._lock:
            compiled = self._alive.get(grammar)
            if compiled is not None:
                self._recent[grammar] = compiled
                self._recent.move_to_end(grammar)
                if len(self._recent) > _NUM_KEPT:
                    self._recent.popitem(last=False)
            return compiled

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile, or find what was compiled before.

        Raises:
            InvalidRequest: `grammar is not valid: ...`, in the compiler's words.
        """
        compiled = self.cached(grammar)
        if compiled is not None:
            return compiled
        if len(grammar.source) > MAX_SOURCE:
            raise _invalid(
                f"it has {len(grammar.source):,} characters, more than the {MAX_SOURCE:,} allowed"
            )
        vocabulary = self.prepare()
        try:
            definition = _definition(grammar)
        except ValueError as error:
            raise _invalid(str(error)) from None
        except RecursionError:
            raise _invalid("it is nested too deeply") from None
        matcher = llguidance.LLMatcher(vocabulary, definition, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _invalid(matcher.get_error())
        self._check_beginning(CompiledGrammar(matcher).start())
        with self._lock:
            self._alive[grammar] = compiled = CompiledGrammar(matcher)
        self.cached(grammar)
        return compiled

    def _check_beginning(self, matcher: GrammarMatcher) -> None:
        """Refuse what no token can begin: there would be nothing to generate."""
        words = np.zeros(self.num_words, np.int32)
        matcher.fill(words)
        if matcher.failed is not None:
            raise _invalid(matcher.failed)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        if not bits[: self.vocab_size].any():
            raise _invalid("no text other than the empty one satisfies it")


class _Vocabulary:
    """What `llguidance` asks of a tokenizer, with one token more: the end of the text.

    Which tokens end an answer is the request's matter, so the grammar has an end of its own that
    no model can draw; its bit says where a text may end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = vocab_size
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.tokens.append(b"<|end of text|>")
        special = [i for i in range(vocab_size) if tokenizer.is_special(i)]
        self.special_token_ids = [*special, vocab_size]
        self._tokenizer = tokenizer
        self._by_bytes: dict[bytes, int] | None = None

    def __call__(self, text: bytes) -> list[int]:
        """Tokens whose bytes are exactly `text`, as the model would write them.

        SentencePiece puts a space before a text; behind a line break it does not.
        """
        for lead in ("", "\n"):
            ids = self._tokenizer.encode(lead + text.decode(), add_special_tokens=False)
            for skipped in range(3 if lead else 1):
                if b"".join(self.tokens[i] for i in ids[skipped:]) == text:
                    return ids[skipped:]
        return self._longest(text)

    def _longest(self, text: bytes) -> list[int]:
        """Longest matches from the left; nothing where the vocabulary lacks a byte."""
        if self._by_bytes is None:
            usable = set(range(len(self.tokens))).difference(self.special_token_ids)
            self._by_bytes = {self.tokens[i]: i for i in sorted(usable, reverse=True)}
        ids = []
        while text:
            sizes = range(min(len(text), max(map(len, self._by_bytes))), 0, -1)
            size = next((size for size in sizes if text[:size] in self._by_bytes), 0)
            if not size:
                break
            ids.append(self._by_bytes[text[:size]])
            text = text[size:]
        return ids


def _definition(grammar: Grammar) -> str:
    """The library's own notation. Raises `ValueError` for what is not even well-formed."""
    source = grammar.source
    if grammar.kind == "json_schema":
        schema = json.loads(source)
        if schema is False:
            raise ValueError("nothing satisfies the schema `false`")
        if schema is True:
            source = "{}"
        elif not isinstance(schema, dict):
            raise ValueError("a schema must be an object or a boolean")
        # Lenient, it would drop keywords that it does not know; that is not to be had here.
        return llguidance.LLMatcher.grammar_from_json_schema(
            source, {"whitespace_pattern": _WHITESPACE}, {"lenient": False}
        )
    if grammar.kind == "regex":
        # `\d` means ten digits to whoever writes it, not the 600 of Unicode.
        pattern = llguidance.regex_to_lark(source, use_ascii="d")
        return llguidance.LLMatcher.grammar_from_lark(f"start: /{pattern}/")
    if grammar.kind == "choice":
        texts = json.loads(source)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("choices must be a list of at least one text")
        return llguidance.LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        )
    if grammar.kind == "composed":
        return _composition(**json.loads(source))
    return llguidance.grammar_from("grammar", source)


def _composition(rules: str, parts: dict[str, tuple[GrammarKind, str]]) -> str:
    """Rules and the grammars they name, as one definition."""
    grammars = [{"name": "rules", "lark_grammar": rules}]
    for name, (kind, source) in parts.items():
        definition = _definition(Grammar(kind, source))
        if definition.startswith("{"):
            [inner] = json.loads(definition)["grammars"]
            grammars.append({**inner, "name": name})
        else:
            grammars.append({"name": name, "lark_grammar": definition})
    return json.dumps({"grammars": grammars})


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"grammar is not valid: {_sentence(message)}")


def _sentence(message: str) -> str:
    """The compiler's words on one line, without its pictures of the place."""
    lines = [line.strip() for line in message.splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    first = _LARK_PLACE.sub("", lines[0]) if lines else "unknown error"
    first = re.sub(r" \(in regex\): regex parse error:$|: regex parse error:$", "", first)
    if errors and first == "regex parse error:":
        first = "regex parse error"
    text = ": ".join([first, *errors[:1]])
    if len(text) > _MAX_MESSAGE:
        text = text[: _MAX_MESSAGE - 3] + "..."
    return text[:1].lower() + text[1:]
