"""API keys: one from the command line, any number from a TOML file, held only as hashes.

The file has a table for each tenant, named as the tenant::

    [team-a]
    key = "sha256:9f86d0..."        # or a list, while a key is being replaced
    requests_per_minute = 60
    tokens_per_minute = 20000
    concurrency = 4
    weight = 2.0

`tgi key team-a` makes such an entry. The keys it makes have 256 random bits, so one round of
SHA-256 is enough: there is nothing to guess. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import secrets
import time
from collections.abc import Callable

import msgspec

from tgi_cli.errors import UsageError
from tgi_cli.serve.tenants import TenantLimits

log = logging.getLogger(__name__)

#: The tenant of `--api-key`.
DEFAULT_TENANT = "default"
#: Seconds between two looks at the file.
RELOAD_EVERY = 1.0

_PREFIX = "sha256:"


class KeyEntry(TenantLimits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tenant's table in the key file: hashes of its keys, and its limits."""

    key: str | list[str]

    def hashes(self, name: str) -> list[str]:
        """The keys' SHA-256, in hex. Raises `ValueError` for anything else and odd limits."""
        given = [self.key] if isinstance(self.key, str) else self.key
        found = [text.removeprefix(_PREFIX).lower() for text in given]
        for text, digest in zip(given, found, strict=True):
            if not text.startswith(_PREFIX) or len(digest) != 64 or _not_hex(digest):
                raise ValueError(
                    f"[{name}] `key` must be `sha256:` and 64 hexadecimal digits, never the key"
                )
        for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"[{name}] `{field}` must be at least 1. Given: {value}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"[{name}] `weight` must be > 0. Given: {self.weight}")
        return found


def read_key_file(path: str) -> dict[str, KeyEntry]:
    """Read a key file. Raises `UsageError` that says where it is wrong."""
    hint = "`tgi key NAME` makes an entry"
    try:
        with open(path, "rb") as file:
            entries = msgspec.toml.decode(file.read(), type=dict[str, KeyEntry])
        owners: dict[str, str] = {}
        for name, entry in entries.items():
            for digest in entry.hashes(name):
                if owners.setdefault(digest, name) != name:
                    raise ValueError(f"[{name}] and [{owners[digest]}] have the same key")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"the key file {path} cannot be read: {reason}", hint=hint) from None
    except ValueError as error:  # msgspec's and tomllib's are ValueErrors too
        raise UsageError(f"the key file {path} is not valid: {error}", hint=hint) from None
    return entries


def new_key() -> str:
    """A key that nobody has: `tgi-` and 256 random bits."""
    return f"tgi-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """What the key file holds instead of a key."""
    return _PREFIX + _digest(key)


class ApiKeys:
    """The keys in force, read again when the file has changed.

    A file that is unreadable or wrong changes nothing: the keys read last stay, and the log says so
    once. `on_limits` gets every tenant's limits whenever the file was read.
    """

    def __init__(
        self,
        key: str | None,
        path: str | None,
        *,
        on_limits: Callable[[dict[str, TenantLimits]], None] = lambda limits: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._single = None if key is None else _digest(key)
        self._path = path
        self._on_limits = on_limits
        self._clock = clock
        # Looking up what was mixed with a secret tells a clock nothing about the stored hashes.
        self._pepper = secrets.token_bytes(32)
        self._owners: dict[bytes, tuple[str, str]] = {}
        self._looked = -math.inf
        self._state: tuple[int, ...] | None = ()
        self._take({})
        self._reload()

    @property
    def needed(self) -> bool:
        """Whether anybody needs a key."""
        return self._single is not None or self._path is not None

    def tenant(self, key: str) -> str | None:
        """Whose key this is, None if nobody's. Takes as long for a wrong key as for a right one."""
        self._reload()
        digest = _digest(key)
        known = self._owners.get(self._mixed(digest), ("", ""))
        return known[1] if hmac.compare_digest(digest, known[0] or _NOBODY) else None

    def _reload(self) -> None:
        if self._path is None or self._clock() - self._looked < RELOAD_EVERY:
            return
        self._looked = self._clock()
        state = _state(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            entries = read_key_file(self._path)
        except UsageError as error:
            log.error("%s; the keys read before stay in force", error.message)
            return
        self._take(entries)
        log.info("read %d tenants from the key file", len(entries))

    def _take(self, entries: dict[str, KeyEntry]) -> None:
        owners: dict[bytes, tuple[str, str]] = {}
        if self._single is not None:
            owners[self._mixed(self._single)] = (self._single, DEFAULT_TENANT)
        for name, entry in entries.items():
            for digest in entry.hashes(name):
                owners[self._mixed(digest)] = (digest, name)
        self._owners = owners
        self._on_limits(dict(entries))

    def _mixed(self, digest: str) -> bytes:
        return hashlib.blake2b(digest.encode(), key=self._pepper, digest_size=32).digest()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _not_hex(text: str) -> bool:
    return any(letter not in "0123456789abcdef" for letter in text)


def _state(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


_NOBODY = "-" * 64
