"""The demo model as a Hugging Face folder in bfloat16, so that every server gets the same weights.

    python benchmarks/model_folder.py OUT

No end-of-text token is configured, so that `transformers serve`, which refuses `ignore_eos`,
generates fixed lengths too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import GgufConfig
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from tgi_cli import hub


def main() -> None:
    """Write the folder named by the only argument."""
    out = Path(sys.argv[1])
    path = hub.resolve("demo")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    print(out)


if __name__ == "__main__":
    main()
