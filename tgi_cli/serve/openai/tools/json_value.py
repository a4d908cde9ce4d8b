"""Finds where a JSON object or array ends in a text that arrives in pieces.

Looks only at quotes and brackets, each character once. Whether the value is valid JSON is decided
when all of it is there.
"""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')
_CLOSES = {"{": "}", "[": "]"}

#: A value nested deeper than this is no call.
MAX_DEPTH = 256


class ValueScanner:
    """Scans one value; `broken` once its brackets cannot match any more."""

    def __init__(self) -> None:
        self.broken = False
        self._open: list[str] = []
        self._in_string = False
        self._escaped = False

    def scan(self, text: str, at: int) -> int | None:
        """Go on at `text[at]`; the position after the value, or after what broke it.

        None when the value goes on beyond the text.
        """
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_INSIDE if self._in_string else _OUTSIDE).search(text, at)
            if found is None:
                return None
            at = found.end()
            if self._step(found[0]):
                return at
        return None

    def _step(self, char: str) -> bool:
        """Take one quote, backslash or bracket; whether the value ends with it."""
        if char == '"':
            self._in_string = not self._in_string
        elif char == "\\":
            self._escaped = True
        elif char in _CLOSES:
            self._open.append(_CLOSES[char])
            self.broken = len(self._open) > MAX_DEPTH
        else:
            self.broken = self._open.pop() != char
        return self.broken or not self._open
