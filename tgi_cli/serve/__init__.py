"""The HTTP side: supervisor, front door and the APIs. Never imports torch."""
