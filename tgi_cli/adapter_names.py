"""How a user names adapters: `name=path`, `name=org/repo@revision`, or a repository alone.

TGI's syntax of `--lora-adapters`; `name=path` is vLLM's of `--lora-modules` too. Fetches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from tgi_cli.config import AdapterSource
from tgi_cli.errors import UsageError

_FORM = "write name=path, name=org/repo@revision or org/repo"


def parse_adapters(items: Sequence[str], *, flag: str) -> tuple[AdapterSource, ...]:
    """Read the items of a list; `flag` is what to call it in messages.

    Raises:
        UsageError: an item is not of a known form, or two have one name.
    """
    parsed: dict[str, AdapterSource] = {}
    for item in items:
        source = _parse(item, flag)
        if source.name in parsed:
            raise UsageError(
                f"{flag} names two adapters `{source.name}`", hint="give each a name of its own"
            )
        parsed[source.name] = source
    return tuple(parsed.values())


def _parse(item: str, flag: str) -> AdapterSource:
    if item.startswith("{"):
        raise UsageError(f"{flag} is {item!r}: JSON is not read here", hint=_FORM)
    if item.count("=") > 1 or item.count("@") > 1:
        raise UsageError(f"{flag} is {item!r}, which has more than one `=` or `@`", hint=_FORM)
    name, has_name, rest = item.partition("=")
    source, has_revision, revision = (rest if has_name else name).partition("@")
    name = name if has_name else source
    if not name or not source or (has_revision and not revision):
        raise UsageError(f"{flag} is {item!r}, where a part is empty", hint=_FORM)
    return AdapterSource(name, source, revision or None)
