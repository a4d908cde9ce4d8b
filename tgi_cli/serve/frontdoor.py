"""The way in for every API: permits, template, tokenizer, limits, seeds; then `Answer`s.

HTTP-neutral: takes messages, text or token ids and sampling parameters, gives sequences being
generated. Says no before the engine hears of it. Template and tokenizer run in a thread pool.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from tgi_cli.chat_template import ChatTemplate
from tgi_cli.config import ServerConfig
from tgi_cli.engine.client import EngineClient
from tgi_cli.engine.messages import ModelFacts, Request
from tgi_cli.errors import EngineUnavailable, InvalidRequest
from tgi_cli.grammar import Grammar
from tgi_cli.grammar_compiler import GrammarCompiler
from tgi_cli.grammar_threads import GrammarThreads
from tgi_cli.sampling import SamplingParams, child_seed
from tgi_cli.serve.answer import Answer
from tgi_cli.serve.grammars import AskedGrammar
from tgi_cli.serve.ledger import Ledger
from tgi_cli.serve.limits import Admission, Limits
from tgi_cli.serve.prometheus import Metrics
from tgi_cli.serve.tenants import Tenants
from tgi_cli.tokenizer import Tokenizer

T = TypeVar("T")

_RENDER_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class Texts(msgspec.Struct, frozen=True):
    """What turns text into tokens for the loaded model."""

    tokenizer: Tokenizer
    template: ChatTemplate


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """A tokenized prompt. `field` is what the API calls it, for messages about it.

    `continues`: the answer goes on in the middle of its text, as it does not in a chat's new turn.
    """

    ids: list[int]
    text: str
    field: str
    continues: bool = True


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """On whose behalf: the tenant is the API key's name, `user` divides the tenant's share.

    Requests share cached prefixes only with others of the same `cache_salt`.
    """

    tenant: str = ""
    user: str = ""
    priority: int = 0
    cache_salt: str = ""


class Visit:
    """One generation request in the house; `error` is set when a begun stream broke."""

    def __init__(self) -> None:
        self.error: BaseException | None = None


class FrontDoor:
    """One HTTP worker's door to one engine. `on_end` is told of every answer that is over.

    `ledger` counts what is in the house beside other workers.
    """

    def __init__(
        self,
        client: EngineClient,
        config: ServerConfig,
        metrics: Metrics,
        tenants: Tenants,
        ledger: Ledger,
    ) -> None:
        self.client = client
        self.config = config
        self.metrics = metrics
        self.on_end: Callable[[Answer], None] | None = None
        self._tenants = tenants
        self.admission = Admission(config.max_concurrent_requests, ledger=ledger)
        self.draining = False
        self._open: tuple[Texts, Limits, ModelFacts] | None = None
        self._grammars: tuple[GrammarCompiler, GrammarThreads] | None = None
        self._pool = ThreadPoolExecutor(config.validation_workers, thread_name_prefix="validate")

    def open(self, texts: Texts, facts: ModelFacts) -> None:
        """Let requests in: the model is loaded and its tokenizer too."""
        limits = Limits.resolve(self.config, facts)
        self.metrics.model_ready(limits)
        compiler = GrammarCompiler(lambda: texts.tokenizer, facts.vocab_size)
        self._grammars = compiler, GrammarThreads(compiler)
        self._open = (texts, limits, facts)

    def close(self) -> None:
        """Release the threads."""
        if self._grammars is not None:
            self._grammars[1].close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def state(self) -> str:
        """`ready`, or what the server is doing instead."""
        if self.draining:
            return "shutting down"
        if self.client.state == "ready" and self._open is None:
            return "loading the tokenizer"
        return self.client.state

    @property
    def texts(self) -> Texts:
        """Tokenizer and template. Raises `EngineUnavailable` before the model is known."""
        return self._opened()[0]

    @property
    def limits(self) -> Limits:
        """The limits in force. Raises `EngineUnavailable` before the model is known."""
        return self._opened()[1]

    @property
    def facts(self) -> ModelFacts:
        """The loaded model. Raises `EngineUnavailable` before it is known."""
        return self._opened()[2]

    def _opened(self) -> tuple[Texts, Limits, ModelFacts]:
        if self._open is None:
            raise EngineUnavailable(f"the server is not ready: {self.state}")
        return self._open

    def check_ready(self) -> None:
        """Raise `EngineUnavailable` with what the server is doing unless it can generate now."""
        if self.state != "ready":
            raise EngineUnavailable(f"the server is not ready: {self.state}")

    @contextmanager
    def admit(self, count: int) -> Iterator[Visit]:
        """Count a generation request of `count` sequences, from the door to its end.

        Raises `EngineUnavailable` when the engine is not ready and `Overloaded` when the house is
        full; what the body raises is counted and passed on.
        """
        visit = Visit()
        self.metrics.accepted()
        try:
            self.check_ready()
            with self.admission.permits(count):
                yield visit
        except BaseException as error:
            visit.error = error
            raise
        finally:
            if visit.error is None:
                self.metrics.succeeded()
            else:
                self.metrics.failed(visit.error)

    async def in_pool(self, function: Callable[[], T]) -> T:
        """Run CPU work off the event loop, on one of the `validation_workers`."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def encode(self, text: str, *, field: str, truncate: int | None = None) -> Prompt:
        """Tokenize a plain prompt, with the special tokens the model wants around it.

        `truncate` keeps the last so many tokens.
        """
        if not text:
            raise InvalidRequest(f"`{field}` cannot be empty", param=field)
        started = time.perf_counter()
        tokenizer = self.texts.tokenizer
        ids = await self.in_pool(lambda: tokenizer.encode(text, add_special_tokens=True))
        self.metrics.validated(time.perf_counter() - started)
        return self._prompt(ids if truncate is None else ids[-truncate:], text, field)

    def from_ids(self, ids: Sequence[int], *, field: str) -> Prompt:
        """Take a prompt that is tokens already."""
        vocab_size = self.facts.vocab_size
        for token in ids:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"`{field}` token ids must be >= 0 and < {vocab_size}. Given: {token}",
                    param=field,
                )
        return self._prompt(list(ids), self.texts.tokenizer.decode(ids, False), field)

    async def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: dict[str, Any],
        tools: list[dict[str, Any]] | None = None,
    ) -> Prompt:
        """Lay messages out with the chat template and tokenize the result as it stands."""
        texts = self.texts
        for name in template_kwargs:
            if name in _RENDER_ARGUMENTS:
                raise InvalidRequest(
                    f"`chat_template_kwargs` must not hold `{name}`: it is a field of the request",
                    param="chat_template_kwargs",
                )

        def work() -> tuple[str, list[int]]:
            text = texts.template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **template_kwargs,
            )
            return text, texts.tokenizer.encode(text, add_special_tokens=False)

        started = time.perf_counter()
        text, ids = await self.in_pool(work)
        self.metrics.validated(time.perf_counter() - started)
        return self._prompt(ids, text, "messages", continues=continue_final_message)

    def _prompt(self, ids: list[int], text: str, field: str, *, continues: bool = True) -> Prompt:
        if not ids:
            raise InvalidRequest(f"`{field}` has no tokens", param=field)
        return Prompt(ids, text, field, continues)

    def max_tokens(self, prompt: Prompt, asked: int | None, tokens_field: str) -> int:
        """New tokens this prompt may have; see `Limits.max_tokens`."""
        return self.limits.max_tokens(
            len(prompt.ids), asked, prompt_field=prompt.field, tokens_field=tokens_field
        )

    async def check_grammar(self, asked: AskedGrammar | None) -> Grammar | None:
        """Refuse a grammar that cannot be compiled; the engine compiles it again for itself."""
        if asked is None:
            return None
        grammar, field = asked
        if self.config.disable_grammar_support:
            raise InvalidRequest(
                "grammar is not supported",
                hint="this server was started with --disable-grammar-support",
                param=field,
            )
        self._opened()
        assert self._grammars is not None
        compiler, threads = self._grammars
        if compiler.cached(grammar) is None:
            try:
                await asyncio.wrap_future(threads.submit(grammar))
            except InvalidRequest as error:
                raise InvalidRequest(error.message, hint=error.hint, param=field) from None
        return grammar

    def answers(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        caller: Caller,
        count: int = 1,
        include_stop: bool = False,
        marks: Sequence[str] = (),
        grammar: Grammar | None = None,
        adapter: str = "",
    ) -> list[Answer]:
        """Make `count` sequences for a prompt; nothing runs before their events are read.

        Child i samples with `child_seed(sampling.seed, i)`. `marks`: see `Answer`.
        Every answer is a text of `grammar` if there is one. `adapter`: see `Request`.
        """
        texts = self.texts
        sampling.validate(self.facts.vocab_size)
        tenant = self._tenants[caller.tenant]
        arrival = time.time()
        name = secrets.token_hex(8)
        return [
            Answer(
                Request(
                    id=f"{name}-{i}",
                    prompt_ids=prompt.ids,
                    sampling=msgspec.structs.replace(sampling, seed=child_seed(sampling.seed, i)),
                    eos_token_ids=tuple(texts.tokenizer.eos_token_ids),
                    tenant=caller.tenant,
                    user=caller.user,
                    weight=tenant.limits.weight,
                    priority=caller.priority,
                    cache_salt=caller.cache_salt,
                    arrival=arrival,
                    grammar=grammar,
                    adapter=adapter,
                ),
                self.client,
                texts.tokenizer,
                self.metrics,
                on_end=self._ended,
                continues=prompt.continues,
                include_stop=include_stop,
                marks=marks,
            )
            for i in range(count)
        ]

    def _ended(self, answer: Answer) -> None:
        """An answer is over, whatever it came to: count its tokens against its tenant."""
        request = answer.request
        used = len(request.prompt_ids) + len(answer.output_ids)
        self._tenants[request.tenant].spend(used)
        self.metrics.ended(request, len(answer.output_ids))
        if self.on_end is not None:
            self.on_end(answer)


def new_seed() -> int:
    """Seed for a request that brought none: fixed at acceptance, so that it can be resumed."""
    return secrets.randbits(64)
