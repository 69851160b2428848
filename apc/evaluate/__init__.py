"""Mask policies on scored text: perplexity, captured shares, speed; tables and figures."""
