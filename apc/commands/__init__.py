"""The subcommands of `apc`: train, evaluate, sweep, cache, doctor."""
