"""The engine's process without a supervisor: the test holds the other end of the channel."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tgi_cli.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from tgi_cli.engine.control import ControlChannel
from tgi_cli.engine.messages import EngineStart, Failed, Heartbeat, Ready, Starting, Status
from tgi_cli.engine.process_client import ProcessClient

_MODULE = ("-m", "tgi_cli.engine.process", "--control-fd")


def config_of(path: Path | str, *, num_shard: int = 1, **changes: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model_id=str(path), device="cpu", max_model_len=512),
        cache=CacheConfig(kv_cache_tokens=4096),
        scheduler=SchedulerConfig(max_num_seqs=8, max_batch_tokens=64),
        parallel=ParallelConfig(num_threads=1, num_shard=num_shard),
        **changes,
    )


class EngineChild:
    """A started engine process; `statuses` are those read so far."""

    def __init__(self, runtime_dir: Path, epoch: int = 0, weights_fd: int | None = None) -> None:
        kept = () if weights_fd is None else (weights_fd,)
        options = [option for fd in kept for option in ("--weights-fd", str(fd))]
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                (sys.executable, *_MODULE, str(theirs.fileno()), *options),
                pass_fds=[theirs.fileno(), *kept],
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self.control = ControlChannel(ours)
        ours.settimeout(60)  # a test fails rather than hangs
        self.runtime_dir = runtime_dir
        self.epoch = epoch
        self.statuses: list[Status] = []
        self._decode = msgspec.msgpack.Decoder(Status).decode

    def start(self, config: EngineConfig) -> None:
        self.control.send(
            EngineStart(config=config, runtime_dir=str(self.runtime_dir), epoch=self.epoch)
        )

    def next_status(self) -> Status | None:
        data = self.control.receive()
        if data is None:
            return None
        status = self._decode(data)
        self.statuses.append(status)
        return status

    def ready(self) -> Ready:
        while True:
            status = self.next_status()
            if isinstance(status, Ready):
                return status
            assert isinstance(status, Starting), (status, self.process.poll())

    def failed(self) -> Failed:
        while True:
            status = self.next_status()
            if isinstance(status, Failed):
                return status
            assert isinstance(status, Starting), status

    def heartbeat(self) -> Heartbeat:
        while True:
            status = self.next_status()
            if isinstance(status, Heartbeat):
                return status

    def end(self) -> None:
        self.control.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def running(
    config: EngineConfig, runtime_dir: Path, weights_fd: int | None = None
) -> Iterator[tuple[EngineChild, Ready]]:
    child = EngineChild(runtime_dir, weights_fd=weights_fd)
    try:
        child.start(config)
        yield child, child.ready()
    finally:
        child.end()


def connected(ready: Ready) -> ProcessClient:
    client = ProcessClient()
    client.connect(ready)
    return client
