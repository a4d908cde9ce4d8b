"""What `/v1` replies share: identity, finish reasons, logprobs, usage."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import orjson

from tgi_cli import __version__
from tgi_cli.engine.messages import ModelFacts, TokenLogprobs
from tgi_cli.serve.answer import Answer
from tgi_cli.tokenizer import Tokenizer


class Envelope:
    """The fields that every chunk of one reply repeats."""

    def __init__(self, prefix: str, kind: str, model: str, facts: ModelFacts) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self._fields = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"{__version__}-{facts.backend}",
        }

    def body(self, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        """A whole reply, or one chunk as an object."""
        return {**self._fields, "choices": choices, **extra}

    def event(self, choices: list[dict[str, Any]], **extra: Any) -> bytes:
        """One chunk as an SSE event."""
        return b"data: " + orjson.dumps(self.body(choices, **extra)) + b"\n\n"

    def text_event(self, index: int, **extra: Any) -> tuple[bytes, bytes]:
        """What stands before and after the JSON text of a chunk that brings content alone.

        Most chunks do, and all that differs between them is that text.
        """
        delta = {"index": index, "delta": {"content": ""}, "logprobs": None, "finish_reason": None}
        head, _, tail = self.event([delta], **extra).rpartition(b'""')
        return head, tail


def finish_reason(finish: str | None) -> str | None:
    """`length`, or OpenAI's one word for every other end."""
    if finish is None or finish == "length":
        return finish
    return "stop"


def usage(num_prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens read and written; the cached part of the prompt as OpenAI reports it."""
    return usage_so_far(
        num_prompt_tokens, sum(len(answer.output_ids) for answer in answers), answers
    )


def usage_so_far(
    num_prompt_tokens: int, completion: int, answers: Sequence[Answer]
) -> dict[str, Any]:
    """Like `usage`, at the moment when `completion` tokens have been sent."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": num_prompt_tokens + completion,
        "prompt_tokens_details": {
            "cached_tokens": max((answer.num_cached_tokens for answer in answers), default=0)
        },
    }


def prompt_logprobs_report(answer: Answer, tokenizer: Tokenizer, top: int) -> list[Any]:
    """The prompt's tokens in vLLM's shape: for each the token itself and `top` alternatives by id.

    The first is None: nothing comes before it.
    """
    report: list[Any] = []
    for entry in answer.prompt_logprobs or []:
        if entry is None:
            report.append(None)
            continue
        ranked = zip(entry.top_ids[:top], entry.top_logprobs[:top], strict=True)
        tokens = {token: (logprob, i) for i, (token, logprob) in enumerate(ranked, 1)}
        tokens = {entry.token_id: (entry.logprob, entry.rank), **tokens}
        report.append(
            {
                str(token): {
                    "logprob": logprob,
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(token),
                }
                for token, (logprob, rank) in tokens.items()
            }
        )
    return report


def chat_logprobs(
    entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: per token its text, its bytes and `top` alternatives."""
    return {
        "content": [
            {
                **_token(entry.token_id, entry.logprob, tokenizer),
                "top_logprobs": [
                    _token(token, logprob, tokenizer)
                    for token, logprob in zip(
                        entry.top_ids[:top], entry.top_logprobs[:top], strict=True
                    )
                ],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """`choices[].logprobs` of a text completion, piece by piece: offsets run on between pieces."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._offset = 0

    def piece(
        self,
        token_ids: Sequence[int],
        texts: Sequence[str],
        entries: Sequence[TokenLogprobs | None],
    ) -> dict[str, Any]:
        """The parallel lists for some tokens; an entry is None for the prompt's first token."""
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        text_of = self._tokenizer.token_text
        return {
            "tokens": [text_of(token) for token in token_ids],
            "token_logprobs": [entry.logprob if entry else None for entry in entries],
            "top_logprobs": [
                {
                    text_of(token): logprob
                    for token, logprob in zip(
                        entry.top_ids[: self._top], entry.top_logprobs[: self._top], strict=True
                    )
                }
                if entry
                else None
                for entry in entries
            ],
            "text_offset": offsets,
        }
