"""The ranks of one model put together: cores shared out, processes started, sizes agreed on.

Everything that only exists when a model is divided, so that the executor has one thing or nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import msgspec

from tgi_cli.config import EngineConfig
from tgi_cli.engine.cores import bind, cores_by_node, share_out
from tgi_cli.engine.fingerprint import fingerprint
from tgi_cli.engine.loading import OpenedModel
from tgi_cli.engine.meeting import MeetingPlace, join, shares_memory
from tgi_cli.engine.messages import RankFacts
from tgi_cli.engine.network import listen, show
from tgi_cli.engine.nodes import Nodes
from tgi_cli.engine.rank_messages import Agreed, Planned, RankStart
from tgi_cli.engine.ranks import Peer, Ranks
from tgi_cli.errors import EngineError
from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.collective import ALONE, Collective
from tgi_cli.kernels.cpu.collective import SharedMemory


class RankGroup:
    """Rank 0's end of everything; made by `start`, ended by `close`."""

    def __init__(
        self,
        ranks: Ranks,
        config: EngineConfig,
        memory_fd: int | None,
        place: MeetingPlace,
        nodes: Nodes | None,
    ) -> None:
        self.ranks = ranks
        self.collective: Collective = ALONE
        self._config = config
        self._memory_fd = memory_fd
        self._place = place
        self._nodes = nodes
        self._cores_before = os.sched_getaffinity(0)

    @classmethod
    def start(
        cls, config: EngineConfig, backend: Backend, num_threads: int, nodes: Nodes | None
    ) -> RankGroup:
        """Start the other ranks, all at once, and bind this one to its cores.

        Args:
            config: with `model_id` a local path.
            backend: rank 0's.
            num_threads: of all ranks of this machine together.
            nodes: the other machines, None if there are none.

        Raises:
            EngineError: a node did not come.
        """
        parallel = config.parallel
        memory_fd, place = None, MeetingPlace()
        if nodes is not None:
            nodes.gather(fingerprint(Path(config.model.model_id)))
            listener = listen(nodes.address, 0)
            url = f"tcp://{show(*listener.getsockname()[:2])}"
            place = MeetingPlace(url, nodes.address, listener.detach())
        elif shares_memory(backend, parallel.nnodes) and backend.native is not None:
            memory_fd = SharedMemory.create(backend.native, parallel.num_shard)
        else:
            place = MeetingPlace(f"file://{tempfile.mkdtemp(prefix='tgi-ranks-')}/store")
        here = parallel.ranks(0)
        cores = share_out(cores_by_node(), len(here))
        peers: list[Peer] = []
        try:
            for rank in here[1:]:
                start = RankStart(
                    config=config,
                    rank=rank,
                    cores=cores[rank],
                    num_threads=max(1, num_threads // len(here)),
                    store=place.store,
                    address=place.address,
                )
                peers.append(Peer.spawn(start, memory_fd))
            if nodes is not None:
                peers += _elsewhere(nodes, config, place)
        except BaseException:
            ranks = Ranks(peers, step_timeout=parallel.step_timeout)
            cls(ranks, config, memory_fd, place, nodes).close()
            raise
        ranks = Ranks(peers, step_timeout=parallel.step_timeout)
        group = cls(ranks, config, memory_fd, place, nodes)
        bind(cores[0])
        return group

    def agree(self, opened: OpenedModel) -> None:
        """Settle on the least of what fits anywhere, then meet the others.

        Raises:
            EngineError: a rank failed, or cannot work with the others; names it.
        """
        own, others = opened.plan, self.ranks.planned()
        _check_backends(opened.backend, others)
        agreed = Agreed(
            kv_cache_tokens=min(own.kv_cache_tokens, *(each.kv_cache_tokens for each in others)),
            max_model_len=min(own.max_model_len, *(each.max_model_len for each in others)),
        )
        opened.agree(agreed.kv_cache_tokens, agreed.max_model_len)
        self.ranks.send(agreed)
        self.collective = self.ranks.unless_one_fails(
            partial(
                join,
                opened.backend,
                rank=0,
                world_size=self._config.parallel.num_shard,
                memory_fd=self._memory_fd,
                place=self._place,
            )
        )
        self._memory_fd = None
        self.ranks.abort, self.ranks.progress = self.collective.abort, self.collective.progress

    def own(self, opened: OpenedModel) -> RankFacts:
        """Facts of rank 0."""
        return RankFacts(
            rank=0,
            pid=os.getpid(),
            host=self._place.address or os.uname().nodename,
            cores=sorted(os.sched_getaffinity(0)),
            num_threads=opened.backend.num_threads,
            weights_bytes=opened.plan.weights_bytes,
        )

    def ready(self) -> list[RankFacts]:
        """Facts of the other ranks, when all are loaded. Raises what a rank failed of."""
        facts = self.ranks.ready()
        if self._nodes is not None:
            self._nodes.serving()
        return facts

    def close(self) -> None:
        """End the other ranks of this machine and give this one its cores back.

        Other nodes end theirs when `Nodes` is closed, by whoever made it.
        """
        self.ranks.close()
        bind(sorted(self._cores_before))
        if self._place.store.startswith("file://"):
            folder = Path(self._place.store.removeprefix("file://")).parent
            shutil.rmtree(folder, ignore_errors=True)
        if self._memory_fd is not None:
            os.close(self._memory_fd)
            self._memory_fd = None


def _elsewhere(nodes: Nodes, config: EngineConfig, place: MeetingPlace) -> list[Peer]:
    """The ranks of all other nodes, started."""
    peers = []
    for rank, (node, (control, steps)) in sorted(nodes.connect().items()):
        ready = node.ready
        assert ready is not None
        # The token opened node 0's hub; each node fetched the model with its own.
        model = msgspec.structs.replace(config.model, model_id=ready.model_path, token=None)
        parallel = msgspec.structs.replace(config.parallel, node_rank=node.node_rank)
        peers.append(Peer(rank, control, steps, node=node))
        control.send(
            RankStart(
                config=msgspec.structs.replace(config, model=model, parallel=parallel),
                rank=rank,
                cores=ready.cores[rank - config.parallel.ranks(node.node_rank)[0]],
                num_threads=ready.num_threads,
                store=place.store,
                address=ready.address,
            )
        )
    return peers


def _check_backends(own: Backend, others: list[Planned]) -> None:
    """Native ranks and others make different calls, so they would wait for each other for ever."""
    names = [own.name, *(each.backend for each in others)]
    if len({name.partition("-")[0] for name in names}) > 1:
        raise EngineError(
            f"the ranks do not compute alike: their kernels are {', '.join(names)}",
            hint="install tgi with its native kernels on every node, or on none",
        )
