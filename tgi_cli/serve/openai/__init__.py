"""Routes under `/v1`: OpenAI's shapes."""
