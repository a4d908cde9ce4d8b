"""How a format's bytes load and multiply."""
