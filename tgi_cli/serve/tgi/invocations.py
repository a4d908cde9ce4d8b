"""`POST /invocations`: SageMaker's one route, for whichever body it is given."""

from __future__ import annotations

from aiohttp import web

from tgi_cli.errors import InvalidRequest
from tgi_cli.serve.exchange import read_json
from tgi_cli.serve.openai.chat import chat_completions
from tgi_cli.serve.openai.completions import completions
from tgi_cli.serve.tgi.generate import compat_generate


async def invocations(request: web.Request) -> web.StreamResponse:
    """Answer as `POST /`, chat or completions would: the first whose own field the body has.

    The field decides, not which struct the whole body fits, so that a mistake inside is named.
    """
    raw = await read_json(request)  # aiohttp keeps the bytes: the handler reads them again
    given = raw if isinstance(raw, dict) else {}
    for field, handler in (
        ("inputs", compat_generate),
        ("messages", chat_completions),
        ("prompt", completions),
    ):
        if given.get(field) is not None:
            return await handler(request)
    raise InvalidRequest(
        "the body must be an object with `inputs` (as for `/`), `messages` (as for "
        "`/v1/chat/completions`) or `prompt` (as for `/v1/completions`)"
    )
