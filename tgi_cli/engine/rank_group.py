"""The ranks of one model put together: cores shared out, processes started, sizes agreed on.

Everything that only exists when a model is divided, so that the executor has one thing or nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile

from tgi_cli.config import EngineConfig
from tgi_cli.engine.cores import bind, cores_by_node, share_out
from tgi_cli.engine.loading import OpenedModel
from tgi_cli.engine.meeting import join, shares_memory
from tgi_cli.engine.messages import RankFacts
from tgi_cli.engine.rank_messages import Agreed, RankStart
from tgi_cli.engine.ranks import Peer, Ranks
from tgi_cli.kernels.backend import Backend
from tgi_cli.kernels.collective import ALONE, Collective
from tgi_cli.kernels.cpu.collective import SharedMemory


class RankGroup:
    """Rank 0's end of everything; made by `start`, ended by `close`."""

    def __init__(
        self, ranks: Ranks, config: EngineConfig, memory_fd: int | None, folder: str | None
    ) -> None:
        self.ranks = ranks
        self.collective: Collective = ALONE
        self._config = config
        self._memory_fd = memory_fd
        self._folder = folder  # private, where ranks meet that share no memory
        self._cores_before = os.sched_getaffinity(0)

    @classmethod
    def start(cls, config: EngineConfig, backend: Backend, num_threads: int) -> RankGroup:
        """Start the other ranks, all at once, and bind this one to its cores.

        Args:
            config: with `model_id` a local path.
            backend: rank 0's.
            num_threads: of all ranks of this machine together.
        """
        world_size = config.parallel.num_shard
        memory_fd = folder = None
        if shares_memory(backend, config.parallel.nnodes) and backend.native is not None:
            memory_fd = SharedMemory.create(backend.native, world_size)
        else:
            folder = tempfile.mkdtemp(prefix="tgi-ranks-")
        cores = share_out(cores_by_node(), world_size)
        peers: list[Peer] = []
        try:
            for rank in range(1, world_size):
                start = RankStart(
                    config=config,
                    rank=rank,
                    cores=cores[rank],
                    num_threads=max(1, num_threads // world_size),
                    store=_store(folder),
                )
                peers.append(Peer.spawn(start, memory_fd))
        except BaseException:
            Ranks(peers, step_timeout=config.parallel.step_timeout).close()
            raise
        ranks = Ranks(peers, step_timeout=config.parallel.step_timeout)
        group = cls(ranks, config, memory_fd, folder)
        bind(cores[0])
        return group

    def agree(self, opened: OpenedModel) -> None:
        """Settle on the least of what fits anywhere, then meet the others.

        Raises:
            EngineError: a rank failed; names it.
        """
        own, others = opened.plan, self.ranks.planned()
        agreed = Agreed(
            kv_cache_tokens=min(own.kv_cache_tokens, *(each.kv_cache_tokens for each in others)),
            max_model_len=min(own.max_model_len, *(each.max_model_len for each in others)),
        )
        opened.agree(agreed.kv_cache_tokens, agreed.max_model_len)
        self.ranks.send(agreed)
        self.collective = join(
            opened.backend,
            rank=0,
            world_size=self._config.parallel.num_shard,
            memory_fd=self._memory_fd,
            store=_store(self._folder),
        )
        self._memory_fd = None
        self.ranks.abort, self.ranks.progress = self.collective.abort, self.collective.progress

    def ready(self) -> list[RankFacts]:
        """Facts of the other ranks, when all are loaded. Raises what a rank failed of."""
        return self.ranks.ready()

    def close(self) -> None:
        """End the other ranks and give this one its cores back."""
        self.ranks.close()
        bind(sorted(self._cores_before))
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._memory_fd is not None:
            os.close(self._memory_fd)
            self._memory_fd = None


def _store(folder: str | None) -> str:
    return "" if folder is None else f"file://{folder}/store"
