"""The configuration: every key, and how files and overrides make one."""
