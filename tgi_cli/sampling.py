"""Sampling parameters as they cross the process boundary: validated once, then trusted.

Knows neither HTTP field names nor tensors. The HTTP schemas build it, the engine's sampler stages
read it. Everything random about a request follows from `seed`, which is filled in at acceptance.
"""

from __future__ import annotations

import hashlib
import math

import msgspec

from tgi_cli.errors import InvalidRequest

#: A seed is an unsigned 64-bit integer, as in TGI.
MAX_SEED = 2**64 - 1


class Watermark(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """Which share of the vocabulary is favoured (`gamma`), and by how much (`delta`, in logits)."""

    gamma: float = 0.5
    delta: float = 2.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """How to choose the tokens of one sequence. Neutral defaults: each field off unless set.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `typical_p` 1 are off.
    `repetition_penalty` 1, `frequency_penalty` 0 and `presence_penalty` 0 are off. `logprobs` is
    None for none, or the number of alternatives beside the chosen token (0 gives the chosen
    token's alone); likewise `prompt_logprobs`. `max_tokens` counts new tokens. `stop` holds the
    stop strings, which the detokenizer watches, not the engine. Logprobs are of the raw
    distribution, before penalties, temperature and truncation.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    watermark: Watermark | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without noise."""
        return self.temperature == 0.0

    def validate(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` for the first field outside its range."""
        self._between("temperature", self.temperature, 0.0, 100.0)
        self._between("top_p", self.top_p, 0.0, 1.0, open_low=True)
        self._between("min_p", self.min_p, 0.0, 1.0)
        self._between("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        self._between("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        self._between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._between("seed", self.seed, 0, MAX_SEED)
        self._between("top_k", self.top_k, 0, 2**31 - 1)
        self._between("max_tokens", self.max_tokens, 1, 2**31 - 1)
        self._between("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            self._between("logprobs", self.logprobs, 0, vocab_size)
        if self.prompt_logprobs is not None:
            self._between("prompt_logprobs", self.prompt_logprobs, 0, vocab_size)
        if self.watermark is not None:
            self._between("watermark", self.watermark.gamma, 0.0, 1.0, open_low=True)
            self._between("watermark", self.watermark.delta, -100.0, 100.0)
        for token in self.stop_token_ids:
            self._between("stop_token_ids", token, 0, vocab_size - 1)
        for token, bias in self.logit_bias.items():
            self._between("logit_bias", token, 0, vocab_size - 1)
            self._between("logit_bias", bias, -100.0, 100.0)
        if any(not text for text in self.stop):
            raise InvalidRequest("`stop` must not hold an empty string", param="stop")

    @staticmethod
    def _between(
        name: str, value: float, low: float, high: float, *, open_low: bool = False
    ) -> None:
        inside = (
            math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
        )
        if not inside:
            sign = ">" if open_low else ">="
            raise InvalidRequest(
                f"`{name}` must be {sign} {low:g} and <= {high:g}. Given: {value!r}", param=name
            )


def child_seed(seed: int, index: int) -> int:
    """Seed of child `index` of an `n`/`best_of` request; child 0 keeps the request's own seed."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(
        seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8
    )
    return int.from_bytes(digest.digest(), "little")
