"""What the native routes accept: TGI's fields, its two sets of defaults, its rules and messages.

Differences on purpose: `top_p: 1` and `typical_p: 1` mean off instead of being refused, and what
this server cannot do yet is refused instead of ignored.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tgi_cli.config import ServerConfig
from tgi_cli.errors import InvalidRequest
from tgi_cli.sampling import MAX_SEED, SamplingParams, Watermark
from tgi_cli.serve.frontdoor import new_seed


class Parameters(msgspec.Struct, kw_only=True):
    """`parameters` of a native request. None is "not given"."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: int | None = None
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Any = None
    watermark: bool = False
    adapter_id: str | None = None

    @property
    def samples(self) -> bool:
        """Whether any field asks for sampling, as the `best_of` check counts it."""
        warpers = (self.temperature, self.top_k, self.top_p, self.typical_p)
        return self.do_sample or any(value is not None for value in warpers)

    @property
    def greedy(self) -> bool:
        """Whether nothing makes the sampler sample."""
        active = (
            self.temperature not in (None, 1.0),
            self.top_k is not None,
            self.top_p not in (None, 1.0),
            self.typical_p not in (None, 1.0),
        )
        return not (self.do_sample or any(active))

    @property
    def wants_details(self) -> bool:
        """Whether the answer carries `details`."""
        return self.details or self.decoder_input_details


class GenerateRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /generate`, `/generate_stream`, `/` and `/tokenize`."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool = False

    @property
    def effective(self) -> Parameters:
        """The parameters; without any, TGI samples."""
        return Parameters(do_sample=True) if self.parameters is None else self.parameters


def check(given: Parameters, config: ServerConfig, *, stream: bool) -> None:
    """Apply TGI's rules between fields, in its order. Raises `InvalidRequest`."""
    _check_best_of(given, config.max_best_of, stream=stream)
    _positive("temperature", given.temperature)
    _positive("repetition_penalty", given.repetition_penalty)
    if given.frequency_penalty is not None and not -2.0 <= given.frequency_penalty <= 2.0:
        raise _invalid("frequency_penalty", "must be >= -2.0 and <= 2.0", given.frequency_penalty)
    for name in ("top_p", "typical_p"):
        value = getattr(given, name)
        if value is not None and not 0.0 < value <= 1.0:
            raise _invalid(name, "must be > 0.0 and <= 1.0", value)
    _positive("top_k", given.top_k)
    _positive("max_new_tokens", given.max_new_tokens)
    if len(given.stop) > config.max_stop_sequences:
        raise _invalid(
            "stop",
            f"supports up to {config.max_stop_sequences} stop sequences",
            len(given.stop),
            "--max-stop-sequences",
        )
    if given.seed is not None and not 0 <= given.seed <= MAX_SEED:
        raise _invalid("seed", f"must be >= 0 and <= {MAX_SEED}", given.seed)
    top = given.top_n_tokens
    if top is not None and not 0 <= top <= config.max_top_n_tokens:
        rule = f"must be >= 0 and <= {config.max_top_n_tokens}"
        raise _invalid("top_n_tokens", rule, top, "--max-top-n-tokens")
    if stream and given.decoder_input_details:
        raise InvalidRequest(
            "`decoder_input_details` == true is not supported when streaming tokens",
            param="decoder_input_details",
        )


def _check_best_of(given: Parameters, limit: int, *, stream: bool) -> None:
    best_of = 1 if given.best_of is None else given.best_of
    if best_of == 1:
        return
    if stream:
        raise InvalidRequest(
            "`best_of` != 1 is not supported when streaming tokens", param="best_of"
        )
    if limit == 1:
        raise InvalidRequest("`best_of` != 1 is not allowed for this endpoint", param="best_of")
    if not 0 < best_of <= limit:
        raise _invalid("best_of", f"must be > 0 and <= {limit}", best_of, "--max-best-of")
    if not given.samples:
        raise InvalidRequest("you must use sampling when `best_of` is > 1", param="best_of")
    if given.seed is not None:
        raise InvalidRequest("`seed` must not be set when `best_of` > 1", param="seed")


def _positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise _invalid(name, "must be strictly positive", value)


def _invalid(name: str, rule: str, value: object, flag: str | None = None) -> InvalidRequest:
    hint = None if flag is None else f"{flag} raises the limit"
    return InvalidRequest(f"`{name}` {rule}. Given: {value}", hint=hint, param=name)


def check_truncate(truncate: int | None, max_input_tokens: int) -> None:
    """Raise `InvalidRequest` unless `truncate` is a length a prompt may have."""
    if truncate is not None and not 0 < truncate <= max_input_tokens:
        raise _invalid(
            "truncate",
            f"must be strictly positive and less than {max_input_tokens + 1}",
            truncate,
        )


def sampling_params(
    given: Parameters, config: ServerConfig, *, max_tokens: int, stream: bool
) -> SamplingParams:
    """Translate checked parameters. Token details, streams and `best_of` need log probabilities."""
    top = given.top_n_tokens or 0
    needs_logprobs = stream or given.wants_details or top > 0 or (given.best_of or 1) > 1
    return SamplingParams(
        temperature=0.0 if given.greedy else given.temperature or 1.0,
        top_k=given.top_k or 0,
        top_p=given.top_p or 1.0,
        typical_p=given.typical_p or 1.0,
        repetition_penalty=given.repetition_penalty or 1.0,
        frequency_penalty=given.frequency_penalty or 0.0,
        seed=new_seed() if given.seed is None else given.seed,
        max_tokens=max_tokens,
        stop=tuple(given.stop),
        logprobs=top if needs_logprobs else None,
        prompt_logprobs=0 if given.decoder_input_details else None,
        watermark=Watermark(gamma=config.watermark_gamma, delta=config.watermark_delta)
        if given.watermark
        else None,
    )
