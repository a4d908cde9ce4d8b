"""SlotModel: a decoder without mathematics, to test scheduling without tensors.

Its "keys and values" are integers in slots, its "attention" is a hash of what it reads through the
block tables, its "logits" decide the next token. So a wrong slot, a stale block, a bad prefix hit
or a slip in preemption changes what it says next. `answer` says the same from plain lists.
Like a decoder it has layers: all rows store before any row reads, and what the second layer of a
group stores depends on all the tokens that the layers before have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from tgi_cli.engine.messages import Request, TokenLogprobs
from tgi_cli.engine.scheduler import KVGroupLayout
from tgi_cli.engine.step import NULL_BLOCK, NewRow, RowOutput, ScheduledRow, Step, StepOutput

VOCAB_SIZE = 6
LAYERS_PER_GROUP = 2


def embed(token_id: int, request: Request) -> int:
    """Salts change what a token means here, as an adapter or an image would."""
    salts = int.from_bytes(f"{request.tenant}/{request.cache_salt}".encode(), "little")
    return hash((token_id, salts))


def draw(hidden: int, request: Request, num_outputs: int) -> int:
    """The sampler: depends on the seed and the output position; masks until `min_tokens`."""
    sampling = request.sampling
    token_id = hash((hidden, sampling.seed, num_outputs)) % VOCAB_SIZE
    if num_outputs < sampling.min_tokens:
        masked = {*request.eos_token_ids, *sampling.stop_token_ids}
        while token_id in masked:
            token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def logprobs_of(hidden: int, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=-float(hidden & 0xFFFF), rank=1)


class PlainModel:
    """The same function of the tokens, from lists that only grow."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.windows = windows
        self.layers: list[list[int]] = [[] for _ in range(len(windows) * LAYERS_PER_GROUP)]

    def feed(self, state: int) -> int:
        hidden, position = state, len(self.layers[0])
        for index, layer in enumerate(self.layers):
            layer.append(hash((hidden, position)))
            window = self.windows[index % len(self.windows)]
            first = 0 if window is None else max(0, position - window + 1)
            hidden = hash((hidden, *layer[first:]))
        return hidden


def answer(
    request: Request, windows: Sequence[int | None], max_len: int
) -> tuple[list[int], list[TokenLogprobs], list[TokenLogprobs | None], str]:
    """Output ids, their logprobs, the prompt's logprobs and the finish of a request."""
    model = PlainModel(windows)
    prompt_logprobs: list[TokenLogprobs | None] = [None]
    for position, token_id in enumerate(request.prompt_ids):
        hidden = model.feed(embed(token_id, request))
        if position + 1 < len(request.prompt_ids):
            prompt_logprobs.append(logprobs_of(hidden, request.prompt_ids[position + 1]))
    sampling = request.sampling
    output_ids: list[int] = []
    logprobs = []
    while True:
        token_id = draw(hidden, request, len(output_ids))
        may_stop = len(output_ids) >= sampling.min_tokens
        output_ids.append(token_id)
        logprobs.append(logprobs_of(hidden, token_id))
        if may_stop and token_id in request.eos_token_ids and not sampling.ignore_eos:
            finish = "eos"
        elif may_stop and token_id in sampling.stop_token_ids:
            finish = "stop"
        elif (
            len(output_ids) == sampling.max_tokens
            or len(request.prompt_ids) + len(output_ids) == max_len
        ):
            finish = "length"
        else:
            hidden = model.feed(embed(token_id, request))
            continue
        return output_ids, logprobs, prompt_logprobs, finish


class _Row:
    def __init__(self, new: NewRow) -> None:
        self.request = new.request
        self.token_ids = new.request.prompt_ids + new.request.output_ids
        self.tables = [list(block_ids) for block_ids in new.block_ids]


class SlotModel:
    """Runs steps in the order of `submit`, each when it is collected.

    `propose(request, token_ids)` gives drafts; a request in `failing` gets a row error, with
    nothing stored.
    """

    def __init__(
        self,
        groups: Sequence[KVGroupLayout],
        block_size: int,
        propose: Callable[[Request, list[int]], list[int]] = lambda request, token_ids: [],
    ) -> None:
        self.groups = groups
        self.block_size = block_size
        self.propose = propose
        self.failing: set[str] = set()
        self.rows: dict[int, _Row] = {}
        num_layers = len(groups) * LAYERS_PER_GROUP
        self.slots: list[list[int | None]] = [
            [None] * (groups[layer % len(groups)].num_blocks * block_size)
            for layer in range(num_layers)
        ]
        self.submitted: deque[Step] = deque()

    def submit(self, step: Step) -> None:
        self.submitted.append(step)

    def collect(self) -> tuple[Step, StepOutput]:
        step = self.submitted.popleft()
        for row in step.removed_rows:
            del self.rows[row]
        for new in step.new_rows:
            assert new.row not in self.rows, "a new row is taken"
            self.rows[new.row] = _Row(new)
        for scheduled in step.rows:
            for table, block_ids in zip(
                self.rows[scheduled.row].tables, scheduled.appended_blocks, strict=False
            ):
                table += block_ids
        hidden = self._forward(step)
        return step, StepOutput(
            step_id=step.id,
            rows=[self._sample(row, states) for row, states in zip(step.rows, hidden, strict=True)],
        )

    def _forward(self, step: Step) -> list[list[int]]:
        """Hidden state of every position of every row, layer by layer: all store, then all read."""
        running = [row for row in step.rows if self.rows[row.row].request.id not in self.failing]
        states: dict[int, list[int]] = {}
        for row in running:
            known = self.rows[row.row].token_ids + row.draft_ids
            states[row.row] = [
                embed(token_id, self.rows[row.row].request)
                for token_id in known[row.start : row.start + row.num_tokens]
            ]
            assert len(states[row.row]) == row.num_tokens, "a token is run that is not known"
        for index, slots in enumerate(self.slots):
            group = index % len(self.groups)
            for row in running:
                for offset, state in enumerate(states[row.row]):
                    position = row.start + offset
                    slots[self._slot(row, group, position)] = hash((state, position))
            for row in running:
                states[row.row] = [
                    hash((state, *self._read(row, group, row.start + offset, slots)))
                    for offset, state in enumerate(states[row.row])
                ]
        return [states.get(row.row, []) for row in step.rows]

    def _slot(self, row: ScheduledRow, group: int, position: int) -> int:
        block_id = self.rows[row.row].tables[group][position // self.block_size]
        assert block_id != NULL_BLOCK, "the null block is used"
        return block_id * self.block_size + position % self.block_size

    def _read(
        self, row: ScheduledRow, group: int, position: int, slots: list[int | None]
    ) -> list[int | None]:
        window = self.groups[group].window
        first = 0 if window is None else max(0, position - window + 1)
        return [slots[self._slot(row, group, key)] for key in range(first, position + 1)]

    def _sample(self, scheduled: ScheduledRow, hidden: list[int]) -> RowOutput:
        row = self.rows[scheduled.row]
        request = row.request
        if request.id in self.failing:
            return RowOutput(row=scheduled.row, error="it broke")
        end = scheduled.start + scheduled.num_tokens - len(scheduled.draft_ids)
        assert scheduled.sample == (end == len(row.token_ids)), "sampled when not caught up"
        assert scheduled.sample or not scheduled.draft_ids
        prompt_logprobs = None
        num_prompt = len(request.prompt_ids)
        if request.sampling.prompt_logprobs is not None and not request.output_ids:
            positions = range(scheduled.start, min(end, num_prompt - 1))
            prompt_logprobs = [
                logprobs_of(hidden[position - scheduled.start], row.token_ids[position + 1])
                for position in positions
            ]
        if not scheduled.sample:
            return RowOutput(row=scheduled.row, prompt_logprobs=prompt_logprobs)
        token_ids: list[int] = []
        logprobs = []
        for state in hidden[end - 1 - scheduled.start :]:
            drafts = scheduled.draft_ids
            if token_ids and token_ids[-1] != drafts[len(token_ids) - 1]:
                break
            token_ids.append(draw(state, request, len(row.token_ids) - num_prompt))
            logprobs.append(logprobs_of(state, token_ids[-1]))
            row.token_ids.append(token_ids[-1])
        return RowOutput(
            row=scheduled.row,
            token_ids=token_ids,
            logprobs=logprobs if request.sampling.logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            draft_ids=self.propose(request, row.token_ids),
        )
