"""Converting a checkpoint: layer by layer, on disk, resumable. `run` of `job` does all of it."""
