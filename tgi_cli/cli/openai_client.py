"""A small streaming client of any OpenAI-compatible server, for `chat` and `bench`.

Turns whatever goes wrong into one `RemoteError` with a sentence. Knows neither terminals nor
statistics; who reads the chunks takes the times.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import orjson

from tgi_cli.errors import RemoteError, UsageError

_DONE = b"[DONE]"
_CONNECT_SECONDS = 10.0
_DRAIN_SECONDS = 1.0


class Usage(msgspec.Struct, frozen=True):
    """Token counts as the server gives them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct, frozen=True):
    """One event of a stream: text of the answer, or of the model's reasoning before it."""

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    usage: Usage | None = None


class EventStream:
    """Splits the bytes of a server-sent event stream into the data of its events.

    Accepts what servers really send: `data:` with and without a space, CR LF, comments as
    keep-alive, events cut anywhere.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the data of every event that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []


class OpenAIClient:
    """One server. Use as an async context manager; `stream` may run many times at once."""

    def __init__(self, url: str, *, api_key: str | None = None, keep_alive: bool = True) -> None:
        self.url = base_url(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._keep_alive = keep_alive  # some servers drop idle connections without a word
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> OpenAIClient:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            # whoever calls bounds its own requests
            connector=aiohttp.TCPConnector(limit=0, force_close=not self._keep_alive),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def first_model(self) -> str:
        """The first model the server lists. Raises `RemoteError`."""
        answer = await self.json("GET", "/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise RemoteError(
                f"{self.url}/v1/models lists no model",
                kind="bad answer",
                hint="name one with --model-id",
            ) from None

    async def json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send one request and return the parsed answer. Raises `RemoteError`."""
        async with self._request(method, path, body) as response:
            try:
                return orjson.loads(await self._read(response))
            except orjson.JSONDecodeError:
                raise RemoteError(
                    f"{self.url}{path} did not answer with JSON",
                    kind="bad answer",
                    hint="is this an OpenAI-compatible server?",
                ) from None

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Send a streaming request and yield its chunks; closing the iterator ends it.

        Raises `RemoteError`, also when the server reports an error within the stream or the
        stream ends before it is finished.
        """
        events = EventStream()
        finished = False
        async with self._request("POST", path, body) as response:
            chunks = self._chunks(response)
            async for data in chunks:
                for event in events.feed(data):
                    if event == _DONE:
                        await _drain(chunks)
                        return
                    chunk = read_chunk(event)
                    finished = finished or bool(chunk.finish)
                    yield chunk
        if not finished:
            raise RemoteError("the server closed the stream before its end", kind="cut off")

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> _Exchange:
        if self._session is None:
            raise RuntimeError("OpenAIClient is used outside its `async with` block")
        return _Exchange(self._session, self.url, method, path, body)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        return b"".join([data async for data in self._chunks(response)])

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for data in response.content.iter_any():
                yield data
        except (aiohttp.ClientError, ConnectionError) as error:
            raise RemoteError(
                f"the connection to {self.url} broke: {error}", kind="cut off"
            ) from error


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Read to the end of the body, which is due: only then can the connection be used again."""
    with contextlib.suppress(TimeoutError, RemoteError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in chunks:
                pass


class _Exchange:
    """One request as an async context manager that opens only on a 2xx answer."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        method: str,
        path: str,
        body: dict[str, Any] | None,
    ) -> None:
        self._url = url
        data = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        self._context = session.request(method, url + path, data=data, headers=headers)

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            response = await self._context.__aenter__()
            if response.status < 300:
                return response
            body = await response.read()
            response.release()
        except (TimeoutError, aiohttp.ClientConnectionError, ConnectionError) as error:
            raise _unreachable(self._url, error) from error
        except aiohttp.ClientError as error:
            raise RemoteError(f"{self._url} failed: {error}", kind="bad answer") from error
        raise _refused(response.status, body)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._context.__aexit__(kind, error, traceback)


def base_url(url: str) -> str:
    """`url` without path, slash or `/v1`. Raises `UsageError` when it is not an HTTP URL."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(f"--url is {url!r} but must be like http://127.0.0.1:3000")
    return full.rstrip("/").removesuffix("/v1").rstrip("/")


def read_chunk(event: bytes) -> Chunk:
    """Parse the data of one event. Raises `RemoteError` for an error that came as an event."""
    try:
        data = orjson.loads(event)
    except orjson.JSONDecodeError:
        raise RemoteError(
            f"the stream holds an event that is not JSON: {event[:80]!r}", kind="bad answer"
        ) from None
    if not isinstance(data, dict):
        raise RemoteError(f"the stream holds {event[:80]!r}", kind="bad answer")
    if data.get("error"):
        raise RemoteError(f"the server failed: {_message(data)}", kind="error in stream")
    usage = None
    if data.get("usage"):
        usage = Usage(
            prompt_tokens=data["usage"].get("prompt_tokens") or 0,
            completion_tokens=data["usage"].get("completion_tokens") or 0,
        )
    choices = data.get("choices") or []
    if not choices:
        return Chunk(usage=usage)
    choice = choices[0]
    delta = choice.get("delta") or {}
    return Chunk(
        text=choice.get("text") or delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
        finish=choice.get("finish_reason") or None,
        usage=usage,
    )


def _message(data: Any) -> str:
    error = data.get("error", data) if isinstance(data, dict) else data
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)


def _refused(status: int, body: bytes) -> RemoteError:
    text = body.decode("utf-8", "replace").strip()
    try:
        text = _message(orjson.loads(text))
    except orjson.JSONDecodeError:
        text = text.splitlines()[0][:200] if text else "no reason given"
    hints = {
        401: "give the server's key with --api-key or TGI_API_KEY",
        404: "is --url an OpenAI-compatible server, and --model-id one it serves?",
    }
    return RemoteError(
        f"the server answered {status}: {text}", kind=f"http {status}", hint=hints.get(status)
    )


def _unreachable(url: str, error: BaseException) -> RemoteError:
    if isinstance(error, asyncio.TimeoutError):
        return RemoteError(f"{url} did not answer in time", kind="timeout")
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = error.os_error.strerror or str(error.os_error)
        return RemoteError(
            f"cannot reach {url}: {reason.lower()}",
            kind="cannot connect",
            hint="start a server with `tgi launch --model-id demo`",
        )
    return RemoteError(f"the connection to {url} broke: {error}", kind="cut off")
