"""A conversation: messages, system prompt and parameters, saved and loaded as JSON.

Pure data with no terminal and no network: the REPL and the one-shot mode both drive it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tgi_cli.errors import TgiError, UsageError


class Parameter(msgspec.Struct, frozen=True):
    """One sampling parameter of the chat route: its type and its range."""

    kind: type
    minimum: float
    maximum: float = float("inf")

    def read(self, name: str, text: str) -> Any:
        """Parse `text`. Raises `UsageError` naming value and range."""
        noun = "an integer" if self.kind is int else "a number"
        limit = f"of at least {self.minimum:g}"
        if self.maximum != float("inf"):
            limit = f"from {self.minimum:g} to {self.maximum:g}"
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if value is None or not self.minimum <= value <= self.maximum:
            raise UsageError(f"{name} is {text!r} but must be {noun} {limit}")
        return value


#: Parameters that `/params` can set; the server's defaults hold for those that are not.
PARAMETERS = {
    "temperature": Parameter(float, 0, 100),
    "top_p": Parameter(float, 0, 1),
    "top_k": Parameter(int, 0),
    "min_p": Parameter(float, 0, 1),
    "max_tokens": Parameter(int, 1),
    "seed": Parameter(int, 0, 2**64 - 1),
    "repetition_penalty": Parameter(float, 0, 100),
    "frequency_penalty": Parameter(float, -2, 2),
    "presence_penalty": Parameter(float, -2, 2),
}


class Message(msgspec.Struct, frozen=True):
    """One turn, as the chat route takes it."""

    role: str
    content: str


class SavedChat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file that `/save` writes and `/load` reads."""

    model: str
    system: str | None = None
    params: dict[str, float | int] = {}
    messages: list[Message] = []


class AnswerStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one answer took. Times in seconds; tokens are None if the server did not count."""

    seconds: float
    first_token: float | None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def line(self) -> str:
        """One line for the terminal."""
        parts = []
        if self.prompt_tokens is not None and self.completion_tokens is not None:
            parts.append(f"{self.prompt_tokens} + {self.completion_tokens} tokens")
        if self.first_token is not None:
            parts.append(f"first after {self.first_token:.2f} s")
            if self.completion_tokens and self.completion_tokens > 1:
                spent = max(self.seconds - self.first_token, 1e-9)
                parts.append(f"then {(self.completion_tokens - 1) / spent:.1f} tokens/s")
        parts.append(f"{self.seconds:.2f} s in all")
        return ", ".join(parts)


@dataclass
class ChatSession:
    """One conversation with one model."""

    model: str
    system: str | None = None
    params: dict[str, float | int] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    answers: list[AnswerStats] = field(default_factory=list)

    def body(self, question: str) -> dict[str, Any]:
        """The chat request that asks `question` next."""
        messages = [Message("user", question)]
        messages[:0] = self.messages
        if self.system:
            messages.insert(0, Message("system", self.system))
        return {
            "model": self.model,
            "messages": msgspec.to_builtins(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.params,
        }

    def add(self, question: str, answer: str, stats: AnswerStats) -> None:
        """Keep a turn. A question whose answer has no text is dropped, as if never asked."""
        self.answers.append(stats)
        if answer:
            self.messages += [Message("user", question), Message("assistant", answer)]

    def reset(self) -> None:
        """Forget the messages; system prompt and parameters stay."""
        self.messages.clear()

    def set_param(self, assignment: str) -> None:
        """Apply `name=value`; an empty value goes back to the server's default."""
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if name not in PARAMETERS or not equals:
            raise UsageError(
                f"cannot set {assignment!r}",
                hint=f"write name=value with one of {', '.join(PARAMETERS)}",
            )
        if text.strip():
            self.params[name] = PARAMETERS[name].read(name, text.strip())
        else:
            self.params.pop(name, None)

    def save(self, path: Path) -> None:
        """Write the conversation. Raises `TgiError` when the file cannot be written."""
        saved = SavedChat(
            model=self.model, system=self.system, params=self.params, messages=self.messages
        )
        try:
            path.write_bytes(msgspec.json.format(msgspec.json.encode(saved), indent=2) + b"\n")
        except OSError as error:
            raise TgiError(f"cannot write {path}: {(error.strerror or '').lower()}") from error

    def load(self, path: Path) -> None:
        """Replace messages, system prompt and parameters by those of a file; the model stays.

        Raises `TgiError` when the file cannot be read or is not a saved chat.
        """
        try:
            saved = msgspec.json.decode(path.read_bytes(), type=SavedChat)
        except OSError as error:
            raise TgiError(f"cannot read {path}: {(error.strerror or '').lower()}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TgiError(f"{path} is not a saved chat: {error}") from error
        self.params = {
            name: PARAMETERS[name].read(name, str(value))
            for name, value in saved.params.items()
            if name in PARAMETERS
        }
        self.system, self.messages = saved.system, list(saved.messages)
