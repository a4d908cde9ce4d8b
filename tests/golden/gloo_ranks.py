"""A program: an engine of two ranks that meet in gloo, though they could share memory.

    python -m tests.golden.gloo_ranks MODEL DTYPE BLOCK_SIZE

Prints the tokens as JSON.
"""

from __future__ import annotations

import json
import sys

from tests.golden.engine import make_core, request_of, run
from tgi_cli.engine import rank_group
from tgi_cli.kernels.process_group import ProcessGroup


def main(model: str, dtype: str, block_size: str) -> None:
    rank_group.shares_memory = lambda backend, nodes: False
    core = make_core(model, dtype=dtype, block_size=int(block_size), num_shard=2)
    try:
        assert isinstance(core._executor.group.collective, ProcessGroup)  # type: ignore[attr-defined]
        asked = [
            request_of(f"r{i}", [7 + i, *range(20, 30 + 9 * i)], max_tokens=16, ignore_eos=True)
            for i in range(3)
        ]
        answers = run(core, asked, stagger=2)
    finally:
        core.close()
    print(json.dumps([answers[request.id].token_ids for request in asked]))


if __name__ == "__main__":
    main(*sys.argv[1:])
