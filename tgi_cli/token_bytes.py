"""What each token adds to the text, in bytes: the decoder of a `tokenizers.Tokenizer`, taken apart.

A decoder that is a function of one token at a time (byte-level BPE, SentencePiece with byte
fallback, Metaspace) can be run incrementally and exactly, which re-decoding a growing list cannot.
Anything else is refused at load rather than approximated. Knows nothing of requests or stops.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Tokenizer

from tgi_cli.errors import UnsupportedModel


def _byte_alphabet() -> dict[str, int]:
    """Byte by character of byte-level BPE (Radford et al. 2019): printable Latin-1 stands for
    itself, the other 68 bytes for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET: Final = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Turns one vocabulary entry into the bytes it stands for.

    Attributes:
        convert: Bytes of an entry in the middle of a text.
        strip: What disappears at the very start of a text: `none`, one leading `space` of the
            text, or every leading space of the first `token` (Metaspace).
    """

    convert: Callable[[str], bytes]
    strip: str

    def first(self, raw: bytes) -> bytes:
        """`raw` as it appears when it begins the text."""
        if self.strip == "space":
            return raw.removeprefix(b" ")
        return raw.replace(b" ", b"") if self.strip == "token" else raw


def byte_level(entry: str) -> bytes:
    """Bytes of a byte-level BPE entry; one with other characters is an added token, plain text."""
    try:
        return bytes([_ALPHABET[char] for char in entry])
    except KeyError:
        return entry.encode()


def _byte_fallback(entry: str) -> bytes | None:
    """The byte an entry such as `<0x0A>` stands for."""
    if len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">"):
        try:
            return bytes([int(entry[3:5], 16)])
        except ValueError:
            return None
    return None


def token_bytes_of(tokenizer: Tokenizer, source: str) -> TokenBytes:
    """Take the decoder of `tokenizer` apart.

    Args:
        tokenizer: Any fast tokenizer.
        source: Its file, for the message.

    Raises:
        UnsupportedModel: The decoder looks at more than one token at a time.
    """
    # Its pickled state is its JSON; serializing the whole tokenizer would copy the vocabulary.
    state = tokenizer.decoder.__getstate__() if tokenizer.decoder else b"null"
    steps = _flatten(json.loads(state))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenBytes(byte_level, "none")
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        strip = "none" if steps[0].get("prepend_scheme", "always") == "never" else "token"
        return TokenBytes(lambda entry: entry.replace(mark, " ").encode(), strip)
    if not kinds:
        # Without a decoder tokens are joined by spaces.
        return TokenBytes(lambda entry: b" " + entry.encode(), "space")
    return _replacing(steps, source)


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _replacing(steps: list[dict[str, Any]], source: str) -> TokenBytes:
    """A chain of replacements, byte fallback and, once fused, one leading space stripped."""
    replacements: list[tuple[str, str]] = []
    fallback, fused, strip = False, False, "none"
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"] and not (fallback or fused):
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback" and not fused:
            fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and (step["content"], step["stop"]) == (" ", 0):
            if step["start"] > 1:
                raise _unsupported(step, source)
            strip = "space" if step["start"] else strip
        else:
            raise _unsupported(step, source)

    def convert(entry: str) -> bytes:
        for old, new in replacements:
            entry = entry.replace(old, new)
        byte = _byte_fallback(entry) if fallback else None
        return entry.encode() if byte is None else byte

    return TokenBytes(convert, strip)


def _unsupported(step: dict[str, Any], source: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the tokenizer `{source}` has the decoder step `{step['type']}`, which cannot be run "
        f"token by token",
        hint="supported are byte-level BPE, SentencePiece with byte fallback and Metaspace",
    )
