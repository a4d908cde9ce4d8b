"""An engine client that follows a script: for the shape of HTTP answers, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

from tgi_cli.engine.client import Shortcut
from tgi_cli.engine.messages import (
    AdapterFacts,
    Delta,
    EngineStats,
    ModelFacts,
    Request,
    TokenLogprobs,
)
from tgi_cli.errors import EngineUnavailable

EOS_ID = 257


def byte_facts(
    model_path: str, *, max_model_len: int = 512, adapters: Sequence[str] = ()
) -> ModelFacts:
    return ModelFacts(
        model_id="org/bytes",
        model_path=model_path,
        model_sha=None,
        architecture="LlamaForCausalLM",
        dtype="float32",
        kv_cache_dtype="float32",
        device="cpu",
        backend="cpu",
        quantization=None,
        activation_dtype="float32",
        deterministic=False,
        vocab_size=258,
        max_model_len=max_model_len,
        max_num_seqs=8,
        max_batch_tokens=128,
        block_size=16,
        kv_cache_tokens=4096,
        kv_blocks_total=256,
        num_parameters=1000,
        weights_bytes=4000,
        adapters=[
            AdapterFacts(
                name=name, source=f"org/{name}", path="", rank=8, base_model=None, bytes=100
            )
            for name in adapters
        ],
    )


class ScriptedClient:
    """Answers every request with `reply(request)` as tokens, `per_step` at a time, then EOS.

    `gate` holds every step back until it is set; `aborted` collects what was not read to its end.
    """

    def __init__(self, encode: Callable[[str], list[int]], facts: ModelFacts) -> None:
        self.reply: Callable[[Request], str] = lambda request: "Hello, world"
        self.per_step = 1
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail_after: int | None = None
        self.refuse: str | None = None
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.running = 0
        self.shortcuts = 0
        self.state = "ready"
        self.stats = EngineStats(kv_blocks_total=256)
        self.facts: ModelFacts | None = facts
        self._encode = encode

    async def generate(
        self, request: Request, shortcut: Shortcut | None = None
    ) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.running += 1
        ended = False
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
            if self.refuse is not None:
                ended = True
                yield Delta(id=request.id, finish="error", error=self.refuse)
                return
            for number, delta in enumerate(self._deltas(request)):
                await self.gate.wait()
                await asyncio.sleep(0)
                if self.fail_after is not None and number >= self.fail_after:
                    ended = True
                    raise EngineUnavailable("the engine died: killed by SIGKILL")
                if shortcut is not None and shortcut(delta):
                    self.shortcuts += 1
                    continue
                ended = delta.finish is not None
                yield delta
        finally:
            self.running -= 1
            if not ended:
                self.aborted.append(request.id)

    def _deltas(self, request: Request) -> Iterator[Delta]:
        sampling = request.sampling
        ids = [*self._encode(self.reply(request)), EOS_ID]
        finish = "eos"
        if len(ids) > sampling.max_tokens:
            ids, finish = ids[: sampling.max_tokens], "length"
        for start in range(0, len(ids), self.per_step):
            step = ids[start : start + self.per_step]
            first, last = start == 0, start + self.per_step >= len(ids)
            yield Delta(
                id=request.id,
                token_ids=step,
                logprobs=None
                if sampling.logprobs is None
                else [self._logprobs(token, sampling.logprobs) for token in step],
                prompt_logprobs=[
                    None,
                    *(
                        self._logprobs(token, sampling.prompt_logprobs)
                        for token in request.prompt_ids[1:]
                    ),
                ]
                if first and sampling.prompt_logprobs is not None
                else None,
                finish=finish if last else None,
                num_cached_tokens=3 if first else 0,
                queue_time=0.25 if first else 0.0,
            )

    @staticmethod
    def _logprobs(token: int, top: int) -> TokenLogprobs:
        others = [(token + i) % 256 for i in range(top)]
        return TokenLogprobs(token, -token / 100, 1, others, [-token / 100 - i for i in range(top)])

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def close(self) -> None:
        self.state = "closed"
