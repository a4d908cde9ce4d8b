"""Responses kept for later: bounded in number and in bytes, oldest out first, per tenant.

Memory of one HTTP worker alone: nothing survives a restart. `peers` finds what others keep.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson
from aiohttp import web

from tgi_cli.errors import ResponseNotFound
from tgi_cli.serve.openai.schema import ChatMessage
from tgi_cli.serve.responses.background import Background
from tgi_cli.serve.responses.schema import InputItem

#: Bytes of JSON that all stored responses may have together.
MAX_STORED_BYTES = 256 * 2**20


class StoredResponse:
    """A response with what came before it.

    `messages` are the whole conversation up to its output, without the instructions, which are
    not carried over; `items` is the client's own `input`. `background` while it can be followed.
    """

    def __init__(
        self,
        tenant: str,
        response: dict[str, Any],
        items: list[dict[str, Any]],
        messages: Sequence[ChatMessage],
        background: Background | None = None,
    ) -> None:
        self.tenant = tenant
        self.response = response
        self.items = items
        self.messages = messages
        self.background = background
        self.num_bytes = 0

    def measure(self) -> int:
        """Bytes of JSON of what only this response holds."""
        events = 0 if self.background is None else self.background.num_bytes
        return len(orjson.dumps(self.response)) + len(orjson.dumps(self.items)) + events


class ResponseStore:
    """At most `limit` responses and `max_bytes`; the least recently used are forgotten.

    Each of several workers has its share of both.
    """

    def __init__(
        self, limit: int, max_bytes: int = MAX_STORED_BYTES, *, num_workers: int = 1
    ) -> None:
        self.limit = -(-limit // num_workers)
        self._max_bytes = max_bytes // num_workers
        self._num_bytes = 0
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, stored: StoredResponse) -> None:
        """Keep a response, or measure it anew; others may have to go."""
        name = stored.response["id"]
        self._forget(name)
        stored.num_bytes = stored.measure()
        self._num_bytes += stored.num_bytes
        self._kept[name] = stored
        while len(self._kept) > self.limit or self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._kept)))

    def get(self, name: str, tenant: str) -> StoredResponse:
        """The response of this id, if it is this tenant's. Raises `ResponseNotFound`."""
        stored = self._kept.get(name)
        if stored is None or stored.tenant != tenant:
            raise ResponseNotFound(
                f"no response `{name}` is kept here",
                hint=f"the last {self.limit} are kept until the server ends, unless `store` is "
                "false",
            )
        self._kept.move_to_end(name)
        return stored

    def holds(self, name: str) -> bool:
        """Whether a response is still kept."""
        return name in self._kept

    async def delete(self, name: str, tenant: str) -> None:
        """Forget a response, and end it if it is running. Raises `ResponseNotFound`."""
        stored = self.get(name, tenant)
        self._forget(name)
        if stored.background is not None:
            await stored.background.cancel()

    async def close(self) -> None:
        """End what is still running."""
        for stored in list(self._kept.values()):
            if stored.background is not None:
                await stored.background.cancel()

    def _forget(self, name: str) -> None:
        gone = self._kept.pop(name, None)
        if gone is not None:
            self._num_bytes -= gone.num_bytes


def item_list(given: str | list[InputItem]) -> list[dict[str, Any]]:
    """`input` as the list of items that can be asked for later, each with an id."""
    if isinstance(given, str):
        given = [InputItem(role="user", content=given)]
    items: list[dict[str, Any]] = []
    for item in given:
        plain = {k: v for k, v in msgspec.to_builtins(item).items() if v is not None}
        if isinstance(plain.get("content"), str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            plain["content"] = [{"type": kind, "text": plain["content"]}]
        items.append({"id": f"item_{secrets.token_hex(16)}", **plain})
    return items


RESPONSES = web.AppKey("responses", ResponseStore)
