from __future__ import annotations

import subprocess
import sys

MODULES = (
    "tgi_cli.tokenizer",
    "tgi_cli.detokenizer",
    "tgi_cli.chat_template",
    "tgi_cli.gguf_metadata",
    "tgi_cli.gguf_tokenizer",
)


def test_text_modules_load_neither_torch_nor_transformers() -> None:
    program = (
        f"import sys, {', '.join(MODULES)}\n"
        "print(sorted({'torch', 'transformers', 'sentencepiece'} & sys.modules.keys()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
