"""What `tgi launch --node-rank K` runs for K above 0: this node's ranks, started when node 0 asks.

It serves no HTTP and computes nothing. It ends with node 0, and comes back to it if only the
engine there is started anew. Imports no torch; the model is fetched here: a node reads its own
files.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import msgspec

from tgi_cli import __version__, model_path
from tgi_cli.config import EngineConfig
from tgi_cli.engine.control import ControlChannel, how_it_ended
from tgi_cli.engine.cores import cores_by_node, share_out
from tgi_cli.engine.fingerprint import fingerprint
from tgi_cli.engine.machine import usable_cores
from tgi_cli.engine.network import dial, show
from tgi_cli.engine.node_messages import (
    Farewell,
    Link,
    NodeHello,
    NodeLeaves,
    NodeReady,
    RankEnded,
    Refused,
    Serving,
    ToNode,
    Welcome,
)
from tgi_cli.errors import EngineError, UsageError

log = logging.getLogger(__name__)

_REJOIN = 60.0  # seconds to look for node 0 once it is lost; its engine may be starting anew
_PAUSE = 0.5  # seconds before coming back


class Node:
    """This machine as one of several. The engine's settings are node 0's, but for the model's path.

    Args:
        config: as the command line says; `parallel.node_rank` is above 0.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._parallel = config.parallel
        assert self._parallel.master_addr is not None
        self._master: str = self._parallel.master_addr
        self._where = show(self._master, self._parallel.master_port)
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._served = False
        self._decode = msgspec.msgpack.Decoder(ToNode).decode

    def run(self) -> int:
        """Take part until node 0 stops; returns 0 then.

        Raises:
            EngineError: node 0 cannot be reached, is lost, or failed.
            UsageError: it refused this node.
            HubError: the model cannot be found or fetched.
        """
        deadline = time.monotonic() + self._parallel.dist_timeout
        while True:
            patience = max(1.0, round(deadline - time.monotonic()))
            control = ControlChannel(dial(self._master, self._parallel.master_port, patience))
            try:
                if self._take_part(control):
                    log.info("node 0 has stopped, and this node with it")
                    return 0
            except BaseException:
                with suppress(OSError):
                    control.send(NodeLeaves())
                raise
            finally:
                self._end_ranks()
                control.hang_up()
                control.close()
            if self._served:
                self._served, deadline = False, time.monotonic() + _REJOIN
            if time.monotonic() >= deadline:
                raise EngineError(f"node 0 at {self._where} is lost")
            log.error("node 0 at %s is lost; looking for it again", self._where)
            time.sleep(_PAUSE)

    def _take_part(self, control: ControlChannel) -> bool:
        """One life of node 0's engine; whether it was told to stop."""
        own = self._parallel
        hello = NodeHello(
            version=__version__,
            node_rank=own.node_rank,
            nnodes=own.nnodes,
            num_shard=own.num_shard,
        )
        with suppress(OSError):  # its reason to hang up is read below
            control.send(hello)
        log.info("node 0 answers at %s", self._where)
        ready = self._ready(control.local_address)
        with suppress(OSError):
            control.send(ready)
        while (data := control.receive()) is not None:
            message = self._decode(data)
            if isinstance(message, Refused):
                raise UsageError(message.message, hint=message.hint)
            if isinstance(message, Farewell):
                if message.failure is None:
                    return True
                if not message.again:
                    raise EngineError(f"node 0 failed: {message.failure}")
                log.error("node 0 failed: %s", message.failure)
                return False
            if isinstance(message, Serving):
                self._served = True
                log.info("ready: this node serves ranks %s of %d", self._listed(), own.num_shard)
            else:
                self._start(message, control)
        return False

    def _ready(self, address: str) -> NodeReady:
        ranks = self._parallel.ranks(self._parallel.node_rank)
        path = model_path.resolve(self._config.model)
        threads = self._parallel.num_threads or usable_cores()
        return NodeReady(
            fingerprint=fingerprint(path),
            model_path=str(path),
            address=address,
            cores=share_out(cores_by_node(), len(ranks)),
            num_threads=max(1, threads // len(ranks)),
        )

    def _start(self, welcome: Welcome, control: ControlChannel) -> None:
        for rank in welcome.ranks:
            links = [self._link(welcome.token, rank, purpose) for purpose in ("control", "steps")]
            fds = [link.fileno() for link in links]
            process = subprocess.Popen(
                [sys.executable, "-m", "tgi_cli.engine.worker", "--rank", str(rank),
                 "--control-fd", str(fds[0]), "--steps-fd", str(fds[1])],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=fds,
            )  # fmt: skip
            for link in links:
                link.close()  # the rank's alone from now on
            self._ranks[rank] = process
            threading.Thread(
                target=self._attend,
                args=(rank, process, control),
                name=f"tgi-rank-{rank}",
                daemon=True,
            ).start()

    def _link(self, token: str, rank: int, purpose: str) -> socket.socket:
        link = dial(self._master, self._parallel.master_port, self._parallel.dist_timeout)
        with suppress(OSError):  # a rank without its channels ends by itself
            ControlChannel(link).send(Link(token=token, rank=rank, purpose=purpose))
        return link

    def _attend(self, rank: int, process: subprocess.Popen[bytes], control: ControlChannel) -> None:
        """Tell node 0 how a rank ended, unless it was ended from here."""
        code = process.wait()
        if self._ranks.get(rank) is not process:
            return
        log.error("rank %d (process %d) %s", rank, process.pid, how_it_ended(code))
        with suppress(OSError):
            control.send(RankEnded(rank=rank, code=code))

    def _end_ranks(self) -> None:
        """End all ranks, also those that are stopped."""
        ranks, self._ranks = self._ranks, {}
        for process in ranks.values():
            process.kill()
        for process in ranks.values():
            process.wait()

    def _listed(self) -> str:
        return ", ".join(map(str, self._ranks))
