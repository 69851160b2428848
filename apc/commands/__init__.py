"""What `apc` runs: train, evaluate, sweep, cache, doctor."""
