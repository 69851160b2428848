"""The configuration: all keys, and how files and overrides are merged."""
