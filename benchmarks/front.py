"""What the HTTP worker costs: its CPU time per streamed token, and short requests per second of it.

Starts one real HTTP worker and, in the engine's place, a process that speaks the engine's protocol;
neither torch nor weights are loaded. It answers at once, where a worker that is behind sends
several tokens in one event, and then in steps of `--period`, where each token is an event and a
write to a socket of its own. CPU time is measured, not elapsed time.

    python benchmarks/front.py MODEL_FOLDER            # any folder with a tokenizer and a template
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import psutil

from tgi_cli.config import EngineConfig, ModelConfig, ServerConfig
from tgi_cli.engine.messages import (
    Abort,
    Delta,
    EngineStats,
    Heartbeat,
    ModelFacts,
    Ready,
    Request,
    Status,
    WorkerStart,
)
from tgi_cli.engine.process import ZmqTransport
from tgi_cli.serve.child import Child
from tgi_cli.serve.listener import listen
from tgi_cli.tokenizer import load_tokenizer

#: What the issue asks of one worker.
MOST_MICROSECONDS = 30.0
LEAST_REQUESTS = 1500.0

_TEXT = (
    "The river ran high in spring, and the ferry did not cross for nine days. On the tenth the "
    "water fell; a boy who had waited on the far bank with a letter was the first to step aboard, "
    "and he would not say whom it was for. "
)


def run_engine(endpoint: str, model: str, period: float) -> None:
    """Answer every request with one token a step, a step every `period` seconds."""
    ids = load_tokenizer(model).encode(_TEXT, False)
    transport = ZmqTransport(endpoint)
    live: dict[str, tuple[int, int]] = {}  # tokens sent, tokens wanted
    num_steps = 0
    due = time.monotonic()
    print("listening", flush=True)
    while True:
        for message in transport.receive(wait=not live):
            if isinstance(message, Request):
                live[message.id] = (0, message.sampling.max_tokens)
            elif isinstance(message, Abort):
                for request_id in message.ids:
                    live.pop(request_id, None)
        deltas = []
        for request_id, (sent, wanted) in list(live.items()):
            finish = "length" if sent + 1 == wanted else None
            token = ids[sent % len(ids)]
            deltas.append(Delta(id=request_id, token_ids=[token], finish=finish))
            if finish is None:
                live[request_id] = (sent + 1, wanted)
            else:
                del live[request_id]
        if deltas:
            num_steps += 1
            transport.send(deltas, EngineStats(num_steps=num_steps, num_running=len(live)))
        due = max(due + period, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


class Connection:
    """One keep-alive HTTP/1.1 connection that sends chats and reads the answers, cheaply."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 26))

    async def chat(self, *, max_tokens: int, stream: bool) -> int:
        """Ask, read the whole answer, return how many events it came in."""
        body = {
            "messages": [{"role": "user", "content": "Tell me of the river."}],
            "max_tokens": max_tokens,
            "stream": stream,
        }
        data = json.dumps(body).encode()
        self._writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head[:16]:
            raise SystemExit(f"the worker answered {head[:100]!r}")
        if stream:
            answer = await self._reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            return answer.count(b"data: ") - 1
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await self._reader.readexactly(length)
        return 1

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


class Front:
    """A running worker over the engine's stand-in."""

    def __init__(self, worker: Child, engine: subprocess.Popen[bytes], port: int) -> None:
        self._worker = worker
        self._engine = engine
        self._process = psutil.Process(worker.pid)
        self.port = port

    @classmethod
    async def start(cls, model: str, folder: str, period: float, log_level: str) -> Front:
        """Start both and wait until the worker has loaded its tokenizer."""
        endpoint = f"ipc://{folder}/engine.sock"
        engine = subprocess.Popen(
            [sys.executable, __file__, model, "--engine", endpoint, "--period", str(period)],
            stdout=subprocess.PIPE,
        )
        assert engine.stdout is not None
        engine.stdout.readline()
        listener = listen("127.0.0.1", 0)
        start = WorkerStart(
            config=ServerConfig(max_concurrent_requests=4096, log_level=log_level),
            engine=EngineConfig(model=ModelConfig(model_id=model)),
            index=0,
            runtime_dir=folder,
        )
        fd = listener.fileno()
        worker = await Child.spawn(
            "tgi_cli.serve.worker", start, arguments=("--listen-fd", str(fd)), inherit=(fd,)
        )
        port = listener.getsockname()[1]
        listener.close()
        worker.send(Ready(endpoint=endpoint, facts=_facts(model)))
        data = await worker.receive()
        if data is None or not isinstance(msgspec.msgpack.decode(data, type=Status), Ready):
            raise SystemExit("the worker did not become ready")
        worker.send(Heartbeat(num_steps=0, step_age=0.0, has_work=False))
        return cls(worker, engine, port)

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU time of the worker so far: all of it, and the kernel's part on its behalf."""
        times = self._process.cpu_times()
        return times.user + times.system, times.system

    async def stop(self) -> None:
        """End both."""
        self._engine.send_signal(signal.SIGTERM)
        self._engine.wait()
        await self._worker.end(5.0)


async def _streams(front: Front, num_streams: int, num_tokens: int) -> tuple[float, float, float]:
    """CPU microseconds per streamed token, the kernel's part, and events per token.

    There is an event for each token unless several were merged, because the worker was behind.
    """
    connections = [await Connection.open(front.port) for _ in range(num_streams)]
    asks = (c.chat(max_tokens=num_tokens // 8, stream=True) for c in connections)
    await asyncio.gather(*asks)  # warm
    before = front.cpu_seconds()
    asks = (c.chat(max_tokens=num_tokens, stream=True) for c in connections)
    events = sum(await asyncio.gather(*asks)) - 2 * num_streams  # not the role, not the reason
    cost, kernel = (a - b for a, b in zip(front.cpu_seconds(), before, strict=True))
    for connection in connections:
        connection.close()
    total = num_streams * num_tokens
    return cost / total * 1e6, kernel / total * 1e6, events / total


async def _requests(front: Front, num_clients: int, count: int) -> float:
    """Short answers per second of the worker's CPU."""
    connections = [await Connection.open(front.port) for _ in range(num_clients)]
    left = itertools.count()

    async def ask(connection: Connection, most: int) -> None:
        while next(left) < most:
            await connection.chat(max_tokens=1, stream=False)

    await asyncio.gather(*(ask(connection, count // 8) for connection in connections))
    left = itertools.count()
    before = front.cpu_seconds()[0]
    await asyncio.gather(*(ask(connection, count) for connection in connections))
    cost = front.cpu_seconds()[0] - before
    for connection in connections:
        connection.close()
    return count / cost


def _facts(model: str) -> ModelFacts:
    return ModelFacts(
        model_id=model,
        model_path=model,
        model_sha=None,
        architecture="none",
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        device="cpu",
        backend="none",
        quantization=None,
        activation_dtype="bfloat16",
        deterministic=True,
        vocab_size=1 << 20,
        max_model_len=8192,
        max_num_seqs=64,
        max_batch_tokens=512,
        block_size=16,
        kv_cache_tokens=1 << 20,
        kv_blocks_total=1 << 16,
        num_parameters=0,
        weights_bytes=0,
    )


async def _measure(options: argparse.Namespace) -> bool:
    at_once = await _run(options, 0.0)
    paced = await _run(options, options.period, requests=False)
    for name, (cost, kernel, events, _) in (("at once", at_once), ("in steps", paced)):
        print(
            f"answers {name:9} {cost:6.1f} us of CPU per streamed token, {kernel:.1f} in the kernel"
        )
        print(f"                  {events:6.2f} events per token, {options.streams} streams")
    print(f"short requests    {at_once[3]:6.0f} a second per core")
    print(f"targets: {MOST_MICROSECONDS:g} us (at once), {LEAST_REQUESTS:g} requests")
    return at_once[0] < MOST_MICROSECONDS and at_once[3] >= LEAST_REQUESTS


async def _run(
    options: argparse.Namespace, period: float, *, requests: bool = True
) -> tuple[float, float, float, float]:
    """The best of several runs: what `_streams` gives, and short requests per second."""
    with tempfile.TemporaryDirectory() as folder:
        front = await Front.start(options.model, folder, period, options.log_level)
        try:
            streams = [
                await _streams(front, options.streams, options.tokens)
                for _ in range(options.repeats)
            ]
            rates = [
                await _requests(front, options.streams, options.requests)
                for _ in range(options.repeats if requests else 0)
            ]
        finally:
            await front.stop()
    return *min(streams), max(rates, default=0.0)


def main() -> None:
    """Measure and print; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder with a tokenizer and a chat template")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3, help="the best of them counts")
    parser.add_argument("--period", type=float, default=0.01, help="seconds of a paced step")
    parser.add_argument("--log-level", default="WARNING")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = str(Path(options.model).resolve())
    if options.engine:
        run_engine(options.engine, options.model, options.period)
    elif not asyncio.run(_measure(options)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
