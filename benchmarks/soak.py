"""Promise one under load for as long as you like: every answer must equal the one given alone.

    python benchmarks/soak.py MODEL --minutes 60 [--dtype bfloat16] [--quantize int4] [--seed 1]

Draws requests at random (lengths, beginnings in common, greedy and sampled, penalties, logprobs,
several of them asked again and again), notes what each answers alone on one thread without a prefix
cache, and then runs them in engine after engine with random threads, step budgets, sequences at
once, KV cache sizes and block sizes, entering at random, some aborted on the way. Token ids and
logprobs must be the same bits. Exit code 1 and the request, its engine and the first difference if
they are not. Takes the memory of one engine; ends by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tgi_cli.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from tgi_cli.engine.core import EngineCore
from tgi_cli.engine.messages import Abort, Request
from tgi_cli.sampling import SamplingParams

LONGEST = 640  # tokens of prompt and answer
Answer = tuple[list[int], list[Any]]


@dataclass(frozen=True)
class Setting:
    """What may not change an answer."""

    num_threads: int
    max_batch_tokens: int
    max_num_seqs: int
    kv_cache_tokens: int
    block_size: int
    prefix_caching: bool


ALONE = Setting(1, 4096, 1, 2 * LONGEST, 16, prefix_caching=False)


def drawn_setting(draw: random.Random) -> Setting:
    """Small budgets and caches are likely: they split prompts and preempt."""
    return Setting(
        num_threads=draw.choice([1, 2, 2, 3]),
        max_batch_tokens=draw.choice([16, 33, 64, 129, 256, 512, 2048]),
        max_num_seqs=draw.choice([1, 2, 5, 8, 16]),
        kv_cache_tokens=draw.choice([LONGEST + 32, 2 * LONGEST, 16 * LONGEST]),
        block_size=16,
        prefix_caching=draw.random() < 0.8,
    )


def drawn_requests(draw: random.Random, count: int, vocab_size: int) -> list[Request]:
    """Half of them begin with one of a few shared texts."""

    def tokens(length: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(length)]

    shared = [tokens(length) for length in (48, 160, 304)]
    requests = []
    for number in range(count):
        prompt = draw.choice(shared) if draw.random() < 0.5 else []
        prompt = prompt + tokens(draw.choice([1, 7, 16, 40, 100, 150]))
        sampling: dict[str, Any] = {"temperature": 0.0}
        if draw.random() < 0.6:
            sampling = {
                "temperature": draw.choice([0.3, 0.8, 1.2]),
                "seed": draw.randrange(2**31),
                "top_k": draw.choice([0, 5, 50]),
                "top_p": draw.choice([1.0, 0.95, 0.6]),
                "min_p": draw.choice([0.0, 0.05]),
            }
        if draw.random() < 0.3:
            sampling["repetition_penalty"] = 1.15
        if draw.random() < 0.2:
            sampling["frequency_penalty"] = 0.4
        requests.append(
            Request(
                id=str(number),
                prompt_ids=prompt,
                sampling=SamplingParams(
                    max_tokens=draw.choice([1, 4, 16, 48, 160]),
                    ignore_eos=True,
                    logprobs=draw.choice([None, 0, 3]),
                    **sampling,
                ),
            )
        )
    return requests


def engine(options: argparse.Namespace, setting: Setting) -> EngineCore:
    """A fresh engine."""
    return EngineCore.load(
        EngineConfig(
            model=ModelConfig(
                model_id=str(options.model),
                dtype=options.dtype,
                quantize=options.quantize,
                device="cpu",
                max_model_len=LONGEST,
            ),
            cache=CacheConfig(
                block_size=setting.block_size,
                kv_cache_tokens=setting.kv_cache_tokens,
                prefix_caching=setting.prefix_caching,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=setting.max_num_seqs, max_batch_tokens=setting.max_batch_tokens
            ),
            parallel=ParallelConfig(num_threads=setting.num_threads),
        ),
        lambda phase, fraction: None,
    )


def answers(
    core: EngineCore, requests: list[Request], draw: random.Random | None
) -> dict[str, Answer]:
    """Run them, with `draw` entering at random and some aborted; those that ended by themselves."""
    found: dict[str, Answer] = {request.id: ([], []) for request in requests}
    waiting, aborted = list(requests), set()
    while waiting or core.has_work():
        while waiting and (draw is None or not core.has_work() or draw.random() < 0.4):
            core.accept(waiting.pop())
        if draw is not None and draw.random() < 0.01:
            victim = draw.choice(requests).id
            if all(request.id != victim for request in waiting):
                aborted.add(victim)
                core.accept(Abort(ids=[victim]))
        for delta in core.step():
            if delta.error is not None:
                raise RuntimeError(f"request {delta.id} failed: {delta.error}")
            found[delta.id][0].extend(delta.token_ids)
            found[delta.id][1].extend(delta.logprobs or [])
    return {name: answer for name, answer in found.items() if name not in aborted}


def difference(expected: Answer, actual: Answer) -> str:
    """Where two answers part."""
    for at, (wanted, given) in enumerate(zip(expected[0], actual[0], strict=False)):
        if wanted != given:
            return f"token {at} is {given} and not {wanted}"
    if len(expected[0]) != len(actual[0]):
        return f"{len(actual[0])} tokens and not {len(expected[0])}"
    pairs = zip(expected[1], actual[1], strict=False)
    at = next((i for i, (wanted, given) in enumerate(pairs) if wanted != given), 0)
    return f"logprobs of token {at} are {actual[1][at : at + 1]} and not {expected[1][at : at + 1]}"


def main() -> None:
    """Run until the time is over or an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--requests", type=int, default=60, help="distinct ones")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    draw = random.Random(options.seed)
    core = engine(options, ALONE)
    if not core.facts.deterministic:
        sys.exit(f"the kernels `{core.facts.backend}` do not make the promise")
    requests = drawn_requests(draw, options.requests, core.facts.vocab_size)
    # Only steps of which nobody wants log probabilities begin before they are asked for.
    unlogged = [request for request in requests if request.sampling.logprobs is None]
    expected: dict[str, Answer] = {}
    for request in requests:
        expected |= answers(core, [request], None)
    core.close()
    totals = {"engines": 0, "answers": 0, "tokens": 0, "preemptions": 0, "prefix_hit_tokens": 0}
    while time.monotonic() < end:
        setting = drawn_setting(draw)
        core = engine(options, setting)
        for _ in range(4):
            among = draw.choice([requests, unlogged])
            chosen = draw.sample(among, draw.randint(1, len(among) // 2))
            for name, answer in answers(core, chosen, draw).items():
                if answer != expected[name]:
                    print(json.dumps(asdict(setting)), file=sys.stderr)
                    sys.exit(f"request {name}: {difference(expected[name], answer)}")
                totals["answers"] += 1
                totals["tokens"] += len(answer[0])
        stats = core.stats()
        totals["engines"] += 1
        totals["preemptions"] += stats.preemptions
        totals["prefix_hit_tokens"] += stats.prefix_hit_tokens
        core.close()
        left = (end - time.monotonic()) / 60
        print(json.dumps({**totals, "minutes_left": round(left, 1)}), file=sys.stderr, flush=True)
    print(json.dumps({"model": str(options.model), "same": True, **totals}))


if __name__ == "__main__":
    main()
