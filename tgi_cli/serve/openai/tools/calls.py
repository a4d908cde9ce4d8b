"""Reads calls written as JSON between marks, as text arrives.

A call is given when its JSON is complete, so a client never holds half of one; calls in an array
come with the array, or with the answer's end inside it. What is unfinished when the answer ends,
names no declared function or is not valid JSON is content. Blank space between calls, and around
them, is layout and belongs to neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from tgi_cli.serve.openai.tools.call_text import read_arguments, read_calls
from tgi_cli.serve.openai.tools.formats import CallFormat
from tgi_cli.serve.openai.tools.json_value import ValueScanner
from tgi_cli.serve.openai.tools.parser import Arguments, CallStart, Piece

_SPACE = re.compile(r"[ \t\r\n]*")
_NAME = re.compile(r"([\w.\-]+)[ \t]*(?:\[CALL_ID\][\w\-]+)?(?:\[ARGS\])?[ \t]*")
#: How the JSON of calls begins, and what may still become that.
_BEGINNING = re.compile(r"(?:\[[ \t\r\n]{0,64})?\{[ \t\r\n]{0,64}[\"}]")
_BEFORE_BEGINNING = re.compile(r"(?:\[[ \t\r\n]{0,64})?(?:\{[ \t\r\n]{0,64})?")
#: Longest name and marks before the arguments, in characters.
_MAX_HEADER = 256
#: Brackets at the end of an array that was cut, tried for the end of its last whole call.
_MAX_CUTS = 32


class CallParser:
    """A `ToolParser` for one `CallFormat`; `names` are the functions that may be called."""

    def __init__(self, form: CallFormat, names: Collection[str]) -> None:
        self._form = form
        self._names = names
        self._state: Callable[[int], int | None] = self._content
        self._text = ""  # being read; what must be seen again stays for the next push
        self._out: list[Piece] = []
        self._spaces: list[str] = []  # seen, not yet known to be content
        self._raw: list[str] = []  # a possible call so far, with its marks
        self._value: list[str] = []  # its JSON so far
        self._name: str | None = None  # of a call whose name stands outside its JSON
        self._scanner = ValueScanner()
        self._untouched = True  # nothing but blank space has been written
        self._after_call = False  # nothing but blank space since the last call
        self._closed = False  # the last call's closing mark has been read

    def push(self, text: str) -> list[Piece]:
        """Take the next text of the answer."""
        self._text += text  # what is left from before is shorter than a mark or a header
        at: int | None = 0
        while at is not None and at < len(self._text):
            at = self._state(at)
        if at is not None:
            self._text = ""
        return self._take()

    def finish(self) -> list[Piece]:
        """Give the rest: a call that is not complete is content."""
        self._cut_array()
        self._give_up()
        self._write(self._text)
        self._text = ""
        if not self._after_call:
            self._out += ["".join(self._spaces)] if self._spaces else []
        self._spaces.clear()
        return self._take()

    def _cut_array(self) -> None:
        """Give the calls that are whole in an array that is not."""
        value = "".join(self._value)
        if self._state != self._inside or self._name is not None or not value.startswith("["):
            return
        end = len(value)
        for _ in range(_MAX_CUTS):
            end = value.rfind("}", 0, end)
            if end < 0:
                return
            calls = read_calls(value[: end + 1] + "]", self._names)
            if calls:
                self._out += calls
                self._forget()
                self._write(value[end + 1 :].lstrip(", \t\r\n"))
                return

    # Each state reads `self._text` from a position and gives the next one. None: it needs more
    # text, and has left in `self._text` what it wants to see again.

    def _content(self, at: int) -> int | None:
        """Outside calls."""
        text, opening = self._text, self._form.opening
        if self._form.bare and self._untouched:
            start = _end_of(_SPACE, text, at)
            self._write(text[at:start])
            at = start
            if at == len(text):
                return at
            if text[at] in "{[":
                return self._begin_value(at)
        found = -1 if opening is None else text.find(opening, at)
        if opening is not None and found >= 0:
            self._write(text[at:found])
            self._raw.append(opening)
            self._state = self._opened
            return found + len(opening)
        held = 0 if opening is None else _overlap(text, at, opening)
        self._write(text[at : len(text) - held])
        if not held:
            return len(text)
        self._text = text[-held:]
        return None

    def _opened(self, at: int) -> int | None:
        """After an opening or a separator: a value must follow, or a name."""
        start = _end_of(_SPACE, self._text, at)
        self._raw.append(self._text[at:start])
        if start == len(self._text):
            return start
        char = self._text[start]
        if char in "{[":
            return self._begin_value(start)
        if self._form.named:
            self._state = self._header
            return start
        return self._no_call(start)

    def _header(self, at: int) -> int | None:
        """A function's name before its arguments."""
        brace = self._text.find("{", at, at + _MAX_HEADER)
        if brace < 0:
            if len(self._text) - at >= _MAX_HEADER or "\n" in self._text[at:]:
                return self._no_call(at)
            self._text = self._text[at:]
            return None
        header = self._text[at:brace]
        match = _NAME.fullmatch(header)
        if match is None or match[1] not in self._names:
            return self._no_call(at)
        self._raw.append(header)
        self._name = match[1]
        return self._begin_value(brace)

    def _begin_value(self, at: int) -> int | None:
        """At a bracket: prose such as `[sic]` must not be held until its bracket closes."""
        self._state = self._begin_value
        if _BEGINNING.match(self._text, at):
            self._scanner = ValueScanner()
            self._state = self._inside
            return at
        if _BEFORE_BEGINNING.fullmatch(self._text, at):
            self._text = self._text[at:]
            return None
        self._raw.append(self._text[at])
        return self._no_call(at + 1)

    def _inside(self, at: int) -> int | None:
        """Inside the JSON."""
        end = self._scanner.scan(self._text, at)
        self._value.append(self._text[at:end])
        if end is None:
            return len(self._text)
        calls = None if self._scanner.broken else self._read("".join(self._value))
        if calls is None:
            return self._no_call(end)
        self._out += calls
        self._forget()
        self._spaces.clear()
        self._untouched = self._closed = False
        self._after_call = True
        self._state = self._closing
        return end

    def _read(self, value: str) -> list[Piece] | None:
        if self._name is None:
            return read_calls(value, self._names)
        arguments = read_arguments(value)
        return None if arguments is None else [CallStart(self._name), Arguments(arguments)]

    def _closing(self, at: int) -> int | None:
        """After a call: its closing mark, another call, or content."""
        text, closing = self._text, self._form.closing
        start = _end_of(_SPACE, text, at)
        if start > at:
            self._spaces.append(text[at:start])
        if start == len(text):
            return start
        if closing is not None and not self._closed:
            if text.startswith(closing, start):
                self._closed = True
                return start + len(closing)
            if closing.startswith(text[start:]):
                self._text = text[start:]
                return None
        if text[start] in self._form.separators:
            self._raw += [*self._spaces, text[start]]
            self._spaces.clear()
            self._state = self._opened
            return start + 1
        if self._form.bare and text[start] == "{":
            return self._begin_value(start)
        self._state = self._content
        return start

    def _no_call(self, at: int) -> int:
        """What was held is content; go on as outside calls."""
        self._give_up()
        self._state = self._content
        return at

    def _give_up(self) -> None:
        held = "".join(self._raw) + "".join(self._value)
        self._forget()
        self._write(held)

    def _forget(self) -> None:
        self._raw.clear()
        self._value.clear()
        self._name = None

    def _write(self, text: str) -> None:
        """Give content; the blank space at its end waits for what follows."""
        solid = text.rstrip(" \t\r\n")
        if solid:
            self._out += ["".join((*self._spaces, solid))]
            self._spaces.clear()
            self._untouched = self._after_call = False
        if len(solid) < len(text):
            self._spaces.append(text[len(solid) :])

    def _take(self) -> list[Piece]:
        out, self._out = self._out, []
        return out


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()


def _overlap(text: str, at: int, mark: str) -> int:
    """Length of the longest end of `text[at:]` that begins `mark`."""
    longest = min(len(mark) - 1, len(text) - at)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
