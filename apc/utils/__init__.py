"""Files, errors, signals and ranks: helpers for every other folder."""
