"""Tiny real checkpoints, made at test time: random weights in the layouts people publish."""

from tests.tiny.checkpoints import FAMILIES, make_checkpoint, make_model
from tests.tiny.tokenizers import CHAT_TEMPLATE, make_tokenizer

__all__ = ["CHAT_TEMPLATE", "FAMILIES", "make_checkpoint", "make_model", "make_tokenizer"]
