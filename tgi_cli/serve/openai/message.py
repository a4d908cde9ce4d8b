"""An assistant's message out of an answer's text: reasoning, content and tool calls.

The same reader serves streams, delta by delta, and whole replies. Knows OpenAI's message shape,
but neither chunks nor SSE.
"""

from __future__ import annotations

import secrets
from typing import Any

from tgi_cli.serve.openai.reasoning import ReasoningSplit
from tgi_cli.serve.openai.tools.parser import CallStart, Piece, ToolParser


class MessageReader:
    """Reads one answer. Without `split` and `parser` all of it is content.

    `parallel` false keeps the first call alone; `show_reasoning` false leaves the reasoning out.
    """

    def __init__(
        self,
        split: ReasoningSplit | None,
        parser: ToolParser | None,
        *,
        parallel: bool = True,
        show_reasoning: bool = True,
    ) -> None:
        self.num_calls = 0
        self._split = split
        self._parser = parser
        self._parallel = parallel
        self._show_reasoning = show_reasoning
        self._dropping = False  # inside a call beyond the one that is wanted

    @property
    def plain(self) -> bool:
        """Whether all of the text is content, as it stands."""
        return self._split is None and self._parser is None

    def push(self, text: str) -> list[dict[str, Any]]:
        """The deltas that new text gives."""
        if self._split is None and self._parser is None:
            return [{"content": text}] if text else []
        reasoning, content = ("", text) if self._split is None else self._split.push(text)
        return self._deltas(reasoning, content)

    def finish(self) -> list[dict[str, Any]]:
        """The deltas of what was held back."""
        deltas: list[dict[str, Any]] = []
        if self._split is not None:
            deltas = self._deltas(*self._split.finish())
        if self._parser is not None:
            deltas += self._of_pieces(self._parser.finish())
        return deltas

    def whole(self, text: str) -> dict[str, Any]:
        """The message of a complete answer."""
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[dict[str, Any]] = []
        for delta in (*self.push(text), *self.finish()):
            content.append(delta.get("content", ""))
            reasoning.append(delta.get("reasoning_content", ""))
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    calls.append({key: part[key] for key in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        said = "".join(content)
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if self._split is not None and self._show_reasoning:
            message["reasoning_content"] = "".join(reasoning) or None
        if calls:
            message["content"] = said or None
            message["tool_calls"] = calls
        return message

    def _deltas(self, reasoning: str, content: str) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if reasoning and self._show_reasoning:
            deltas.append({"reasoning_content": reasoning})
        if content and self._parser is None:
            deltas.append({"content": content})
        elif content and self._parser is not None:
            deltas += self._of_pieces(self._parser.push(content))
        return deltas

    def _of_pieces(self, pieces: list[Piece]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, str):
                deltas.append({"content": piece})
            elif isinstance(piece, CallStart):
                self._dropping = self.num_calls > 0 and not self._parallel
                if not self._dropping:
                    deltas.append({"tool_calls": [self._start(piece.name)]})
            elif not self._dropping:
                part = {"index": self.num_calls - 1, "function": {"arguments": piece.text}}
                deltas.append({"tool_calls": [part]})
        return deltas

    def _start(self, name: str) -> dict[str, Any]:
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
