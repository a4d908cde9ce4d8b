"""Typed reading of `config.json` that fails on every key it was not told about.

A key nobody reads may change the mathematics ("wrong but fluent"), so families read each key,
demand a value for it, or list it as ignored; `finish` refuses the rest. Knows no family.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tgi_cli.errors import CheckpointError, UnsupportedModel

#: Bookkeeping of `transformers` and of exporters: says nothing about the mathematics here.
BOOKKEEPING = frozenset(
    {
        *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version"),
        *("_name_or_path", "_model_name_or_path", "_commit_hash", "auto_map"),
        *("_attn_implementation_autoset", "unk_token_id", "mask_token_id", "cls_token_id"),
        *("attn_implementation", "_attn_implementation", "transformers.js_config"),
        *("use_cache", "cache_implementation", "torchscript", "return_dict", "use_return_dict"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "problem_type"),
        *("id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class"),
        *("prefix", "decoder_start_token_id", "initializer_range", "pretraining_tp"),
        # Settings of `generate` that older exporters wrote here, defaults and all.
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty"),
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "bad_words_ids"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
        *("output_scores", "return_dict_in_generate", "remove_invalid_values"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens"),
        # Dropout is training's; there is none at inference.
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
        # Read by `quantize.formats.detect`, which refuses methods it does not know.
        *("quantization_config", "compression_config"),
        # Texts of special tokens, which GPT-QModel copies here.
        *("bos_token", "eos_token", "pad_token", "unk_token"),
        # Marks of fine-tuning tools.
        *("unsloth_version", "unsloth_fixed"),
    }
)


class ConfigReader:
    """One object of a configuration; `where` names it in errors."""

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self.where = where
        self._values = values
        self._seen: set[str] = set()

    def mentions(self, key: str) -> bool:
        """Whether `key` is there, be it null."""
        return key in self._values

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; without a default it must be there."""
        value = self.optional_integer(key, minimum=minimum)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.where} has no `{key}`")
        return default

    def optional_integer(self, key: str, *, minimum: int = 1) -> int | None:
        """A whole number, or None where the key is absent or null."""
        value = self._take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(key, value, f"a whole number of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; without a default it must be there."""
        value = self.optional_number(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.where} has no `{key}`")
        return default

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None where the key is absent or null."""
        value = self._take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key: str, options: Iterable[str], default: str) -> str:
        """One of some words; another one is a feature we do not have."""
        value = self._take(key)
        if value is None:
            return default
        known = list(options)
        if value not in known:
            raise UnsupportedModel(
                f"{self.where} has `{key}` {value!r}; this build runs {', '.join(known)}"
            )
        return str(value)

    def words(self, key: str) -> list[str] | None:
        """A list of words, or None where the key is absent or null."""
        value = self._take(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self._wrong(key, value, "a list of words")
        return value

    def section(self, key: str) -> ConfigReader | None:
        """A nested object as a reader of its own, or None; the caller finishes it."""
        value = self._take(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return ConfigReader(value, f"`{key}` of {self.where}")

    def expect(self, key: str, *allowed: Any) -> None:
        """Accept `key` only if absent, null or one of these values, which change nothing."""
        value = self._take(key)
        if value is not None and value not in allowed:
            raise UnsupportedModel(
                f"{self.where} has `{key}` {value!r}, which this build does not implement"
            )

    def ignore(self, *keys: str) -> None:
        """Accept these keys with any value: the family knows that they change nothing."""
        self._seen.update(keys)

    def finish(self) -> None:
        """Raise `UnsupportedModel` for the keys that nobody has read, demanded or ignored."""
        unknown = sorted(self._values.keys() - self._seen - BOOKKEEPING)
        if unknown:
            listed = ", ".join(f"`{key}`" for key in unknown)
            raise UnsupportedModel(
                f"{self.where} has keys this build does not know: {listed}",
                hint="they may change what the model computes; report the model, or remove keys "
                "you know to be without effect",
            )

    def _take(self, key: str) -> Any:
        self._seen.add(key)
        return self._values.get(key)

    def _wrong(self, key: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where} has `{key}` {value!r}, but {wanted} is needed")
