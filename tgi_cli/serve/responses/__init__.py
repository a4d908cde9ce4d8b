"""OpenAI's responses API over the same conversations."""
