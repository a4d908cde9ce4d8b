"""Tells a model's reasoning, between `<think>` and `</think>`, from what it says.

Blank space beside the tags is layout and belongs to neither part. Knows only text.
"""

from __future__ import annotations

from typing import Final

OPEN: Final = "<think>"
CLOSE: Final = "</think>"
_SPACE: Final = " \t\r\n"


class ReasoningSplit:
    """Splits one answer as it arrives, in linear time.

    Reasoning stands at an answer's beginning or nowhere: a `<think>` later on is content.
    `inside`: the prompt has opened it already, as some templates do.
    """

    def __init__(self, *, inside: bool) -> None:
        self._state = "inside" if inside else "before"
        self._fresh = True  # no reasoning has been given yet
        self._spaces: list[str] = []  # seen, not yet known to belong to a part
        self._held = ""  # perhaps the beginning of a tag

    def push(self, text: str) -> tuple[str, str]:
        """New reasoning and new content."""
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._state == "before":
            text = self._before(text)
        if self._state == "inside":
            reasoning, text = self._inside(text)
        if self._state == "after":
            text = text.lstrip(_SPACE)
            self._state = "content" if text else "after"
        return reasoning, text

    def finish(self) -> tuple[str, str]:
        """What was held back: unfinished reasoning stays reasoning."""
        rest = "".join((*self._spaces, self._held))
        self._spaces.clear()
        self._held = ""
        return (rest, "") if self._state == "inside" else ("", rest)

    def _before(self, text: str) -> str:
        """At the beginning: what follows an opening tag, or the content if there is none."""
        start = text.lstrip(_SPACE)
        self._spaces.append(text[: len(text) - len(start)])
        if start.startswith(OPEN):
            self._state = "inside"
            self._spaces.clear()
            return start[len(OPEN) :]
        if OPEN.startswith(start):
            self._held = start
            return ""
        self._state = "content"
        text = "".join((*self._spaces, start))
        self._spaces.clear()
        return text

    def _inside(self, text: str) -> tuple[str, str]:
        """In the reasoning: its new text and what follows its end."""
        end = text.find(CLOSE)
        if end >= 0:
            reasoning = self._reason(text[:end])
            self._spaces.clear()
            self._state = "after"
            return reasoning, text[end + len(CLOSE) :]
        overlap = range(min(len(CLOSE) - 1, len(text)), 0, -1)
        sure = len(text) - next((n for n in overlap if text.endswith(CLOSE[:n])), 0)
        self._held = text[sure:]
        return self._reason(text[:sure]), ""

    def _reason(self, text: str) -> str:
        """Reasoning without the blank space at its edges; at the end it waits for more."""
        if self._fresh:
            text = text.lstrip(_SPACE)
        solid = text.rstrip(_SPACE)
        rest = text[len(solid) :]
        if solid:
            self._fresh = False
            solid = "".join((*self._spaces, solid))
            self._spaces.clear()
        if rest:
            self._spaces.append(rest)
        return solid


def begins_inside(prompt: str) -> bool:
    """Whether a prompt's last words open the reasoning."""
    return prompt.rstrip(_SPACE).endswith(OPEN)
