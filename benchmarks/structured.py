"""What structured output costs: tokens per second of constrained streams against free ones.

Starts `tgi launch` and sends the same prompts in turns, free and held to a JSON Schema that cannot
be complete before `--tokens`, all streams at once. Prints the median of each and their ratio.

    python benchmarks/structured.py MODEL_FOLDER --streams 32 --tokens 64 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import aiohttp

#: What the issue asks: constrained throughput is at least this share of the unconstrained.
LEAST_SHARE = 0.85

_SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "kind": {"enum": ["animal", "plant", "stone"]},
            "size": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "kind", "size", "tags"],
        "additionalProperties": False,
    },
}


async def stream(session: aiohttp.ClientSession, body: dict[str, Any]) -> int:
    """Run one stream to its end; the tokens it wrote."""
    async with session.post("/v1/chat/completions", json=body) as response:
        lines = [line async for line in response.content if line.startswith(b"data: {")]
    last = json.loads(lines[-1].removeprefix(b"data: "))
    if "usage" not in last:
        raise SystemExit(f"the server refused: {last}")
    return int(last["usage"]["completion_tokens"])


async def throughput(
    session: aiohttp.ClientSession, streams: int, tokens: int, more: dict[str, Any]
) -> float:
    """Tokens per second of so many streams at once, prompts included in the time."""
    bodies = [
        {
            "messages": [{"role": "user", "content": f"List things a traveller sees on day {i}."}],
            "max_tokens": tokens,
            "seed": i,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        for i in range(streams)
    ]
    started = time.perf_counter()
    written = await asyncio.gather(*(stream(session, body) for body in bodies))
    if min(written) < tokens:
        raise SystemExit(f"a stream ended after {min(written)} of {tokens} tokens")
    return sum(written) / (time.perf_counter() - started)


async def measure(url: str, streams: int, tokens: int, rounds: int) -> tuple[float, float]:
    """Medians over the rounds, free and constrained; one round before them warms up."""
    form = {"type": "json_schema", "json_schema": {"name": "things", "schema": _SCHEMA}}
    kinds: dict[str, dict[str, Any]] = {
        "free": {"ignore_eos": True},
        "constrained": {"response_format": form},
    }
    seen: dict[str, list[float]] = {name: [] for name in kinds}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(base_url=url, timeout=timeout) as session:
        while (await session.get("/health")).status != 200:
            await asyncio.sleep(0.5)
        for number in range(rounds + 1):
            for name, more in kinds.items():
                rate = await throughput(session, streams, tokens, more)
                if number:
                    seen[name].append(rate)
                    print(f"round {number}: {name} {rate:.1f} tokens/s", file=sys.stderr)
    return statistics.median(seen["free"]), statistics.median(seen["constrained"])


def main() -> None:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    command = [sys.executable, "-m", "tgi_cli", "launch", "--model-id", options.model]
    command += ["--port", "0", "--max-num-seqs", str(options.streams)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        url = server.stdout.readline().decode().strip()
        if not url:
            raise SystemExit("the server did not start")
        free, constrained = asyncio.run(
            measure(url, options.streams, options.tokens, options.rounds)
        )
    finally:
        server.terminate()
        server.wait(60)
        server.stdout.close()
    share = constrained / free
    print(
        f"{options.streams} streams of {options.tokens} tokens, median of {options.rounds} rounds"
    )
    print(f"free         {free:8.1f} tokens/s")
    print(f"constrained  {constrained:8.1f} tokens/s")
    verdict = "as asked" if share >= LEAST_SHARE else f"less than {LEAST_SHARE:.0%}"
    print(f"share        {share:8.1%} ({verdict})")


if __name__ == "__main__":
    main()
