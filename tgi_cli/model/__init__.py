"""What a decoder is made of, and how checkpoints become one."""
