"""What crosses the process boundary: msgspec structs, never pickle.

One tagged union for each direction. No tensors and no torch here, and no text: prompts arrive as
token ids and answers leave as token ids. `Inbound` goes from an HTTP worker to the engine,
`Outbound` back, `Status` from the engine to the supervisor and on to the HTTP workers.
"""

from __future__ import annotations

import msgspec

from tgi_cli.config import EngineConfig, ServerConfig
from tgi_cli.grammar import Grammar
from tgi_cli.sampling import SamplingParams


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """One sequence to generate.

    `output_ids` are tokens already generated for it (empty for a new request): a resumed or moved
    request is admitted with them as outputs, never pasted into the prompt. `tenant` is the API
    key's name, `user` only divides a tenant's own share; `weight` scales the tenant's share,
    lower `priority` runs first (0 is normal). `arrival` is wall-clock seconds. `cache_salt`
    keeps prefix-cache entries apart. `adapter` is the name of a LoRA adapter, empty for none.
    `eos_token_ids` end generation unless `ignore_eos`. The output is a text of `grammar` if there
    is one, and ends with it.
    """

    id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    output_ids: list[int] = []
    eos_token_ids: tuple[int, ...] = ()
    tenant: str = ""
    user: str = ""
    weight: float = 1.0
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    adapter: str = ""
    grammar: Grammar | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop these requests; unknown ids are ignored (they may just have finished)."""

    ids: list[str]


Inbound = Request | Abort


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Raw-distribution log probabilities at one position.

    `top_ids`/`top_logprobs` are the most likely alternatives, best first; `rank` is the chosen
    token's rank, from 1.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step produced for one request.

    `finish` is None while it runs, else `length`, `eos`, `stop` (a stop token id, or the grammar is
    complete), `abort` or `error` (then `error` holds the sentence). `num_cached_tokens` (prompt
    tokens found in the prefix cache) and `prompt_logprobs` (one entry a prompt token, the first
    None) come with the first token. `queue_time` in seconds, with the first delta.
    """

    id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish: str | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    queue_time: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counters and gauges of the engine, as plain numbers; counters never go down in one life."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0  # referenced by a live sequence
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0  # verified in all
    accepted_draft_tokens: int = 0
    verifications: int = 0  # of one sequence's drafts in one step
    last_step_seconds: float = 0.0
    batch_size: int = 0  # sequences in the last step
    batch_tokens: int = 0  # tokens computed in the last step


class Deltas(msgspec.Struct, frozen=True, kw_only=True, tag="deltas"):
    """One message per step and HTTP worker."""

    deltas: list[Delta]
    stats: EngineStats


Outbound = Deltas


class RankFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of a model that is divided: where it runs and what it holds."""

    rank: int
    pid: int
    host: str
    cores: list[int]  # it is bound to; empty if to none
    num_threads: int
    weights_bytes: int


class AdapterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that is served: where it was found and what it is."""

    name: str
    source: str  # as the user named it
    path: str
    rank: int  # the largest of any matrix
    base_model: str | None  # what it says it was trained on
    bytes: int  # of all ranks


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side and `/info` need to know of the loaded model.

    `model_path` is the local folder or GGUF file, where the tokenizer is. `max_model_len` is the
    most tokens one sequence may have (prompt and output), `kv_cache_tokens` what the pool holds.
    `activation_dtype` is what quantized matrices are multiplied by: `int8` or that of the model.
    """

    model_id: str
    model_path: str
    model_sha: str | None
    architecture: str
    dtype: str
    kv_cache_dtype: str
    device: str
    backend: str
    quantization: str | None
    activation_dtype: str
    deterministic: bool
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    block_size: int
    kv_cache_tokens: int
    kv_blocks_total: int
    num_parameters: int
    weights_bytes: int  # of all ranks
    ranks: list[RankFacts] = []  # empty for one process
    adapters: list[AdapterFacts] = []


class EngineStart(msgspec.Struct, frozen=True, kw_only=True):
    """First frame to an engine child. `epoch` counts the engines this supervisor has started."""

    config: EngineConfig
    runtime_dir: str  # private, 0700; sockets go here
    epoch: int


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """First frame to an HTTP worker child."""

    config: ServerConfig
    engine: EngineConfig
    index: int  # 0 .. http_workers - 1
    runtime_dir: str  # of this server alone: the workers' own sockets


class Starting(msgspec.Struct, frozen=True, kw_only=True, tag="starting"):
    """Not ready yet: `phase` is `downloading`, `loading` or `warming up`, `fraction` 0 to 1.

    `after` is what the engine before this one died of, if that is why it starts.
    """

    phase: str
    fraction: float | None = None
    after: str | None = None


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine serves at `endpoint` (a ZMQ address)."""

    endpoint: str
    facts: ModelFacts


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine could not start or died of a known error; it exits after sending this."""

    error: str  # class name in `tgi_cli.errors`
    message: str
    hint: str | None = None


#: Upper bounds of duration buckets, in seconds: TGI's 35, from 0.15 ms, ratio 1.5.
DURATION_BOUNDS = tuple(0.00015 * 1.5**i for i in range(35))


class Spread(msgspec.Struct, array_like=True):
    """How values are spread: `counts` by bucket, `total` the sum of the values."""

    counts: dict[int, int]
    total: float

    def copy(self) -> Spread:
        """One that does not change any more."""
        return Spread(self.counts.copy(), self.total)


class StepTimes(msgspec.Struct, array_like=True):
    """Steps of one kind, with seconds by `DURATION_BOUNDS`.

    `inference` is the whole step, `forward` its computation, `decode` booking its output; of steps
    by which a sequence ended, that is in `filter`.
    """

    inference: Spread
    forward: Spread
    decode: Spread
    filter: Spread
    begun: int = 0
    done: int = 0

    def copy(self) -> StepTimes:
        """One that does not change any more."""
        return StepTimes(
            self.inference.copy(),
            self.forward.copy(),
            self.decode.copy(),
            self.filter.copy(),
            self.begun,
            self.done,
        )


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All steps of one engine: `times` of those that computed prompts (`prefill`) and the others.

    `joined` counts how many sequences came in at once, by that number itself; `num_joins` of them
    beside running ones, which took `joining` seconds to decide.
    """

    times: dict[str, StepTimes] = {}
    joined: Spread = msgspec.field(default_factory=lambda: Spread({}, 0.0))
    joining: Spread = msgspec.field(default_factory=lambda: Spread({}, 0.0))
    num_joins: int = 0


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Once a second from a thread of the engine: is the loop alive?

    `step_age` is the seconds the current step has been running, 0 when idle. `tokens_held` are
    those of running sequences, `tokens_allowed` what they may come to.
    """

    num_steps: int
    step_age: float
    has_work: bool
    tokens_held: int = 0
    tokens_allowed: int = 0
    steps: StepRecord | None = None


class Draining(msgspec.Struct, frozen=True, kw_only=True, tag="draining"):
    """Supervisor to HTTP workers: accept nothing new, finish what was accepted, then exit."""

    timeout: float


class Restarting(msgspec.Struct, frozen=True, kw_only=True, tag="restarting"):
    """Supervisor to HTTP workers: the engine is gone for `reason`, a new one is starting."""

    reason: str


Status = Starting | Ready | Failed | Heartbeat | Draining | Restarting
