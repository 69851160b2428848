"""Files, errors, signals, ranks: what every other folder may use."""
