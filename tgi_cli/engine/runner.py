"""Runs steps: rows and their state, the decoder, the sampler. Two calls, `submit` and `collect`.

It follows decisions and makes none: which rows run, with which blocks, is in the `Step`. A row
that cannot be prepared or whose logits are not finite fails alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from tgi_cli.engine.batch_builder import BatchBuilder, BuiltStep
from tgi_cli.engine.decode_run import DecodeRun
from tgi_cli.engine.kv_cache import KVCache
from tgi_cli.engine.logprobs import PromptLogprobs
from tgi_cli.engine.lora import AdapterRows
from tgi_cli.engine.messages import Request, TokenLogprobs
from tgi_cli.engine.rows import RowState, TokenHistory
from tgi_cli.engine.sampler import Sampled, Sampler, num_accepted
from tgi_cli.engine.step import NewRow, RowOutput, ScheduledRow, Step, StepOutput
from tgi_cli.errors import EngineError, TgiError
from tgi_cli.grammar_compiler import GrammarCompiler
from tgi_cli.kernels.backend import Backend
from tgi_cli.model.decoder import Decoder
from tgi_cli.sampling import SamplingParams

log = logging.getLogger(__name__)

_NOT_FINITE = "the model gave no finite logits for this sequence"


class _LogitBuffer:
    """Memory for the logits of a step, used again: fresh pages would cost one more pass."""

    def __init__(self) -> None:
        self._whole = torch.empty(0, 0)
        self._parts: dict[int, Tensor] = {}  # its first rows, by their number

    def rows(self, count: int, vocab_size: int) -> Tensor:
        """[count, vocab_size] float32; what was given before is overwritten."""
        if count > len(self._whole):
            self._whole = torch.empty(count, vocab_size)
            self._parts = {}
        part = self._parts.get(count)
        if part is None:
            part = self._parts[count] = self._whole[:count]
        return part


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A submitted step: what is left to do is to draw tokens from its logits."""

    step: Step
    errors: dict[int, str]  # by row
    scheduled: list[ScheduledRow]  # those without an error, in order
    built: BuiltStep | None
    run: DecodeRun | None  # what draws the tokens, if not the sampler from the logits
    logits: Tensor | None = None  # [n, vocab_size] of the logit rows
    buffer: _LogitBuffer | None = None  # what they lie in, if it is to be used again
    #: By index in `scheduled`.
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class ModelRunner:
    """One decoder with its KV cache and the state of up to `max_rows` live sequences.

    Args:
        decoder: the built model.
        backend: where it runs.
        kv_cache: the tensors its blocks lie in.
        max_rows: sequences at once.
        max_len: most tokens of one sequence.
        block_size: tokens per block.
        grammars: what compiles grammars; without it requests that have one are refused.
        adapters: names of those attached to the decoder, by slot.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        kv_cache: KVCache,
        *,
        max_rows: int,
        max_len: int,
        block_size: int,
        grammars: GrammarCompiler | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        self._decoder = decoder
        self._native = native = backend.plan(decoder, block_size)
        self._forward = native or decoder.forward
        # Native steps make no tensors; for torch, a tensor without a version is a cheaper one.
        self._mode = nullcontext if native else torch.inference_mode
        self._logit_buffers: list[_LogitBuffer] = []  # of no step in flight
        #: Name of the kernels that run the decoder, and whether they keep promise one.
        self.kernels = native.name if native else f"torch-{backend.device.type}"
        self.deterministic = native is not None
        self._kv_cache = kv_cache
        self._history = TokenHistory(max_rows, max_len, decoder.spec.vocab_size)
        self._sampler = Sampler(
            backend.ops, max_rows, grammars, None if native is None else native.sampling
        )
        self._prompt_logprobs = PromptLogprobs(self._history, max_rows)
        adapter_rows = AdapterRows(adapters, max_rows)
        self._states: tuple[RowState, ...] = (
            self._history,
            self._sampler,
            self._prompt_logprobs,
            adapter_rows,
        )
        self._builder = BatchBuilder(
            self._history,
            len(decoder.spec.kv_groups),
            block_size,
            backend.device,
            adapter_rows.slots if adapters else None,
        )
        self._decode_run: DecodeRun | None = None
        if native is not None and native.ahead is not None:
            self._decode_run = DecodeRun(
                native, self._sampler, self._history, self._builder, kv_cache, block_size
            )
        self._block_size = block_size
        self._failed: dict[int, str] = {}  # rows that could not be prepared, by row
        self._in_flight: deque[_InFlight] = deque()

    def submit(self, step: Step) -> None:
        """Run the step's positions; its tokens are drawn by `collect`."""
        self.admit(step)
        self.run(step)

    def admit(self, step: Step) -> None:
        """Let rows leave and enter, before `run`."""
        if not (step.removed_rows or step.new_rows):
            return
        if self._decode_run is not None:
            self._decode_run.end()
        with self._mode():
            for freed in step.removed_rows:
                self._remove(freed)
            for new in step.new_rows:
                self._add(new)

    def runnable(self, step: Step) -> Step:
        """The step without the rows that could not be prepared."""
        if not self._failed:
            return step
        return msgspec.structs.replace(
            step,
            rows=[row for row in step.rows if row.row not in self._failed],
            new_rows=[new for new in step.new_rows if new.row not in self._failed],
        )

    def run(self, step: Step) -> None:
        """Compute an admitted step, up to its logits; what a `DecodeRun` takes is begun."""
        self._kv_cache.begin()
        with self._mode():
            self._run(step)
        if self._in_flight[-1].run is None:  # otherwise it runs until it is collected
            self._kv_cache.rest()

    def collect(self) -> StepOutput:
        """Draw the tokens of the oldest submitted step and add them to the rows."""
        with self._mode():
            return self._collect()

    def _run(self, step: Step) -> None:
        scheduled, errors = step.rows, {}
        if self._failed:
            errors = {
                row.row: self._failed[row.row] for row in step.rows if row.row in self._failed
            }
            scheduled = [row for row in step.rows if row.row not in self._failed]
        run = self._decode_run
        if run is not None and run.goes_on_with(scheduled):
            self._in_flight.append(_InFlight(step, errors, scheduled, run.go_on(), run))
            return
        for row in scheduled:
            if row.appended_blocks:
                self._builder.append_blocks(row.row, row.appended_blocks)
                self._kv_cache.use(row.appended_blocks)
            if row.draft_ids:
                self._history.propose(row.row, row.draft_ids)
        built = logits = buffer = None
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        if run is not None and scheduled and not self._prompt_logprobs.wanted:
            built = run.begin(scheduled)
        if built is not None:
            self._in_flight.append(_InFlight(step, errors, scheduled, built, run))
            return
        if scheduled:
            built = self._builder.build(scheduled)
            count = len(built.logit_rows)
            if count:
                self._sampler.prepare(built.logit_rows)
            if self._native is not None and not self._prompt_logprobs.wanted:
                buffer = self._logit_buffers.pop() if self._logit_buffers else _LogitBuffer()
                out = buffer.rows(count, self._decoder.spec.vocab_size)
                logits = self._native.logits(built.batch, self._kv_cache.layers, out)
            else:
                hidden = self._forward(built.batch, self._kv_cache.layers)
                logits = self._decoder.logits(hidden[built.batch.logit_rows]) if count else None
                prompt_logprobs = self._prompt_logprobs.of_step(
                    scheduled, hidden, self._decoder.logits
                )
        self._in_flight.append(
            _InFlight(step, errors, scheduled, built, None, logits, buffer, prompt_logprobs)
        )

    def _collect(self) -> StepOutput:
        flight = self._in_flight.popleft()
        step, built = flight.step, flight.built
        drawn: list[RowOutput] = []
        if built is not None and flight.run is not None:
            sampled = flight.run.finish()
            self._kv_cache.rest()
            drawn = self._drawn(flight, built, sampled)
        elif flight.logits is not None and built is not None and len(built.logit_rows):
            sampled = self._sampler.sample(flight.logits, built.logit_rows)
            drawn = self._drawn(flight, built, sampled)
        if flight.buffer is not None:
            self._logit_buffers.append(flight.buffer)
        if len(drawn) == len(step.rows):  # every row was sampled, in the step's order
            return StepOutput(step_id=step.id, rows=drawn)
        outputs = {
            row.row: RowOutput(row=row.row, prompt_logprobs=flight.prompt_logprobs.get(i))
            for i, row in enumerate(flight.scheduled)
        }
        outputs.update((output.row, output) for output in drawn)
        for failed, error in flight.errors.items():
            outputs[failed] = RowOutput(row=failed, error=error)
        return StepOutput(step_id=step.id, rows=[outputs[row.row] for row in step.rows])

    def follow(self, token_ids: Mapping[int, Sequence[int]]) -> None:
        """Instead of `collect`: take the tokens, by row, that another rank drew for the step."""
        flight = self._in_flight.popleft()
        if flight.errors:
            raise EngineError(f"a row that rank 0 prepared failed: {min(flight.errors.values())}")
        if flight.buffer is not None:
            self._logit_buffers.append(flight.buffer)
        for row, ids in token_ids.items():
            self._history.append(row, ids)

    def warm_up_steps(self, num_tokens: int, num_rows: int) -> Sequence[Step]:
        """A prompt, then a draw by several rows; to be submitted and collected one by one.

        Leaves no row behind. What it writes into blocks, nobody reads: a sequence reads only what
        it wrote or what was published.
        """
        num_tokens = max(1, min(num_tokens, self._history.max_len - 2))
        num_rows = max(1, min(num_rows, num_tokens))
        lens = [num_tokens - num_rows + 1] + [1] * (num_rows - 1)
        sampling = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, max_tokens=2)
        new_rows, first, second = [], [], []
        for row, length in enumerate(lens):
            request = Request(id=f"warm-up-{row}", prompt_ids=[0] * length, sampling=sampling)
            blocks = -(-(length + 1) // self._block_size)
            # Sharing block 1 is harmless here and fits any pool.
            table = tuple([1] * blocks for _ in self._decoder.spec.kv_groups)
            new_rows.append(NewRow(row=row, request=request, block_ids=table))
            first.append(ScheduledRow(row=row, start=0, num_tokens=length, sample=True))
            second.append(ScheduledRow(row=row, start=length, num_tokens=1, sample=True))
        return (
            Step(id=-3, rows=first, new_rows=new_rows),
            Step(id=-2, rows=second),
            Step(id=-1, rows=[], removed_rows=list(range(num_rows))),
        )

    def _add(self, new: NewRow) -> None:
        request = new.request
        try:
            for state in self._states:
                state.add(new.row, request, request.output_ids)
            self._builder.set_blocks(new.row, new.block_ids)
            self._kv_cache.use(new.block_ids)
        except TgiError as error:
            self._reject(new.row, error.message)
        except Exception:
            log.exception("request %s could not be prepared", request.id)
            self._reject(new.row, "an internal error: the request could not be prepared")

    def _reject(self, row: int, message: str) -> None:
        self._remove(row)
        self._failed[row] = message

    def _remove(self, row: int) -> None:
        self._failed.pop(row, None)
        for state in self._states:
            state.remove(row)

    def _drawn(self, flight: _InFlight, built: BuiltStep, sampled: Sampled) -> list[RowOutput]:
        """Verify drafts, extend the histories and describe each sampled row."""
        token_ids, valid = sampled.token_ids.tolist(), sampled.valid.tolist()
        appended = len(token_ids) == len(built.sampled) and all(valid)
        if appended:  # no drafts, nothing failed
            rows = built.logit_rows.rows.tolist()
            self._history.append_one(rows, token_ids)
            if not (sampled.logprobs or flight.prompt_logprobs or self._sampler.has_grammars):
                return [
                    RowOutput(row=row, token_ids=[token_id])
                    for row, token_id in zip(rows, token_ids, strict=True)
                ]
        outputs = []
        first = 0  # logit row
        for index, num_drafts in zip(
            built.sampled.tolist(), built.num_drafts.tolist(), strict=True
        ):
            row = flight.scheduled[index]
            end = first + num_drafts + 1
            drawn = token_ids[first:end]
            kept = num_accepted(row.draft_ids, drawn) + 1 if num_drafts else 1
            if not all(valid[first : first + kept]):
                error = self._sampler.failure(row.row) or _NOT_FINITE
                outputs.append(RowOutput(row=row.row, error=error))
            else:
                tokens = drawn[:kept]
                complete = self._sampler.accept(row.row, tokens)
                if complete is not None:
                    tokens = tokens[:complete]
                if not appended:
                    self._history.append(row.row, tokens)
                logprobs = None
                if first in sampled.logprobs:
                    logprobs = [sampled.logprobs[i] for i in range(first, first + len(tokens))]
                outputs.append(
                    RowOutput(
                        row=row.row,
                        token_ids=tokens,
                        logprobs=logprobs,
                        complete=complete is not None,
                        prompt_logprobs=flight.prompt_logprobs.get(index),
                    )
                )
            first = end
        return outputs
