"""Texts and models: token windows, FFNs and their hooks, GGUF files, and the bundled model and text."""
