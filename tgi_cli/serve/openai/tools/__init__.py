"""Tools in a chat: what is declared, and the calls found in what the model writes."""
