"""What carries out steps: rank 0 in this process, and the other ranks if the model is divided.

One class for one rank and for many. Every rank gets the same `Step`; rank 0 alone draws, and tells
the others what with the next one. Knows no policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from tgi_cli import model_path
from tgi_cli.config import EngineConfig
from tgi_cli.engine.loading import OpenedModel
from tgi_cli.engine.lora import fetched
from tgi_cli.engine.machine import usable_cores
from tgi_cli.engine.memory_plan import MemoryPlan, check_config
from tgi_cli.engine.messages import ModelFacts, RankFacts, Request
from tgi_cli.engine.nodes import Nodes
from tgi_cli.engine.rank_group import RankGroup
from tgi_cli.engine.rank_messages import Work
from tgi_cli.engine.runner import ModelRunner
from tgi_cli.engine.step import Step, StepOutput
from tgi_cli.errors import UsageError
from tgi_cli.grammar_compiler import GrammarCompiler
from tgi_cli.heap import return_large_memory, trim_heap
from tgi_cli.kernels.collective import ALONE
from tgi_cli.kernels.kv_rows import kv_dtype_name
from tgi_cli.sampling import SamplingParams
from tgi_cli.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

#: Enough to start every thread and import, compile and touch what the first request would wait for.
_WARM_UP_TOKENS, _WARM_UP_ROWS = 64, 4

#: Called with a phase (`downloading`, `loading`, `warming up`) and a fraction or None.
Report = Callable[[str, float | None], None]


class Executor(Protocol):
    """Runs steps in the order in which they are submitted."""

    def submit(self, step: Step) -> None:
        """Start a step."""
        ...

    def collect(self) -> StepOutput:
        """Wait for the oldest submitted step."""
        ...

    def check(self) -> None:
        """Raise what has ended the executor, if anything has."""
        ...

    def on_failure(self, call: Callable[[], None]) -> None:
        """Have `call` made, from another thread, when `check` begins to raise."""
        ...

    def close(self) -> None:
        """Release the model and its memory."""
        ...


class ModelExecutor:
    """Rank 0 and, behind `group`, the others. Made by `load`."""

    def __init__(
        self,
        runner: ModelRunner,
        memory_plan: MemoryPlan,
        facts: ModelFacts,
        grammars: GrammarCompiler,
        group: RankGroup | None,
    ) -> None:
        self._runner: ModelRunner | None = runner
        self._group = group
        self._drawn: list[dict[int, list[int]]] = []  # what the other ranks do not know yet
        self.grammars = grammars
        self.memory_plan = memory_plan
        self.facts = facts

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        report: Report,
        weights_fd: int | None = None,
        nodes: Nodes | None = None,
    ) -> ModelExecutor:
        """Fetch the model, plan, read the weights, allocate the cache and warm up.

        Args:
            config: of the engine.
            report: told what is being done.
            weights_fd: shared memory; rank 0's packed weights are put there, or found there.
            nodes: where the other machines come to, if there are any; its owner closes it.

        Raises:
            HubError: the model cannot be found or fetched.
            EngineError: it is broken, of a kind we cannot run, or does not fit; or a rank failed.
            UsageError: the configuration contradicts itself or the model.
        """
        check_config(config)
        if config.parallel.nnodes > 1 and nodes is None:
            raise UsageError(
                f"a model over {config.parallel.nnodes} nodes is served by `tgi launch` alone"
            )
        return_large_memory()
        model = config.model
        path = model_path.resolve(model, lambda fraction: report("downloading", fraction))
        adapters = fetched(config)
        report("loading", 0.0)
        local = msgspec.structs.replace(
            config,
            model=msgspec.structs.replace(model, model_id=str(path)),
            lora=adapters,
        )
        threads = config.parallel.num_threads or min(usable_cores(), torch.get_num_threads())
        ranks_here = len(config.parallel.ranks(0))
        # Opened before any other rank is started: what cannot work is refused at once.
        opened = OpenedModel(
            local, rank=0, num_threads=max(1, threads // ranks_here), weights_fd=weights_fd
        )
        if model.max_model_len is None and (
            opened.plan.max_model_len < opened.checkpoint.max_position_embeddings
        ):
            log.warning(
                "the context is cut from %d to %d tokens, which is what the KV cache holds",
                opened.checkpoint.max_position_embeddings,
                opened.plan.max_model_len,
            )
        opened.adapters.warn_of_other_bases(model.model_id)
        group = None
        if config.parallel.num_shard > 1:
            if nodes is not None:
                report("waiting for the other nodes", None)
            group = RankGroup.start(local, opened.backend, threads, nodes)
        try:
            return cls._loaded(config, path, opened, group, report)
        except BaseException:
            if group is not None:
                group.close()
            raise

    @classmethod
    def _loaded(
        cls,
        config: EngineConfig,
        path: Path,
        opened: OpenedModel,
        group: RankGroup | None,
        report: Report,
    ) -> ModelExecutor:
        if group is not None:
            group.agree(opened)
        grammars = GrammarCompiler(lambda: load_tokenizer(str(path)), opened.checkpoint.vocab_size)
        runner = opened.build(
            ALONE if group is None else group.collective,
            lambda fraction: report("loading", fraction),
            grammars,
        )
        ranks = [] if group is None else [group.own(opened), *group.ready()]
        facts = _facts(config, opened, runner, path, ranks)
        executor = cls(runner, opened.plan, facts, grammars, group)
        report("warming up", None)
        limits = config.scheduler
        tokens = min(limits.max_batch_tokens, _WARM_UP_TOKENS)
        for step in runner.warm_up_steps(tokens, min(limits.max_num_seqs, _WARM_UP_ROWS)):
            executor.submit(step)
            executor.collect()
        trim_heap()
        return executor

    @property
    def group(self) -> RankGroup | None:
        """The other ranks, None if there are none."""
        return self._group

    def submit(self, step: Step) -> None:
        """Run the model over the step.

        Raises:
            EngineError: a rank is gone; names it.
        """
        assert self._runner is not None
        runner, group = self._runner, self._group
        runner.admit(step)
        if group is None:
            runner.run(step)
            return
        drawn, self._drawn = self._drawn, []
        group.ranks.send(Work(step=_to_follow(runner.runnable(step)), drawn=drawn))
        with group.ranks.step():
            runner.run(step)

    def collect(self) -> StepOutput:
        """Draw its tokens."""
        assert self._runner is not None
        output = self._runner.collect()
        if self._group is not None:
            self._drawn.append({row.row: row.token_ids for row in output.rows if row.token_ids})
        return output

    def check(self) -> None:
        """Raise what a rank has failed of."""
        if self._group is not None:
            self._group.ranks.check()

    def on_failure(self, call: Callable[[], None]) -> None:
        """Have `call` made when a rank fails."""
        if self._group is not None:
            self._group.ranks.on_failure(call)

    def close(self) -> None:
        """Drop the model and end the other ranks."""
        self._runner = None
        if self._group is not None:
            self._group.close()


def _to_follow(step: Step) -> Step:
    """The step without what only drawing needs, such as a grammar."""
    if not step.new_rows:
        return step
    return msgspec.structs.replace(
        step,
        new_rows=[
            msgspec.structs.replace(new, request=_undrawn(new.request)) for new in step.new_rows
        ],
    )


def _undrawn(request: Request) -> Request:
    wanted = SamplingParams(prompt_logprobs=request.sampling.prompt_logprobs)
    return msgspec.structs.replace(request, sampling=wanted, grammar=None)


def _facts(
    config: EngineConfig,
    opened: OpenedModel,
    runner: ModelRunner,
    path: Path,
    ranks: list[RankFacts],
) -> ModelFacts:
    planned, checkpoint = opened.plan, opened.checkpoint
    dtype = str(planned.dtype).removeprefix("torch.")
    return ModelFacts(
        model_id=config.model.model_id,
        model_path=str(path),
        model_sha=_commit(path),
        architecture=checkpoint.architecture,
        dtype=dtype,
        kv_cache_dtype=kv_dtype_name(planned.kv_dtype),
        device=planned.device,
        backend=runner.kernels,
        quantization=None if checkpoint.format.name == "dense" else checkpoint.format.name,
        activation_dtype="int8" if checkpoint.rounds_activations else dtype,
        deterministic=runner.deterministic,
        vocab_size=checkpoint.vocab_size,
        max_model_len=planned.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_batch_tokens=config.scheduler.max_batch_tokens,
        block_size=planned.block_size,
        kv_cache_tokens=planned.kv_cache_tokens,
        kv_blocks_total=planned.kv_blocks,
        num_parameters=checkpoint.num_parameters,
        weights_bytes=sum(rank.weights_bytes for rank in ranks) or planned.weights_bytes,
        ranks=ranks,
        adapters=opened.adapters.facts(
            config.lora,
            planned.dtype,
            [
                checkpoint.partition(rank, config.parallel.num_shard)
                for rank in range(config.parallel.num_shard)
            ],
        ),
    )


def _commit(path: Path) -> str | None:
    """The commit a model was fetched at, from its place in the hub's cache; None elsewhere."""
    for folder in (path, *path.parents):
        if folder.parent.name == "snapshots":
            return folder.name
    return None
