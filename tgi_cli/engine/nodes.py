"""The other nodes as node 0 sees them: they come to `--master-addr`, are checked, and are told.

Only their ranks compute and speak (`ranks`); a node itself says what became of their processes.
Knows neither steps nor the model, whose fingerprint it is given.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from tgi_cli import __version__
from tgi_cli.config import ParallelConfig
from tgi_cli.engine.control import ControlChannel, Ending
from tgi_cli.engine.network import listen, notice_death, show
from tgi_cli.engine.node_messages import (
    Farewell,
    FromNode,
    Link,
    NodeHello,
    NodeLeaves,
    NodeReady,
    Opening,
    RankEnded,
    Refused,
    Serving,
    ToNode,
    Welcome,
)
from tgi_cli.errors import EngineError

log = logging.getLogger(__name__)

#: The channels `control` and `steps` of one rank.
Channels = tuple[ControlChannel, ControlChannel]

_GREETING = 10.0  # seconds a connection may take to say what it is
_GREETING_SIZE = 1 << 16  # bytes; a stranger may send anything
_STOPPED = "the engine was stopped while it waited for the other nodes"
_EXPLANATION = 1.0  # seconds to wait for a node's word on why its rank is gone


class Node:
    """One other node, connected."""

    def __init__(self, node_rank: int, host: str, channel: ControlChannel) -> None:
        self.node_rank = node_rank
        self.host = host
        self.channel = channel
        self.ready: NodeReady | None = None
        self._endings: dict[int, Ending] = {}
        self._changed = threading.Condition()

    def __str__(self) -> str:
        return f"node {self.node_rank} ({self.host})"

    def ended(self, rank: int | None, ending: Ending) -> None:
        """Note what became of a rank, None for all of the node's; the first word on it counts."""
        with self._changed:
            self._endings.setdefault(-1 if rank is None else rank, ending)
            self._changed.notify_all()

    def ending(self, rank: int) -> Ending:
        """What became of a rank whose connection has ended; waits for the node's own word."""
        with self._changed:
            self._changed.wait_for(
                lambda: rank in self._endings or -1 in self._endings, _EXPLANATION
            )
            found = self._endings.get(-1) or self._endings.get(rank)
        return found or Ending("is out of reach")


class Nodes:
    """Where the other nodes come to. Opened before the model is, so that nobody is turned away.

    Raises:
        UsageError: `--master-addr` and `--master-port` cannot be listened on.
    """

    def __init__(self, parallel: ParallelConfig) -> None:
        assert parallel.master_addr is not None
        self._parallel = parallel
        self._listener = listen(parallel.master_addr, parallel.master_port)
        #: The address of node 0 by which the others reach it.
        self.address: str = self._listener.getsockname()[0]
        self._token = secrets.token_hex(16)
        self._changed = threading.Condition()
        self._fingerprint: str | None = None
        self._nodes: dict[int, Node] = {}
        self._links: dict[tuple[int, str], socket.socket] = {}
        self._refusal: str | None = None
        self._closed = False
        self._decode_opening = msgspec.msgpack.Decoder(Opening).decode
        self._decode = msgspec.msgpack.Decoder(FromNode).decode
        threading.Thread(target=self._accept, name="tgi-nodes", daemon=True).start()

    def gather(self, fingerprint: str) -> None:
        """Wait until every node is there with the same model.

        Raises:
            EngineError: one did not come within `--dist-timeout`; names it.
        """
        numbers = range(1, self._parallel.nnodes)
        where = show(self.address, self._parallel.master_port)
        log.info("waiting for %d other nodes at %s", len(numbers), where)
        with self._changed:
            self._fingerprint = fingerprint
            self._changed.notify_all()

        def absent() -> list[str]:
            return [f"node {number}" for number in numbers if number not in self._nodes]

        # A node that has joined may still have to fetch the model, which takes what it takes; only
        # the time counts in which one is not there, or is there no more.
        patience = self._parallel.dist_timeout
        while True:
            moment = time.monotonic()
            self._wait(absent, "joined", patience)
            patience -= time.monotonic() - moment
            with self._changed:
                self._changed.wait_for(lambda: self._all_ready() or absent())
                if self._closed:
                    raise EngineError(_STOPPED)
                if not absent():
                    return

    def connect(self) -> dict[int, tuple[Node, Channels]]:
        """Have every node start its ranks; where each is and how to reach it, by rank.

        Raises:
            EngineError: a node was lost.
        """
        with self._changed:
            nodes = list(self._nodes.values())
        wanted = {rank: node for node in nodes for rank in self._parallel.ranks(node.node_rank)}
        for node in nodes:
            welcome = Welcome(token=self._token, ranks=list(self._parallel.ranks(node.node_rank)))
            with suppress(OSError):  # noticed below: its ranks do not come
                node.channel.send(welcome)

        def missing() -> list[str]:
            for node in nodes:
                if self._nodes.get(node.node_rank) is not node:
                    raise EngineError(f"{node} was lost before it could start its ranks")
            return [
                f"rank {rank} on {node}"
                for rank, node in wanted.items()
                if not {(rank, "control"), (rank, "steps")} <= set(self._links)
            ]

        self._wait(missing, "connected", self._parallel.dist_timeout)
        with self._changed:
            return {
                rank: (
                    node,
                    (
                        ControlChannel(self._links.pop((rank, "control"))),
                        ControlChannel(self._links.pop((rank, "steps"))),
                    ),
                )
                for rank, node in wanted.items()
            }

    def serving(self) -> None:
        """Tell every node that all ranks are loaded."""
        self._tell(Serving())

    def close(self, failure: str | None = None, *, again: bool = False) -> None:
        """Say farewell and let go of all nodes, which end their ranks. May be called twice.

        Args:
            failure: what the engine died of, None if it was stopped.
            again: whether an engine will be started anew here.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # also ends `accept`
        self._listener.close()
        self._tell(Farewell(failure=failure, again=again))
        with self._changed:
            nodes, links = list(self._nodes.values()), list(self._links.values())
        for node in nodes:
            node.channel.hang_up()
        for link in links:
            link.close()

    def _tell(self, message: ToNode) -> None:
        with self._changed:
            nodes = list(self._nodes.values())
        for node in nodes:
            with suppress(OSError):
                node.channel.send(message)

    def _all_ready(self) -> bool:
        return self._closed or (
            len(self._nodes) == self._parallel.nnodes - 1
            and all(node.ready is not None for node in self._nodes.values())
        )

    def _wait(self, missing: Callable[[], list[str]], what: str, patience: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not missing(), max(0.0, patience))
            left, refusal = missing(), self._refusal
        if self._closed:
            raise EngineError(_STOPPED)
        if left:
            limit = self._parallel.dist_timeout
            raise EngineError(
                f"{' and '.join(left)} has not {what} within {limit:g} seconds (--dist-timeout)"
                + (f"; last, {refusal}" if refusal else ""),
                hint=f"run `tgi launch` there with --nnodes {self._parallel.nnodes}, its own "
                f"--node-rank, --master-addr {self._parallel.master_addr} and "
                f"--master-port {self._parallel.master_port}",
            )

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(
                target=self._greet,
                args=(connection, str(address[0])),
                name="tgi-node",
                daemon=True,
            ).start()

    def _greet(self, connection: socket.socket, host: str) -> None:
        """Find out what a connection is, and listen to it if it is a node."""
        notice_death(connection)
        channel = ControlChannel(connection)
        connection.settimeout(_GREETING)
        try:
            data = channel.receive(limit=_GREETING_SIZE)
            opening = None if data is None else self._decode_opening(data)
        except msgspec.DecodeError:
            opening = None
        if opening is None:
            log.warning("a connection from %s is no node of ours and was closed", host)
            channel.close()
            return
        connection.settimeout(None)
        if isinstance(opening, Link):
            self._link(opening, connection)
            return
        node = Node(opening.node_rank, host, channel)
        refused = self._admit(opening, node)
        if refused is not None:
            self._refuse(node, refused)
            return
        try:
            self._listen(node)
        finally:
            with self._changed:
                if self._nodes.get(node.node_rank) is node:
                    del self._nodes[node.node_rank]
                self._changed.notify_all()
            channel.close()

    def _link(self, link: Link, connection: socket.socket) -> None:
        with self._changed:
            known = secrets.compare_digest(link.token, self._token) and not self._closed
            if not known or (link.rank, link.purpose) in self._links:
                connection.close()
                return
            self._links[link.rank, link.purpose] = connection
            self._changed.notify_all()

    def _admit(self, hello: NodeHello, node: Node) -> Refused | None:
        own = self._parallel
        if hello.version != __version__:
            return Refused(
                message=f"{node} runs tgi {hello.version} and node 0 {__version__}",
                hint="install the same version on every node",
            )
        for flag, theirs, ours in (
            ("--nnodes", hello.nnodes, own.nnodes),
            ("--num-shard", hello.num_shard, own.num_shard),
        ):
            if theirs != ours:
                return Refused(
                    message=f"{node} was started with {flag} {theirs} and node 0 with {ours}",
                    hint=f"give every node the same {flag}",
                )
        with self._changed:
            there = self._nodes.get(hello.node_rank)
            if not 0 < hello.node_rank < own.nnodes or there is not None or self._closed:
                return Refused(
                    message=f"{node} is there already, from {there.host}"
                    if there is not None
                    else f"{node} is not one of nodes 1 to {own.nnodes - 1}",
                    hint="give every node a --node-rank of its own",
                )
            self._nodes[hello.node_rank] = node
            self._changed.notify_all()
        return None

    def _listen(self, node: Node) -> None:
        """Read what a node says until its end."""
        while (data := node.channel.receive()) is not None:
            try:
                message = self._decode(data)
            except msgspec.DecodeError:
                log.warning("%s sent what is no message", node)
                break
            if isinstance(message, RankEnded):
                node.ended(message.rank, Ending.of(message.code))
            elif isinstance(message, NodeLeaves):
                node.ended(None, Ending("was stopped with its node"))
            elif not self._same_model(node, message):
                return
        node.ended(None, Ending("is out of reach: its node is gone"))

    def _same_model(self, node: Node, ready: NodeReady) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._fingerprint is not None or self._closed)
            if ready.fingerprint == self._fingerprint:
                node.ready = ready
                log.info("%s has joined", node)
                self._changed.notify_all()
                return True
        self._refuse(
            node,
            Refused(
                message=f"{node} has another model than node 0: {ready.model_path}",
                hint="give every node the same files: their names, sizes and contents count",
            ),
        )
        return False

    def _refuse(self, node: Node, refused: Refused) -> None:
        log.warning("%s: it was refused", refused.message)
        with self._changed:
            self._refusal = refused.message
            self._changed.notify_all()
        with suppress(OSError):
            node.channel.send(refused)
        node.channel.hang_up()
