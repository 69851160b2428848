"""Sparse models: mask policies, and FFNs that run under them."""
