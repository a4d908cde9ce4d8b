"""Anthropic's messages API over the same conversations."""
