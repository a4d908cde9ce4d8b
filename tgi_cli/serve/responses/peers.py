"""The other HTTP workers: each keeps its own responses, and their ids say whose they are.

A request about another worker's response is passed on as it came, over that worker's own socket in
the server's private folder, and answered there; keys and limits are looked at there alone. Knows
no field but `previous_response_id`.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from tgi_cli.errors import EngineUnavailable
from tgi_cli.serve.observe import ID, ID_HEADER

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ROOT = "/v1/responses"
_ID = re.compile(r"resp_([0-9a-f]{4})[0-9a-f]{44}")
_BELOW = re.compile(rf"{_ROOT}/({_ID.pattern})(?:/.*)?")
#: Of one connection alone (RFC 9110), or written anew for the other.
_HOP = ("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
_NOT_SENT = frozenset((*_HOP, "host", "content-length", "content-encoding", "expect"))
_NOT_RETURNED = frozenset((*_HOP, "content-length", "date", "server"))


class Peers:
    """One worker's view of the others.

    Args:
        folder: where the workers' sockets are; None for the only worker.
        index: this worker's number.
        num_workers: how many there are.
    """

    def __init__(self, folder: str | None = None, index: int = 0, num_workers: int = 1) -> None:
        self._folder = folder
        self._index = index
        self._num_workers = num_workers
        self._sessions: dict[int, aiohttp.ClientSession] = {}

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self._folder is None

    @property
    def socket(self) -> str:
        """Path of this worker's own socket; only where it is not alone."""
        return self._path(self._index)

    def new_id(self) -> str:
        """An id for a response that this worker keeps."""
        return f"resp_{self._index:04x}{secrets.token_hex(22)}"

    async def close(self) -> None:
        """Close what connects to the others."""
        for session in self._sessions.values():
            await session.close()

    def _path(self, index: int) -> str:
        assert self._folder is not None
        return os.path.join(self._folder, f"http-{index}.sock")

    def _owner(self, name: Any) -> int:
        match = _ID.fullmatch(name) if isinstance(name, str) else None
        owner = int(match[1], 16) if match else self._index
        return owner if owner < self._num_workers else self._index

    @property
    def middleware(self) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
        """Passes on what is another worker's to answer; of no use to the only one."""

        @web.middleware
        async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not request.path.startswith(_ROOT):
                return await handler(request)
            below = _BELOW.fullmatch(request.path)
            owner = self._owner(below[1] if below else await _previous(request))
            if owner == self._index:
                return await handler(request)
            return await self._pass_on(request, owner)

        return around

    async def _pass_on(self, request: web.Request, owner: int) -> web.StreamResponse:
        if owner not in self._sessions:
            self._sessions[owner] = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self._path(owner), limit=0),
                timeout=aiohttp.ClientTimeout(),
                auto_decompress=False,
            )
        headers = _kept(request.headers, _NOT_SENT)
        headers[ID_HEADER] = request[ID]
        url = f"http://worker{request.rel_url.raw_path_qs}"
        try:
            answer = await self._sessions[owner].request(
                request.method, url, headers=headers, data=await request.read()
            )
        except aiohttp.ClientConnectionError:
            raise EngineUnavailable(
                "the HTTP worker that keeps this response is being replaced"
            ) from None
        async with answer:
            response = web.StreamResponse(
                status=answer.status, headers=_kept(answer.headers, _NOT_RETURNED)
            )
            await response.prepare(request)
            try:
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            except aiohttp.ClientConnectionResetError:
                raise  # from `write`: our own client has gone
            except aiohttp.ClientError as error:  # it died: the answer must not look whole
                log.warning("worker %d was lost in the middle of an answer: %s", owner, error)
                raise ConnectionResetError(str(error)) from None
            await response.write_eof()
        return response


async def _previous(request: web.Request) -> Any:
    """The response that a new one goes on after; what is wrong with the body is said later."""
    if request.method != "POST":
        return None
    try:
        body = await request.read()
        raw = orjson.loads(body) if b"previous_response_id" in body else None
    except (web.HTTPException, web.RequestPayloadError, orjson.JSONDecodeError):
        return None
    return raw.get("previous_response_id") if isinstance(raw, dict) else None


def _kept(headers: Any, without: frozenset[str]) -> dict[str, str]:
    return {k: v for k, v in headers.items() if k.lower() not in without}


PEERS = web.AppKey("peers", Peers)
