r"""tgi on a GPU, without a server: tokens a second, and where the time of a step goes.

    python -m benchmarks.gpu MODEL [--dtype bfloat16] [--clients 1 32]

Greedy tokens of prompts of 128 tokens, then prompts of 1,920 tokens that end with one token; the
first run of each is not counted. The last lines are of a profile of decodes: how many kernels a
step launches and how long the GPU works in it. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from tgi_cli import LLM, SamplingParams

PROMPT, OUTPUT, LONG = 128, 128, 1920


def main() -> None:
    arguments = parse()
    options = {"dtype": arguments.dtype, "kv_cache_dtype": arguments.kv_cache_dtype}
    began = time.perf_counter()
    llm = LLM(
        arguments.model,
        device=arguments.device,
        max_model_len=2048,
        max_num_seqs=max(arguments.clients),
        max_batch_tokens=2048,
        kv_cache_tokens=2048 * max(arguments.clients),
        prefix_caching=False,
        **options,
    )
    found: dict[str, object] = {"load seconds": round(time.perf_counter() - began, 2), **options}
    with llm:
        found["backend"] = llm.facts.backend
        found["answer"] = capital(llm)
        timed(llm, 1, PROMPT, 8)
        for clients in arguments.clients:
            timed(llm, clients, PROMPT, 8)
            seconds = timed(llm, clients, PROMPT, OUTPUT) - timed(llm, clients, PROMPT, 1)
            found[f"decode {clients}"] = round(clients * (OUTPUT - 1) / seconds, 1)
        timed(llm, 2, LONG, 1)
        found["prefill"] = round(4 * LONG / timed(llm, 4, LONG, 1), 1)
        print(json.dumps(found), flush=True)
        if arguments.device == "cuda":
            for clients in arguments.clients:
                found[f"profile {clients}"] = profile(llm, clients)
    print(json.dumps(found), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32])
    return parser.parse_args()


def capital(llm: LLM) -> str:
    sampling = SamplingParams(temperature=0.0, max_tokens=16)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    return llm.generate(prompt, sampling)[0].text


def timed(llm: LLM, clients: int, prompt: int, output: int) -> float:
    prompts = [[(i + 7 * n) % 1000 + 20 for i in range(prompt)] for n in range(clients)]
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    began = time.perf_counter()
    found = llm.generate(prompts, sampling)
    assert all(len(each.token_ids) == output for each in found)
    return time.perf_counter() - began


def profile(llm: LLM, clients: int) -> dict[str, float]:
    """Of one step that decodes, over forty: milliseconds of the clock and of the GPU, kernels."""
    steps = 40
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        seconds = timed(llm, clients, 4, steps)
    kernels = [each for each in profiler.events() if each.device_type.name == "CUDA"]
    busy = sum(each.time_range.elapsed_us() for each in kernels) / 1e3
    return {
        "clock ms": round(1e3 * seconds / steps, 2),
        "gpu ms": round(busy / steps, 2),
        "kernels": round(len(kernels) / steps, 1),
    }


if __name__ == "__main__":
    main()
