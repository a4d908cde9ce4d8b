"""`POST /vertex`: Google Vertex AI's prediction route, a batch of prompts or conversations.

Unlike in TGI every parameter of an instance counts, and a bad instance is named instead of
failing the batch as "incomplete generation".
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from tgi_cli.errors import InvalidRequest
from tgi_cli.serve.answer import Answer, complete_all
from tgi_cli.serve.chosen_model import chosen_model
from tgi_cli.serve.exchange import (
    TENANT,
    ignore_fields,
    ignored_fields,
    json_response,
    read_struct,
    to_struct,
    without_nulls,
)
from tgi_cli.serve.frontdoor import FrontDoor, Prompt
from tgi_cli.serve.keys import DOOR, SERVED, Served
from tgi_cli.serve.openai.conversation import Conversation
from tgi_cli.serve.openai.schema import ChatRequest, num_choices
from tgi_cli.serve.tgi.generate import native_answers
from tgi_cli.serve.tgi.schema import GenerateRequest
from tgi_cli.serve.timing import Timing


class VertexRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /vertex`. Each instance is a `GenerateRequest` or a `ChatRequest`."""

    instances: list[dict[str, Any]]


async def vertex(request: web.Request) -> web.Response:
    """Answer one text for each instance, in their order."""
    timing = Timing()
    door, served = request.app[DOOR], request.app[SERVED]
    body = await read_struct(request, VertexRequest)
    if not body.instances:
        raise InvalidRequest("`instances` must hold at least one instance", param="instances")
    instances = [_instance(raw, f"instances[{i}]") for i, raw in enumerate(body.instances)]
    ignore_fields(
        request,
        (
            name
            for raw, instance in zip(body.instances, instances, strict=True)
            for name in ignored_fields(without_nulls(raw), instance, "instances[].")
        ),
    )
    with door.admit(sum(_count(instance) for instance in instances)):
        prompts: list[Prompt] = []
        groups: list[list[Answer]] = []
        for i, instance in enumerate(instances):
            try:
                prompt, group = await _answers(door, served, instance, request[TENANT])
            except InvalidRequest as error:
                raise _inside(error, f"instances[{i}]") from None
            prompts.append(prompt)
            groups.append(group)
        timing.validated()
        answers = [answer for group in groups for answer in group]
        await complete_all(answers)
        predictions = [max(group, key=lambda one: one.mean_logprob).text for group in groups]
        headers = timing.headers(door.facts, prompts, answers)
        return json_response({"predictions": predictions}, headers=headers)


def _instance(raw: dict[str, Any], where: str) -> GenerateRequest | ChatRequest:
    kind: type[GenerateRequest | ChatRequest] = GenerateRequest if "inputs" in raw else ChatRequest
    try:
        parsed = to_struct(raw, kind)
    except InvalidRequest as error:
        raise _inside(error, where) from None
    if parsed.stream:
        raise InvalidRequest(f"`{where}.stream` cannot be true: predictions come as a whole")
    if isinstance(parsed, ChatRequest) and num_choices(parsed.n) > 1:
        raise InvalidRequest(f"`{where}.n` must be 1: a prediction is one text. Given: {parsed.n}")
    return parsed


def _inside(error: InvalidRequest, where: str) -> InvalidRequest:
    param = f"{where}.{error.param}" if error.param else where
    return InvalidRequest(f"in `{where}`: {error.message}", hint=error.hint, param=param)


def _count(instance: GenerateRequest | ChatRequest) -> int:
    return max(1, instance.effective.best_of or 1) if isinstance(instance, GenerateRequest) else 1


async def _answers(
    door: FrontDoor, served: Served, instance: GenerateRequest | ChatRequest, tenant: str
) -> tuple[Prompt, list[Answer]]:
    if isinstance(instance, GenerateRequest):
        return await native_answers(door, served, instance, tenant, stream=False)
    chosen = chosen_model(door, served, instance.model, instance.adapter_id)
    chat = await Conversation.begin(door, instance, count=1, tenant=tenant, adapter=chosen.adapter)
    return chat.prompt, chat.answers
