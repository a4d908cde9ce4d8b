"""Typed reading of a `quantization_config`: a value of a wrong kind is an error that names it.

Unlike `config.json` itself, unknown keys are let pass: they say how weights were made (damping,
calibration, observers), and what they are is told by the tensors. Knows no format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tgi_cli.errors import CheckpointError, UnsupportedModel


class Settings:
    """One object of a quantization configuration; `where` names it in errors."""

    def __init__(self, values: dict[str, Any], where: str = "quantization_config") -> None:
        self.where = where
        self._values = values

    def get(self, key: str) -> Any:
        """The value as it is, None where the key is absent."""
        return self._values.get(key)

    def integer(self, *keys: str, default: int | None = None) -> int:
        """A whole number under the first of these keys that is there."""
        for key in keys:
            value = self._values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise self.wrong(key, value, "a whole number")
            return value
        if default is None:
            raise CheckpointError(f"{self.where} has no `{keys[0]}`")
        return default

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        """A word, in lower case."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, value, "a word")
        return value.lower()

    def words(self, key: str) -> list[str]:
        """A list of words; empty where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.wrong(key, value, "a list of words")
        return value

    def section(self, key: str) -> Settings | None:
        """A nested object, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return Settings(value, f"`{key}` of {self.where}")

    def sections(self, key: str) -> dict[str, Settings]:
        """An object of objects."""
        holder = self.section(key)
        found = {} if holder is None else {name: holder.section(name) for name in holder._values}
        return {name: section for name, section in found.items() if section is not None}

    def wrong(self, key: str, value: Any, wanted: str) -> CheckpointError:
        """An error about one value."""
        return CheckpointError(f"{self.where} has `{key}` {value!r}, but {wanted} is needed")

    def refused(self, key: str, value: Any, known: Sequence[Any]) -> UnsupportedModel:
        """An error about a value that means something we do not have."""
        return UnsupportedModel(
            f"{self.where} has `{key}` {value!r}; this build reads {', '.join(map(str, known))}",
            hint="use another checkpoint of the model, or write one with `tgi quantize`",
        )
