"""The engine: scheduler, block pool, runner and the process around them."""
