"""Token ids of one answer to text deltas: never half a character, never past a stop string.

Each token is turned into bytes once and the bytes run through an incremental UTF-8 decoder, so the
work is linear in the answer and the deltas joined are exactly the decoded answer. Lives beside the
client's connection; the engine knows no text. Does not know finish reasons or the API's formats.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from tgi_cli.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes in UTF-8


class TextDelta(msgspec.Struct, gc=False):
    """What some tokens added.

    Attributes:
        text: New text that is certain: complete characters, no possible start of a stop string.
        token_texts: One entry for each token up to the one that completed a stop string: the text
            it completed, empty where a character is still open; a special token's own spelling,
            also where `text` leaves it out. Not held back and not cut.
        stopped: The stop string found, or None.
        stop_span: Indices, in the whole answer, of the token in which the stop string begins and
            of the one that completes it; None unless stopped.
    """

    text: str
    token_texts: list[str]
    stopped: str | None = None
    stop_span: tuple[int, int] | None = None


class Detokenizer:
    """Decodes one answer as it grows.

    The prompt matters in two ways: characters may begin in it, and a leading space that
    SentencePiece vocabularies put on a text's first word is dropped only where the answer begins
    the text. Pass no prompt where the answer stands alone, as in chat. Without stop strings and
    with `visible` the complete characters of the decoded prompt::

        visible + all deltas + finish() == tokenizer.decode(prompt_ids + output_ids, skip)

    With several stop strings the one completed first ends the answer, of those completed by the
    same character the longest, whatever the token boundaries. A special token that is itself a
    stop string stops too, even where special tokens are skipped.

    Args:
        tokenizer: The model's tokenizer.
        prompt_ids: The tokens the answer continues, or none.
        stop: Texts that end the answer.
        include_stop: Keep the stop string (Text Generation Inference) or cut it (OpenAI).
        skip_special_tokens: Leave special tokens out of the text.
        keep: Special tokens that are text all the same, such as the marks of a tool call.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        keep: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in dict.fromkeys(stop) if text)
        self._include_stop = include_stop
        self._skip = skip_special_tokens
        self._keep = keep
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._num_tokens = 0
        # Nothing held back and nothing to look for: a plain token's text is its own.
        self._whole = False
        self._held = ""  # decoded, but perhaps the start of a stop string
        self._held_from: list[tuple[int, int]] = []  # (token index, characters) that make `_held`
        self._stopped: str | None = None
        self._stop_span: tuple[int, int] | None = None
        self._read_prompt(prompt_ids)

    @property
    def stopped(self) -> str | None:
        """The stop string found so far."""
        return self._stopped

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next tokens of the answer; those after a stop string are ignored."""
        if self._whole and len(token_ids) == 1:
            plain = self._tokenizer.plain_text(token_ids[0])
            if plain is not None:
                self._num_tokens += 1
                return TextDelta(plain, [plain])
        texts: list[str] = []
        token_texts: list[str] = []
        for token_id in token_ids:
            if self._stopped is not None:
                break
            text, token_text = self._push_one(token_id)
            texts.append(text)
            token_texts.append(token_text)
            self._num_tokens += 1
        self._whole = self._begun and not self._stop and not self._decoder.getstate()[0]
        return TextDelta("".join(texts), token_texts, self._stopped, self._stop_span)

    def finish(self) -> str:
        """The text still held back, U+FFFD for an unfinished character; empty after a stop."""
        if self._stopped is not None:
            return ""
        self._num_tokens -= 1  # an unfinished character belongs to the last token
        text = self._watch(self._decoder.decode(b"", final=True)) + self._held
        self._num_tokens += 1
        self._held = ""
        self._held_from.clear()
        return text

    def _read_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Leave the decoder inside the prompt's last character if that is unfinished."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if self._skip and self._tokenizer.is_special(token_id):
                continue
            raw = self._tokenizer.token_bytes(token_id)
            self._begun = self._begun or self._tokenizer.begins_text(raw)
            tail = raw + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        self._decoder.decode(tail)

    def _push_one(self, token_id: int) -> tuple[str, str]:
        if self._skip and self._tokenizer.is_special(token_id) and token_id not in self._keep:
            content = self._tokenizer.token_text(token_id)
            return (self._stop_at(content) if content in self._stop else "", content)
        raw = self._tokenizer.token_bytes(token_id)
        if not self._begun:
            self._begun = self._tokenizer.begins_text(raw)
            raw = self._tokenizer.first_bytes(raw)
        piece = self._decoder.decode(raw)
        return (self._watch(piece) if self._stop else piece, piece)

    def _stop_at(self, content: str) -> str:
        """Stop at a special token that is not part of the text."""
        text = self.finish()
        if self._stopped is None:
            self._stopped, self._stop_span = content, (self._num_tokens, self._num_tokens)
        return text

    def _watch(self, piece: str) -> str:
        """Add `piece` to the held text and release what can be in no stop string any more."""
        if not self._stop:
            return piece
        self._held += piece
        self._held_from.append((self._num_tokens, len(piece)))
        found = self._first_stop()
        if found is None:
            return self._release(len(self._held) - self._possible_start())
        start, end, self._stopped = found
        self._stop_span = (self._token_at(start), self._num_tokens)
        text = self._held[: end if self._include_stop else start]
        self._held = ""
        self._held_from.clear()
        return text

    def _first_stop(self) -> tuple[int, int, str] | None:
        """Start, end and text of the stop string that is complete first, of those the longest."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = self._held.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or (end, start) < (best[1], best[0]):
                best = (start, end, stop)
        return best

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            at = max(0, len(self._held) - len(stop) + 1)
            limit = len(self._held) - longest
            while (at := self._held.find(stop[0], at, limit)) >= 0:
                if stop.startswith(self._held[at:]):
                    longest = len(self._held) - at
                    break
                at += 1
        return longest

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        done = 0
        for token_index, length in self._held_from:
            if length > count:
                self._held_from[done] = (token_index, length - count)
                break
            count -= length
            done += 1
        del self._held_from[:done]
        return text

    def _token_at(self, position: int) -> int:
        """Index of the token that gave the character at `position` of the held text."""
        for token_index, length in self._held_from:
            if position < length:
                return token_index
            position -= length
        return self._num_tokens
