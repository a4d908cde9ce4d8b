"""The functions a backend offers, and the backends."""
