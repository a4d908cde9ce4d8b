"""Loads a model, fills its KV cache and prints the plan beside the memory then held; a program."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.golden.engine import make_core, request_of, run


def peak_rss() -> int:
    """Most memory this process ever held, in bytes."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main(path: str, dtype: str, num_seqs: int, max_len: int) -> None:
    torch.set_num_threads(1)
    core = make_core(
        path,
        dtype=dtype,
        max_model_len=max_len,
        kv_cache_tokens=num_seqs * max_len,
        block_size=16,
        max_num_seqs=num_seqs,
        max_batch_tokens=256,
    )
    requests = [
        request_of(
            f"r{i}",
            [(i * 7919 + j * 31) % 400 + 3 for j in range(max_len - 8)],
            max_tokens=6,
            ignore_eos=True,
            # The plan reserves their logits beside a full cache, so they come last.
            prompt_logprobs=1 if i == num_seqs - 1 else None,
        )
        for i in range(num_seqs)
    ]
    run(core, requests)
    assert core.memory_plan is not None
    print(json.dumps({"plan": core.memory_plan.as_dict(), "peak": peak_rss()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
