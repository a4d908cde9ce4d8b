"""`LLM`: the engine as a Python object, for offline use. No server, no second process.

The engine runs in a thread of this process; prompts of one call are batched together.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from tgi_cli.adapter_names import parse_adapters
from tgi_cli.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from tgi_cli.detokenizer import Detokenizer
from tgi_cli.engine.inline_client import InlineClient
from tgi_cli.engine.messages import ModelFacts, Request, TokenLogprobs
from tgi_cli.errors import EngineUnavailable, GenerationFailed, InvalidRequest, ModelNotFound
from tgi_cli.grammar import Grammar
from tgi_cli.sampling import SamplingParams
from tgi_cli.tokenizer import Tokenizer, load_tokenizer

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Output:
    """One answer.

    `finish_reason` is `length`, `eos`, or `stop` for a stop token, a stop string or the end of a
    grammar. `logprobs` is
    parallel to `token_ids` if asked for; `prompt_logprobs` has one entry a prompt token, the first
    None. `text` ends before a stop string.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0


class LLM:
    """A loaded model.

    Example::

        from tgi_cli import LLM, SamplingParams

        with LLM("demo") as llm:
            sampling = SamplingParams(temperature=0.0, max_tokens=20)
            [output] = llm.generate("The capital of France is", sampling)
            print(output.text)

    Args:
        model: a model id of the hub, `repo:QUANT` for a GGUF file of it, `demo`, or a local folder
            or `.gguf` file.
        revision: branch, tag or commit of the hub's repository.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        quantize: rounds dense weights while loading: `int8`, `int4`, `fp8` and others.
        activation_dtype: what multiplies quantized weights on a CPU: `auto`, `int8` or `bfloat16`.
        device: `auto`, `cpu` or `cuda`.
        max_model_len: most tokens of a prompt and its answer; the model's own limit if None.
        max_num_seqs: prompts that run at once; the others wait.
        max_batch_tokens: tokens computed in one step.
        kv_cache_dtype: number type of the KV cache: auto (the model's), bfloat16, float16, float32,
            int8, fp8_e4m3 or fp8_e5m2.
        kv_cache_tokens: size of the KV cache; None takes it from free memory.
        prefix_caching: whether equal beginnings of prompts are computed once.
        num_threads: threads of the computation; all usable cores if None.
        adapters: LoRA adapters that prompts may ask for, as `--lora-adapters` takes them:
            `name=path`, `name=org/repo@revision` or `org/repo`.
        token: access token of the hub.
        cache_dir: where downloads are kept.

    Raises:
        HubError: the model cannot be found or fetched.
        EngineError: it is broken, of a kind we cannot run, or does not fit.
        UsageError: an option contradicts another or the model.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        quantize: str | None = None,
        activation_dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_batch_tokens: int = 512,
        kv_cache_dtype: str = "auto",
        kv_cache_tokens: int | None = None,
        prefix_caching: bool = True,
        num_threads: int | None = None,
        adapters: Sequence[str] = (),
        token: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        config = EngineConfig(
            model=ModelConfig(
                model_id=model,
                revision=revision,
                dtype=dtype,
                quantize=quantize,
                activation_dtype=activation_dtype,
                device=device,
                max_model_len=max_model_len,
                token=token,
                cache_dir=cache_dir,
            ),
            cache=CacheConfig(
                kv_cache_dtype=kv_cache_dtype,
                kv_cache_tokens=kv_cache_tokens,
                prefix_caching=prefix_caching,
            ),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens),
            parallel=ParallelConfig(num_threads=num_threads),
            lora=AdapterConfig(adapters=parse_adapters(adapters, flag="adapters")),
        )
        # A loop of our own, so that this works inside a running one (notebooks) too.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tgi-llm", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._client = self._wait(InlineClient.start(config))
        except BaseException:
            self._end_loop()
            raise
        facts = self._client.facts
        assert facts is not None
        self.facts: ModelFacts = facts
        self.tokenizer: Tokenizer = load_tokenizer(facts.model_path)

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> list[Output]:
        """Answer prompts, in their order.

        Args:
            prompts: one prompt or several, each a text or token ids.
            sampling: how to choose tokens, the same for all prompts; the seed too, so equal
                prompts get equal answers. None samples 16 tokens with the defaults.
            grammar: what every answer must be a text of; see `tgi_cli.Grammar`.
            adapter: the name of one of the `adapters`; None is the model alone.

        Raises:
            InvalidRequest: a prompt is empty or a parameter is out of range; nothing is run.
            ModelNotFound: there is no such adapter; nothing is run.
            GenerationFailed: a prompt could not be answered (too long, or a bad grammar).
            EngineUnavailable: the engine died, or `close` was called.
        """
        if self._closed:
            raise EngineUnavailable("the engine is not available: it was closed")
        sampling = sampling or SamplingParams()
        sampling.validate(self.facts.vocab_size)
        names = [each.name for each in self.facts.adapters]
        if adapter is not None and adapter not in names:
            raise ModelNotFound(
                f"there is no adapter `{adapter}` here; loaded are: {', '.join(names) or 'none'}"
            )
        encoded = [self._encode(prompt) for prompt in _as_list(prompts)]
        return self._wait(self._answer_all(encoded, sampling, grammar, adapter or ""))

    def close(self) -> None:
        """End the engine and free the model; harmless to repeat."""
        if not self._closed:
            self._closed = True
            self._wait(self._client.close())
            self._end_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt, True) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InvalidRequest("a prompt has no tokens", param="prompts")
        return ids

    async def _answer_all(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams,
        grammar: Grammar | None,
        adapter: str,
    ) -> list[Output]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._answer(ids, sampling, grammar, adapter))
                    for ids in prompts
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(
        self,
        prompt_ids: list[int],
        sampling: SamplingParams,
        grammar: Grammar | None,
        adapter: str,
    ) -> Output:
        request = Request(
            id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=sampling,
            eos_token_ids=tuple(self.tokenizer.eos_token_ids),
            grammar=grammar,
            adapter=adapter,
        )
        detokenizer = Detokenizer(self.tokenizer, prompt_ids, stop=sampling.stop)
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        prompt_logprobs = None
        pieces: list[str] = []
        num_cached = 0
        finish: str | None = None
        async with aclosing(self._client.generate(request)) as deltas:
            async for delta in deltas:
                if delta.finish in ("error", "abort"):
                    raise GenerationFailed(delta.error or "the engine aborted this prompt")
                if not token_ids:
                    prompt_logprobs, num_cached = delta.prompt_logprobs, delta.num_cached_tokens
                read = detokenizer.push(delta.token_ids)
                kept = len(read.token_texts)  # what follows a stop string does not count
                token_ids += delta.token_ids[:kept]
                logprobs += (delta.logprobs or [])[:kept]
                pieces.append(read.text)
                finish = "stop" if read.stopped is not None else delta.finish
                if finish is not None:
                    break
        if finish is None:
            raise GenerationFailed("the engine's answer ended before its end")
        pieces.append(detokenizer.finish())
        return Output(
            prompt_ids=prompt_ids,
            token_ids=token_ids,
            text="".join(pieces),
            finish_reason="stop" if detokenizer.stopped is not None else finish,
            logprobs=None if sampling.logprobs is None else logprobs,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=num_cached,
        )

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()  # aborts what is running
            raise

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _as_list(
    prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
) -> list[str | Sequence[int]]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [[int(token) for token in prompts]]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]
