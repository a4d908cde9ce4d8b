"""What every tool-call format has in common: text in, content and calls out.

A parser never raises on what a model writes and never loses it: what turns out not to be a call
is content, character for character. Knows neither HTTP nor tokens.
"""

from __future__ import annotations

from typing import Protocol

import msgspec


class CallStart(msgspec.Struct, frozen=True, gc=False):
    """A call of the function `name` begins; its arguments follow."""

    name: str


class Arguments(msgspec.Struct, frozen=True, gc=False):
    """More of the last call's arguments, as JSON text."""

    text: str


#: A `str` is content.
Piece = str | CallStart | Arguments


class ToolParser(Protocol):
    """Reads one answer. Takes time linear in its length, however it is cut into pieces."""

    def push(self, text: str) -> list[Piece]:
        """Take the next text of the answer; give what has become certain."""
        ...

    def finish(self) -> list[Piece]:
        """The answer has ended: give what was held back."""
        ...


class NamedCallParser:
    """For an answer that a grammar makes the arguments of one function: all of it is arguments."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> list[Piece]:
        """Pass the text on as arguments."""
        if not text:
            return []
        start: list[Piece] = [] if self._begun else [CallStart(self._name)]
        self._begun = True
        return [*start, Arguments(text)]

    def finish(self) -> list[Piece]:
        """Nothing is ever held back."""
        return []
