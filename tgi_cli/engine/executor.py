"""What carries out steps: for now one runner in this process.

`Executor` is the seam for several ranks: the same `Step` to each, one answer back. Knows no policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from tgi_cli import hub
from tgi_cli.config import EngineConfig
from tgi_cli.engine.kv_cache import KVCache
from tgi_cli.engine.machine import return_large_memory, usable_cores
from tgi_cli.engine.memory_plan import MemoryPlan, check_config, plan
from tgi_cli.engine.messages import ModelFacts
from tgi_cli.engine.precision import with_activations
from tgi_cli.engine.runner import ModelRunner
from tgi_cli.engine.step import Step, StepOutput
from tgi_cli.grammar_compiler import GrammarCompiler
from tgi_cli.kernels.backend import select
from tgi_cli.model.checkpoint import Checkpoint, open_checkpoint
from tgi_cli.model.decoder import Decoder
from tgi_cli.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

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

    def close(self) -> None:
        """Release the model and its memory."""
        ...


class LocalExecutor:
    """One rank, in this process. Made by `load`."""

    def __init__(
        self,
        runner: ModelRunner,
        memory_plan: MemoryPlan,
        facts: ModelFacts,
        grammars: GrammarCompiler,
    ) -> None:
        self._runner: ModelRunner | None = runner
        self.grammars = grammars
        self.memory_plan = memory_plan
        self.facts = facts

    @classmethod
    def load(cls, config: EngineConfig, report: Report) -> LocalExecutor:
        """Fetch the model, plan, read the weights, allocate the cache and warm up.

        Raises:
            HubError: the model cannot be found or fetched.
            EngineError: it is broken, of a kind we cannot run, or does not fit.
            UsageError: the configuration contradicts itself or the model.
        """
        check_config(config)
        return_large_memory()
        model = config.model
        path = hub.resolve(
            model.model_id,
            revision=model.revision,
            token=model.token,
            cache_dir=model.cache_dir,
            progress=lambda fraction: report("downloading", fraction),
        )
        report("loading", 0.0)
        checkpoint = open_checkpoint(str(path))
        threads = config.parallel.num_threads or min(usable_cores(), torch.get_num_threads())
        backend = select(model.device, num_threads=threads)
        checkpoint = with_activations(checkpoint, config, backend)
        planned = plan(checkpoint, config, backend)
        planned.check()
        if model.max_model_len is None and (
            planned.max_model_len < checkpoint.max_position_embeddings
        ):
            log.warning(
                "the context is cut from %d to %d tokens, which is what the KV cache holds",
                checkpoint.max_position_embeddings,
                planned.max_model_len,
            )
        checkpoint = checkpoint.for_length(planned.max_model_len)
        decoder = Decoder.build(
            checkpoint,
            backend,
            planned.dtype,
            progress=lambda fraction: report("loading", fraction),
        )
        grammars = GrammarCompiler(lambda: load_tokenizer(str(path)), checkpoint.vocab_size)
        runner = ModelRunner(
            decoder,
            backend,
            KVCache(backend, checkpoint.spec, planned),
            max_rows=config.scheduler.max_num_seqs,
            max_len=planned.max_model_len,
            block_size=planned.block_size,
            grammars=grammars,
        )
        report("warming up", None)
        runner.warm_up(config.scheduler.max_batch_tokens, config.scheduler.max_num_seqs)
        return cls(runner, planned, _facts(config, checkpoint, runner, planned, path), grammars)

    def submit(self, step: Step) -> None:
        """Run the model over the step."""
        assert self._runner is not None
        self._runner.submit(step)

    def collect(self) -> StepOutput:
        """Draw its tokens."""
        assert self._runner is not None
        return self._runner.collect()

    def close(self) -> None:
        """Drop the model."""
        self._runner = None


def _facts(
    config: EngineConfig,
    checkpoint: Checkpoint,
    runner: ModelRunner,
    planned: MemoryPlan,
    path: Path,
) -> ModelFacts:
    dtype = str(planned.dtype).removeprefix("torch.")
    return ModelFacts(
        model_id=config.model.model_id,
        model_path=str(path),
        model_sha=_commit(path),
        architecture=checkpoint.architecture,
        dtype=dtype,
        kv_cache_dtype=dtype,
        device=planned.device,
        backend=runner.kernels,
        quantization=None if checkpoint.format.name == "dense" else checkpoint.format.name,
        activation_dtype="int8" if checkpoint.keeps_blocks else dtype,
        deterministic=runner.deterministic,
        vocab_size=checkpoint.vocab_size,
        max_model_len=planned.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_batch_tokens=config.scheduler.max_batch_tokens,
        block_size=planned.block_size,
        kv_cache_tokens=planned.kv_cache_tokens,
        kv_blocks_total=planned.kv_blocks,
        num_parameters=checkpoint.num_parameters,
        weights_bytes=planned.weights_bytes,
    )


def _commit(path: Path) -> str | None:
    """The commit a model was fetched at, from its place in the hub's cache; None elsewhere."""
    for folder in (path, *path.parents):
        if folder.parent.name == "snapshots":
            return folder.name
    return None
