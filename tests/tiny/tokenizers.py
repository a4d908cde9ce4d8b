"""A byte-level BPE tokenizer of 512 tokens with a ChatML template, trained on the spot."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 512
#: Their ids are 0, 1, 2.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, TURN_START, TURN_END = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = """
The server takes a prompt and gives an answer, one token after another. Many requests share one
batch, and each of them gets the same words that it would get alone. A block of the cache holds
sixteen positions; when a sequence ends, its blocks go back to the pool, and the next one may find
there what it would otherwise have to compute again. What is the capital of France? The capital of
France is Paris. How many tokens fit into the context? That depends on the model, its positions and
the memory of the machine. Some questions are short. Other questions are long, and wander about,
and come back to where they started, because nobody stopped them while there was still time to do
so. Système, Größe, naïveté, señor, 東京, Привет, 🙂: bytes are bytes, whatever the writing system.
Numbers such as 0, 1, 2, 42, 1024 and 3.14159 are split into digits and points and counted too.
def generate(prompt, max_tokens=16): return [token for token in engine.stream(prompt)][:max_tokens]
"""


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer.to_str()


def make_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    (folder / "tokenizer.json").write_text(_trained())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
