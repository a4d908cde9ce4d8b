"""`POST /v1/completions`: text or tokens in, `n` of `best_of` continuations each out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from aiohttp import web

from tgi_cli.errors import InvalidRequest, TgiError
from tgi_cli.grammar import Grammar
from tgi_cli.serve.answer import Answer, TextEvent, complete_all
from tgi_cli.serve.chosen_model import chosen_model
from tgi_cli.serve.exchange import TENANT, json_response, read_struct
from tgi_cli.serve.frames import frames_of
from tgi_cli.serve.frontdoor import Caller, FrontDoor, Prompt
from tgi_cli.serve.grammars import asked_grammar
from tgi_cli.serve.keys import DOOR, SERVED
from tgi_cli.serve.openai.replies import (
    CompletionLogprobs,
    Envelope,
    finish_reason,
    prompt_logprobs_report,
    usage_so_far,
)
from tgi_cli.serve.openai.schema import (
    CompletionRequest,
    check_reports,
    check_top,
    num_choices,
    refuse_unsupported,
    sampling_params,
)
from tgi_cli.serve.sse import DONE, Outlet, send_frames
from tgi_cli.serve.surfaces import OPENAI
from tgi_cli.serve.timing import Timing


async def completions(request: web.Request) -> web.StreamResponse:
    """Continue one or several prompts, whole or as a stream of chunks."""
    timing = Timing()
    door, served = request.app[DOOR], request.app[SERVED]
    body = await read_struct(request, CompletionRequest)
    given = split_prompts(body.prompt, door.config.max_client_batch_size)
    n, best_of = _counts(body, door.config.max_best_of)
    with door.admit(len(given) * best_of) as visit:
        chosen = chosen_model(door, served, body.model, body.adapter_id)
        refuse_unsupported(body)
        check_top("logprobs", body.logprobs, door.config.max_top_n_tokens)
        check_reports(body, door.config.max_top_n_tokens)
        prompts = [await _tokens(door, one) for one in given]
        caller = Caller(
            tenant=request[TENANT],
            user=body.user or "",
            priority=body.priority,
            cache_salt=body.cache_salt,
        )
        grammar = await door.check_grammar(asked_grammar(body))
        groups = [
            _answers(door, body, prompt, best_of, n, caller, grammar, chosen.adapter)
            for prompt in prompts
        ]
        answers = [answer for group in groups for answer in group]
        timing.validated()
        reply = _CompletionReply(door, body, prompts, groups, chosen.name)
        if not body.stream:
            await complete_all(answers)
            headers = timing.headers(door.facts, prompts, answers)
            return json_response(reply.whole(n), headers=headers)

        def broken(error: TgiError) -> bytes:
            visit.error = error
            return OPENAI.event(error)

        outlet = Outlet()
        return await send_frames(
            request,
            reply.frames(outlet),
            outlet=outlet,
            error_event=broken,
            headers=timing.stream_headers(door.facts, prompts),
        )


def split_prompts(prompt: str | list[Any], limit: int) -> list[str | list[int]]:
    """The four forms of `prompt` as a list. Raises `InvalidRequest` for mixtures and nothing."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("`prompt` cannot be empty", param="prompt")
    if all(isinstance(item, int) for item in prompt):
        return [prompt]
    if not (
        all(isinstance(item, str) for item in prompt)
        or all(isinstance(item, list) for item in prompt)
    ):
        raise InvalidRequest(
            "`prompt` must hold texts, or token ids, or lists of token ids, not a mixture",
            param="prompt",
        )
    if len(prompt) > limit:
        raise InvalidRequest(
            f"number of prompts exceeds the maximum allowed batch size of {limit}. "
            f"Given: {len(prompt)}",
            hint="--max-client-batch-size raises the limit",
            param="prompt",
        )
    return list(prompt)


def _counts(body: CompletionRequest, max_best_of: int) -> tuple[int, int]:
    n = num_choices(body.n)
    best_of = n if body.best_of is None else body.best_of
    if best_of < n:
        raise InvalidRequest(f"`best_of` must be >= `n`. Given: {best_of} and {n}", param="best_of")
    if best_of > n:
        if best_of > max_best_of:
            raise InvalidRequest(
                f"`best_of` must be > 0 and <= {max_best_of}. Given: {best_of}",
                hint="--max-best-of raises the limit",
                param="best_of",
            )
        if body.stream:
            raise InvalidRequest("`best_of` > `n` cannot be streamed", param="best_of")
    return n, best_of


async def _tokens(door: FrontDoor, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        return await door.encode(prompt, field="prompt")
    return door.from_ids(prompt, field="prompt")


def _answers(
    door: FrontDoor,
    body: CompletionRequest,
    prompt: Prompt,
    best_of: int,
    n: int,
    caller: Caller,
    grammar: Grammar | None,
    adapter: str,
) -> list[Answer]:
    asked = body.max_tokens
    if asked is not None and asked < (0 if body.echo else 1):
        raise InvalidRequest(
            f"`max_tokens` must be >= 1 (or 0 with `echo`). Given: {asked}", param="max_tokens"
        )
    # Scoring a prompt (`echo`, no new tokens) still takes the one step that reads its logits.
    max_tokens = max(1, door.max_tokens(prompt, asked, "max_tokens"))
    logprobs = body.logprobs
    if logprobs is None and best_of > n:
        logprobs = 0
    wanted = [body.prompt_logprobs, body.logprobs if body.echo else None]
    sampling = sampling_params(
        body,
        door.config,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=max((top for top in wanted if top is not None), default=None),
    )
    return door.answers(
        prompt, sampling, caller=caller, count=best_of, grammar=grammar, adapter=adapter
    )


class _CompletionReply:
    """Shapes the answers of one request: choice `prompt * n + i` is child i of that prompt."""

    def __init__(
        self,
        door: FrontDoor,
        body: CompletionRequest,
        prompts: list[Prompt],
        groups: list[list[Answer]],
        model: str,
    ) -> None:
        self._tokenizer = door.texts.tokenizer
        self._facts = door.facts
        self._body = body
        self._prompts = prompts
        self._groups = groups
        self._model = model
        self._only_echo = body.max_tokens == 0

    def whole(self, n: int) -> dict[str, Any]:
        """The reply once every answer is complete: the `n` likeliest of each prompt's answers."""
        envelope = Envelope("cmpl", "text_completion", self._model, self._facts)
        choices: list[dict[str, Any]] = []
        for prompt, group in zip(self._prompts, self._groups, strict=True):
            best = group
            if len(group) > n:
                best = sorted(group, key=lambda answer: answer.mean_logprob, reverse=True)[:n]
            for answer in best:
                step = TextEvent(
                    answer.text,
                    answer.output_ids,
                    answer.token_texts,
                    answer.logprobs,
                    answer.finish,
                )
                pieces = _Pieces(self, prompt, answer)
                choice = {"index": len(choices), **pieces.first(step)}
                top = self._body.prompt_logprobs
                if top is not None:
                    choice["prompt_logprobs"] = prompt_logprobs_report(answer, self._tokenizer, top)
                choices.append(choice)
        return envelope.body(choices, usage=self._usage())

    async def frames(self, outlet: Outlet) -> AsyncGenerator[bytes, None]:
        """Chunks of all choices as they come, then usage if asked, then `[DONE]`."""
        envelope = Envelope("cmpl", "text_completion", self._model, self._facts)
        options = self._body.stream_options
        include_usage = options is not None and options.include_usage
        extra: dict[str, Any] = {"usage": None} if include_usage else {}
        pieces = [
            _Pieces(self, prompt, answer)
            for prompt, group in zip(self._prompts, self._groups, strict=True)
            for answer in group
        ]
        begun: set[int] = set()
        counts = [0] * len(pieces)
        continuous = options is not None and options.continuous_usage_stats
        answers = [answer for group in self._groups for answer in group]

        def make(events: list[tuple[int, TextEvent]]) -> bytes:
            frame = b""
            for index, step in events:
                counts[index] += len(step.token_ids)
                if continuous:
                    extra["usage"] = pieces[index].usage(counts[index])
                if index not in begun:
                    begun.add(index)
                    choice = pieces[index].first(step)
                elif step.text or step.logprobs or step.finish or self._body.return_token_ids:
                    choice = pieces[index].next(step)
                else:
                    continue
                frame += envelope.event([{"index": index, **choice}], **extra)
            return frame

        async with aclosing(frames_of(answers, make, outlet)) as frames:
            async for frame in frames:
                yield frame
        yield (envelope.event([], usage=self._usage()) if include_usage else b"") + DONE

    def _usage(self) -> dict[str, Any]:
        answers = [answer for group in self._groups for answer in group]
        completion = sum(len(answer.output_ids) for answer in answers)
        return usage_so_far(
            sum(len(prompt.ids) for prompt in self._prompts),
            0 if self._only_echo else completion,
            answers,
        )

    def logprobs(self) -> CompletionLogprobs | None:
        """A fresh logprobs writer for one choice, None when they were not asked for."""
        top = self._body.logprobs
        return None if top is None else CompletionLogprobs(self._tokenizer, top)

    @property
    def shows_ids(self) -> bool:
        """Whether token ids stand beside the text."""
        return self._body.return_token_ids

    def echo(self, prompt: Prompt) -> str:
        """The text that precedes the first piece."""
        return prompt.text if self._body.echo else ""

    def keep(self, step: TextEvent) -> TextEvent:
        """The step as the client wants it: nothing of it when it asked for no new tokens."""
        if self._only_echo:
            return TextEvent("", [], [], [], step.finish)
        return step

    def prompt_texts(self, prompt: Prompt) -> list[str]:
        """Per-token texts of the prompt, for the offsets: special tokens are not in its text."""
        tokenizer = self._tokenizer
        return [
            "" if tokenizer.is_special(token) else tokenizer.token_text(token)
            for token in prompt.ids
        ]


class _Pieces:
    """Text and logprobs of one choice; with `echo` the first piece begins with the prompt."""

    def __init__(self, reply: _CompletionReply, prompt: Prompt, answer: Answer) -> None:
        self._reply = reply
        self._prompt = prompt
        self._answer = answer
        self._logprobs = reply.logprobs()

    def first(self, step: TextEvent) -> dict[str, Any]:
        """The first (or only) piece."""
        echo = self._reply.echo(self._prompt)
        kept = self._reply.keep(step)
        logprobs = None
        if self._logprobs is not None:
            ids, texts = list(kept.token_ids), list(kept.token_texts)
            entries: list[Any] = list(kept.logprobs or [])
            if echo:
                ids = self._prompt.ids + ids
                texts = self._reply.prompt_texts(self._prompt) + texts
                entries = list(self._answer.prompt_logprobs or []) + entries
            logprobs = self._logprobs.piece(ids, texts, entries)
        choice = self._choice(echo + kept.text, logprobs, kept)
        if self._reply.shows_ids:
            choice["prompt_token_ids"] = self._prompt.ids
        return choice

    def next(self, step: TextEvent) -> dict[str, Any]:
        """A later piece."""
        kept = self._reply.keep(step)
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs.piece(kept.token_ids, kept.token_texts, kept.logprobs or [])
        return self._choice(kept.text, logprobs, kept)

    def usage(self, completion: int) -> dict[str, Any]:
        """Usage of this choice alone when `completion` tokens have been sent."""
        return usage_so_far(len(self._prompt.ids), completion, [self._answer])

    def _choice(
        self, text: str, logprobs: dict[str, Any] | None, kept: TextEvent
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(kept.finish),
        }
        if self._reply.shows_ids:
            choice["token_ids"] = list(kept.token_ids)
        return choice
